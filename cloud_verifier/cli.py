"""`cloud-verifier`: serve a target over HTTP, or let it write by itself."""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_verifier import targets_command, tokens_command
from edge_runtime import logs
from edge_runtime.contract.errors import FlexSpecError, InputError
from edge_runtime.systemd.command import add_actions, run_action
from edge_runtime.systemd.units import Kind

if TYPE_CHECKING:
    from cloud_verifier.checking import Limits
    from cloud_verifier.loading import Loading
    from cloud_verifier.principals import Doors
    from cloud_verifier.service import Service
    from cloud_verifier.speculation import Speculation
    from cloud_verifier.target import Target

log = logging.getLogger(__name__)

UNIT = Kind(
    "cloud_verifier.cli",
    "flexspec-verifier",
    "flexspec-verifier",
    Path(__file__).with_name("flexspec-verifier.service"),
)

DESCRIPTION = """\
The cloud half of FlexSpec: checks the tokens that boards draft, with a PyTorch target.

examples:
  cloud-verifier serve export/family/target-v1
  cloud-verifier serve /models/Llama-3.1-8B --device cuda --dtype bfloat16 --host 0.0.0.0 \\
      --certificate server.pem --key server.key
  cloud-verifier serve export/family/target-v1 --draft export/family/bundle
  cloud-verifier serve export/family/target-v1 --tokens tokens.toml       # see cloud-verifier token --help
  torchrun --nproc-per-node 2 -m cloud_verifier.cli serve /models/Qwen2.5-32B --device cuda --dtype bfloat16 --compile
  cloud-verifier generate export/family/target-v1 "def main(" --max-new-tokens 32
  cloud-verifier serve --registry /var/lib/flexspec-verifier/targets      # all versions there, see `targets --help`
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
    model.add_argument(
        "--max-context", type=_positive, metavar="TOKENS", help="default: what the model was trained for"
    )
    model.add_argument("--threads", type=int, default=0, help="CPU threads for torch (default: torch's choice)")

    serve = commands.add_parser("serve", parents=[model], help="serve a target, or several, over HTTP")
    serve.add_argument("target", type=Path, nargs="?", metavar="TARGET", help=f"{checkpoint}; or else --registry")
    serve.add_argument(
        "--registry",
        type=Path,
        metavar="DIR",
        help="serve every version that `cloud-verifier targets` has put there, and follow what it changes",
    )
    serve.add_argument(
        "--retired-seconds",
        type=_seconds,
        default=3600.0,
        metavar="SECONDS",
        help="that sessions of a retired version have to end (default: %(default)g)",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8500, help="0 picks a free one (default: %(default)s)")
    serve.add_argument("--http", default="auto", choices=["auto", "1", "2"], help="versions (default: %(default)s)")
    for name, text in (
        ("certificate", "PEM certificate chain: serve over TLS"),
        ("key", "PEM private key of the certificate"),
        ("client-ca", "PEM authorities: serve only who has a certificate of theirs"),
    ):
        credential = name if name == "client-ca" else f"tls-{name}"
        serve.add_argument(
            f"--{name}",
            type=Path,
            default=_credential(credential),
            metavar="FILE",
            help=f"{text} (default: systemd's credential {credential}, if there is one)",
        )
    serve.add_argument(
        "--tokens",
        type=Path,
        default=_credential("verifier-tokens"),
        metavar="FILE",
        help="serve only who shows one of these, see `cloud-verifier token --help`; read again at SIGHUP "
        "(default: systemd's credential verifier-tokens, else everybody is served)",
    )
    serve.add_argument(
        "--batch-window",
        type=_milliseconds,
        default=2.0,
        metavar="MS",
        help="that a forward waits for boards that are about to send a round; 0: for nobody (default: %(default)g)",
    )
    serve.add_argument(
        "--compile", action="store_true", help="on CUDA: let torch fuse layers; a minute at start, a third less a round"
    )
    serve.add_argument(
        "--exact",
        action="store_true",
        help="on CUDA in 16 bits: no text may depend on what it was computed together with, not even in a near tie; "
        "costs a single board some 15 %% a round",
    )
    serve.add_argument("--max-sessions", type=_positive, default=256, help="default: %(default)s")
    serve.add_argument(
        "--max-tokens", type=_positive, default=262_144, help="tokens of all sessions together (default: %(default)s)"
    )
    serve.add_argument(
        "--idle-seconds", type=float, default=600.0, help="drop sessions unused for longer (default: %(default)s)"
    )
    serve.add_argument(
        "--max-queue-seconds",
        type=_seconds,
        default=3.0,
        metavar="SECONDS",
        help="that rounds may wait for the target; then new ones are told to come back (default: %(default)g)",
    )
    serve.add_argument(
        "--grace",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="for rounds to end at SIGTERM, while new ones are refused (default: %(default)g)",
    )
    serve.add_argument(
        "--draft", type=Path, metavar="BUNDLE", help="draft bundle, to say the target's own tokens several to a forward"
    )
    serve.add_argument(
        "--draft-tokens",
        type=_positive,
        default=5,
        metavar="K",
        help="tokens to draft for one forward (default: %(default)s)",
    )
    serve.add_argument(
        "--draft-threads", type=int, default=0, help="CPU threads for the draft (default: one per core, at most 4)"
    )
    serve.add_argument(
        "--draft-rounds",
        type=_positive,
        default=4,
        metavar="N",
        help="with more rounds than these at once nothing is drafted here; boards do (default: %(default)s)",
    )
    serve.set_defaults(run=_serve)

    generate = commands.add_parser(
        "generate", parents=[model], help="let the target write by itself, without a board: the text to compare with"
    )
    generate.add_argument("target", type=Path, metavar="TARGET", help=checkpoint)
    generate.add_argument("prompt", nargs="*", help="one text per prompt")
    generate.add_argument("--max-new-tokens", type=_positive, default=128, help="default: %(default)s")
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

    targets_command.add_parser(commands)
    tokens_command.add_parser(commands)
    add_actions(commands, _service, "run the verifier with systemd", SERVICE, UNIT)
    return parser


def _service(options: argparse.Namespace) -> int:
    return run_action(options, lambda words: _parser().parse_args(words))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 3600")
    return number


def _milliseconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1000")
    return number


def _credential(name: str) -> Path | None:
    """What systemd's LoadCredential= passes under that name; None where it does not."""
    place = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nowhere"), name)
    return place if place.is_file() else None


def _serve(options: argparse.Namespace) -> int:
    import uvloop

    from cloud_verifier.checking import Limits
    from cloud_verifier.pool import page_of
    from cloud_verifier.principals import Doors
    from cloud_verifier.server import serve
    from cloud_verifier.service import Service
    from edge_runtime.configuration.settings import authorities, is_loopback
    from edge_runtime.listening import Listening

    # A watchdog ends a process that hangs with SIGABRT: then it says where.
    faulthandler.enable(2)
    if (options.target is None) == (options.registry is None):
        raise InputError("give a TARGET to serve, or --registry DIR for all versions of a registry")
    if bool(options.certificate) != bool(options.key):
        raise InputError("--certificate and --key go together")
    if options.client_ca and not options.certificate:
        raise InputError("--client-ca asks for certificates over TLS: give --certificate and --key, too")
    limits = Limits(
        max_sessions=options.max_sessions,
        max_tokens=options.max_tokens,
        idle_seconds=options.idle_seconds,
        max_queue_seconds=options.max_queue_seconds,
        page=page_of(options.device),
    )
    client_ca = authorities(options.client_ca, Path()) if options.client_ca else None
    listening = Listening(options.host, options.port, options.certificate, options.key, options.http, client_ca)
    doors = Doors(options.tokens)
    if not is_loopback(options.host):
        if options.tokens is None and client_ca is None:
            log.warning("everybody who reaches %s can use this verifier: --tokens asks for tokens", options.host)
        if options.certificate is None:
            log.warning(
                "prompts and tokens arrive at %s in clear: give --certificate and --key, unless something in front of "
                "it does TLS",
                options.host,
            )
    if options.tokens and not len(doors):
        log.warning("nobody in %s has a token, so nobody is served", options.tokens)
    # Loading takes seconds: requests meanwhile are told so, rather than refused a connection.
    if options.registry is None:
        loading = _loading(options)
        if loading.is_team and int(os.environ["RANK"]):
            loading.follow(options.target, options.max_tokens)
            return 0
        service = Service(
            lambda: loading.alone(options.target),
            limits,
            lambda target: _speculate(options, target),
            doors,
            window=options.batch_window / 1e3,
        )
    else:
        service = _several(options, limits, doors)

    def announce(url: str) -> None:
        assert service.target is not None
        print(f"cloud-verifier: {service.target.version} on {url}", flush=True)

    uvloop.run(serve(service, listening, announce, options.grace))
    return 0


def _several(options: argparse.Namespace, limits: Limits, doors: Doors) -> Service:
    """A service of all versions of a registry."""
    from cloud_verifier.registry import Registry
    from cloud_verifier.rollout import Patience, Rollout, load_default
    from cloud_verifier.service import Service

    make = _loading(options).beside
    registry = Registry(options.registry)
    # A check gives way to those who are served.
    check_options = ["--device", options.device, "--dtype", options.dtype, "--threads", "1"]
    return Service(
        lambda: load_default(registry, make),
        limits,
        lambda target: _speculate(options, target),
        doors,
        lambda engine, sessions: Rollout(registry, engine, sessions, Patience(grace=options.retired_seconds)),
        check_options,
        make,
        options.batch_window / 1e3,
    )


def _generate(options: argparse.Namespace) -> int:
    import msgspec
    from tokenizers import Tokenizer

    from cloud_verifier.reference import decode_alone
    from cloud_verifier.target import load_model
    from edge_runtime.contract.coupling import Sampling, check_prompt

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


def _loading(options: argparse.Namespace) -> Loading:
    """How targets are loaded. Raises InputError."""
    from cloud_verifier.loading import Loading

    loading = Loading(
        options.device, options.dtype, options.max_context, options.threads, options.exact, options.compile
    )
    loading.check()
    return loading


def _speculate(options: argparse.Namespace, target: Target) -> Speculation | None:
    from cloud_verifier.speculation import Speculation

    if options.draft is None:
        return None
    return Speculation(options.draft, target, options.draft_tokens, options.draft_threads, options.draft_rounds)


if __name__ == "__main__":
    raise SystemExit(main())
