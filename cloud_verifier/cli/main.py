"""`cloud-verifier`: serve a target over HTTP, or let it write by itself."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cloud_verifier.cli import serve, targets, token
from cloud_verifier.cli.serve import positive
from edge_runtime.common import logs
from edge_runtime.protocol.errors import FlexSpecError, InputError
from edge_runtime.systemd.actions import add_actions, run_action
from edge_runtime.systemd.units import Kind

UNIT = Kind(
    "cloud_verifier.cli",
    "flexspec-verifier",
    "flexspec-verifier",
    Path(__file__).parents[1] / "flexspec-verifier.service",
)

DESCRIPTION = """\
The cloud half of FlexSpec: checks the tokens that boards draft, with a PyTorch target.

examples:
  cloud-verifier serve export/example_family/target-v1
  cloud-verifier serve /models/Llama-3.1-8B --device cuda --dtype bfloat16 --host 0.0.0.0 \\
      --certificate server.pem --key server.key
  cloud-verifier serve export/example_family/target-v1 --draft export/example_family/bundle
  cloud-verifier serve export/example_family/target-v1 --tokens tokens.toml       # see cloud-verifier token --help
  torchrun --nproc-per-node 2 -m cloud_verifier.cli serve /models/Qwen2.5-32B --device cuda --dtype bfloat16 --compile
  cloud-verifier generate export/example_family/target-v1 "def main(" --max-new-tokens 32
  cloud-verifier serve --registry /var/lib/flexspec-verifier/targets      # all versions there, see `targets --help`
  cloud-verifier serve /models/Llama-3.1-8B --device cuda --replicas 2-8  # on Ray Serve: a GPU each, as many as needed
  cloud-verifier service install --now /models/Llama-3.1-8B -- --device cuda --dtype bfloat16
"""

SERVICE = """\
Runs the verifier with systemd: from boot on, watched, started again after a fault, and with few rights. Secrets are
files that only root can read, in /etc/credstore: flexspec.verifier-tokens (see `cloud-verifier token --help`) and
flexspec.tls-key, beside it flexspec.tls-certificate and flexspec.client-ca. New ones need a restart; no text notices.

examples:
  sudo cloud-verifier token add kitchen > kitchen.token
  cloud-verifier service install --now /srv/models/target-v1
  cloud-verifier service install --now /srv/models/Llama-3.1-8B -- --device cuda --dtype bfloat16 --host 0.0.0.0
  cloud-verifier service install --name flexspec-v2 --now /srv/models/target-v2 -- --port 8501
  cloud-verifier service status --json          # exit code 0: it runs; 3: it does not
  journalctl -u flexspec-verifier -f
  cloud-verifier service uninstall
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    options = _parser().parse_args(arguments)
    logs.set_up(options.log_level, "cloud-verifier", form=options.log_format)
    try:
        return int(options.run(options))
    except FlexSpecError as error:
        print(f"cloud-verifier: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cloud-verifier", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log-level", default="warning", choices=logs.LEVELS, help="default: %(default)s")
    parser.add_argument(
        "--log-format", default="text", choices=logs.FORMATS, help="json: an object a line (default: %(default)s)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    checkpoint = "directory of a Hugging Face checkpoint or a PEFT adapter"
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--device", default="cpu", help="torch device, such as cuda (default: %(default)s)")
    model.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default: %(default)s"
    )
    model.add_argument("--max-context", type=positive, metavar="TOKENS", help="default: what the model was trained for")
    model.add_argument("--threads", type=int, default=0, help="CPU threads for torch (default: torch's choice)")

    serve.add_parser(commands, model)

    generate = commands.add_parser(
        "generate", parents=[model], help="let the target write by itself, without a board: the text to compare with"
    )
    generate.add_argument("target", type=Path, metavar="TARGET", help=checkpoint)
    generate.add_argument("prompt", nargs="*", help="one text per prompt")
    generate.add_argument("--max-new-tokens", type=positive, default=128, help="default: %(default)s")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    generate.add_argument("--top-k", type=int, default=0, help="0 keeps all (default: %(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    generate.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    generate.add_argument(
        "--jobs",
        type=Path,
        help='"-" or a file of JSON lines {"ids": [...], "max_new_tokens": n, "sampling": {...}}, '
        "answered by JSON lines of new ids",
    )
    generate.set_defaults(run=_generate)

    targets.add_parser(commands)
    token.add_parser(commands)
    add_actions(commands, _service, "run the verifier with systemd", SERVICE, UNIT)
    return parser


def _service(options: argparse.Namespace) -> int:
    return run_action(options, lambda words: _parser().parse_args(words))


def _generate(options: argparse.Namespace) -> int:
    import msgspec
    import torch
    from tokenizers import Tokenizer

    from cloud_verifier.model.reference import decode_alone
    from cloud_verifier.model.target import load_model
    from edge_runtime.protocol.sampling import Sampling, check_prompt

    if options.threads:
        torch.set_num_threads(options.threads)
    model, base, end_ids = load_model(options.target, options.device, options.dtype)
    size = model.config.vocab_size
    if options.jobs:
        try:
            lines = sys.stdin if str(options.jobs) == "-" else options.jobs.open()
        except OSError as error:
            raise InputError(f"cannot read {options.jobs}: {error.strerror}") from None
        for line in lines:
            try:
                job = msgspec.json.decode(line)
                sampling = msgspec.convert(job.get("sampling", {}), Sampling)
                check_prompt(job["ids"], size)
                wanted = int(job["max_new_tokens"])
            except (msgspec.MsgspecError, KeyError, TypeError, AttributeError, ValueError) as error:
                raise InputError(f"not a job: {line.strip()[:80]} ({error})") from None
            print(json.dumps(decode_alone(model, job["ids"], sampling, wanted, end_ids)), flush=True)
        return 0
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    except ValueError as error:
        raise InputError(str(error)) from None
    for prompt in options.prompt or [sys.stdin.read()]:
        ids = tokenizer.encode(prompt).ids
        check_prompt(ids, size)
        new = decode_alone(model, ids, sampling, options.max_new_tokens, end_ids)
        print(prompt + tokenizer.decode(new))
    return 0
