"""`cloud-verifier`: the entry point, and the command `service`.

Parsers and the commands `token` and `service` must work on the base install, without torch: only functions of commands
that need the extras import them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cloud_verifier.cli import check, generate, serve, targets, token
from cloud_verifier.cli.serve import MAX_THREADS
from edge_runtime.common import logs
from edge_runtime.common.extras import describe_missing_extra
from edge_runtime.common.options import add_option, add_version_option, whole_number
from edge_runtime.common.program import run_program
from edge_runtime.systemd.actions import add_service_parser, run_action
from edge_runtime.systemd.units import ServiceUnit

UNIT = ServiceUnit(
    "cloud_verifier.cli",
    "flexspec-verifier",
    "flexspec-verifier",
    Path(__file__).parents[1] / "flexspec-verifier.service",
)

# Top-level modules that only the extras install.
EXTRA_MODULES = frozenset({"accelerate", "gguf", "peft", "ray", "safetensors", "torch", "transformers", "uvloop"})

DESCRIPTION = """\
The cloud half of FlexSpec: verifies the tokens that boards draft, with a PyTorch target model.

examples, with the model family that ships with a clone:
  cloud-verifier serve family/target-v1
  cloud-verifier serve family/target-v1 --draft family/bundle    # speculate here too
  cloud-verifier generate family/target-v1 "def main(" --max-new-tokens 32

examples, with your own model and GPUs:
  cloud-verifier check /srv/models/Llama-3.1-8B                              # how would it be served?
  cloud-verifier serve /srv/models/Llama-3.1-8B --device cuda --dtype bfloat16 --host 0.0.0.0 \\
      --certificate server.pem --key server.key --tokens tokens.toml         # see `cloud-verifier token --help`
  cloud-verifier serve Llama-3.2-3B-Instruct-Q4_K_M.gguf                     # converted once, into a cache
  cloud-verifier serve --registry /var/lib/flexspec-verifier/targets         # see `cloud-verifier targets --help`
  cloud-verifier serve /srv/models/Llama-3.1-8B --device cuda --replicas 2-8 # Ray Serve: one GPU per replica
  cloud-verifier serve /srv/models/Qwen2.5-32B --device cuda --dtype bfloat16 --gpus 2
  cloud-verifier service install --now /srv/models/Llama-3.1-8B -- --device cuda --dtype bfloat16
"""

SERVICE_DESCRIPTION = """\
Runs the verifier under systemd: started at boot, supervised by a watchdog, restarted after a failure, and sandboxed.
Secrets are files in /etc/credstore that only root can read: flexspec.verifier-tokens (see `cloud-verifier token
--help`) and flexspec.tls-key, along with flexspec.tls-certificate and flexspec.client-ca. New secrets take effect after
a restart, which does not affect any text.

examples:
  sudo cloud-verifier token add kitchen > kitchen.token
  cloud-verifier service install --now /srv/models/target-v1
  cloud-verifier service install --now /srv/models/Llama-3.1-8B -- --device cuda --dtype bfloat16 --host 0.0.0.0
  cloud-verifier service install --name flexspec-v2 --now /srv/models/target-v2 -- --port 8501
  cloud-verifier service status --json          # exit code 0: running; 3: not running
  journalctl -u flexspec-verifier -f
  cloud-verifier service uninstall
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    options = build_parser().parse_args(arguments)
    logs.configure(options.log_level, "cloud-verifier", form=options.log_format)
    extra = "scale" if getattr(options, "replicas", None) else "cloud"
    return run_program(
        "cloud-verifier",
        lambda: int(options.run(options)),
        lambda error: describe_missing_extra(error, EXTRA_MODULES, extra),
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cloud-verifier", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log-level", default="warning", choices=logs.LEVELS, help="default: %(default)s")
    add_option(parser, "--log-format", "json: one JSON object per line", default="text", choices=logs.FORMATS)
    add_version_option(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    device_options = argparse.ArgumentParser(add_help=False)
    add_option(device_options, "--device", "torch device, such as cuda", default="cpu")
    device_options.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default: %(default)s"
    )
    model_options = argparse.ArgumentParser(add_help=False, parents=[device_options])
    text = "longest text (default: the model's own limit)"
    add_option(model_options, "--max-context TOKENS", text, type=whole_number(1))
    text = (
        "quantize the target's layers: to int8, or on a GPU to fp8 or, with torchao (flexspec[quantize]), int4; texts "
        "are then those of the quantized target, whose version ends with the method"
    )
    add_option(model_options, "--quantize METHOD", text, choices=("int8", "int4", "fp8"))
    text = "CPU threads of torch (default: torch's choice)"
    model_options.add_argument("--threads", type=whole_number(0, MAX_THREADS), default=0, metavar="N", help=text)

    serve.add_parser(commands, model_options)

    generate.add_parser(commands, model_options)
    check.add_parser(commands)
    targets.add_parser(commands, device_options)
    token.add_parser(commands)
    add_service_parser(commands, _service, "run the verifier under systemd", SERVICE_DESCRIPTION, UNIT)
    return parser


def _service(options: argparse.Namespace) -> int:
    return run_action(options, lambda words: build_parser().parse_args(words))
