"""`cloud-verifier serve`: a target, or all versions of a registry, over HTTP."""

from __future__ import annotations

import argparse
import faulthandler
import functools
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.protocol.errors import InputError

if TYPE_CHECKING:
    from cloud_verifier.api.app import Service
    from cloud_verifier.engine.auth import Doors
    from cloud_verifier.model.limits import VerifierLimits
    from cloud_verifier.model.loading import Loading
    from cloud_verifier.model.speculation import Speculation
    from cloud_verifier.model.target import Target
    from edge_runtime.common.http_server import Listening

log = logging.getLogger(__name__)


def add_parser(commands: Any, model: argparse.ArgumentParser) -> None:
    """Adds `serve` to argparse's sub-parsers; `model`: options of how targets are loaded."""
    serve = commands.add_parser("serve", parents=[model], help="serve a target, or several, over HTTP")
    serve.add_argument(
        "target",
        type=Path,
        nargs="?",
        metavar="TARGET",
        help="directory of a Hugging Face checkpoint or a PEFT adapter; or else --registry",
    )
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
    serve.add_argument("--max-sessions", type=positive, default=256, help="default: %(default)s")
    serve.add_argument(
        "--max-tokens", type=positive, default=262_144, help="tokens of all sessions together (default: %(default)s)"
    )
    serve.add_argument(
        "--idle-seconds", type=float, default=600.0, help="drop sessions unused for longer (default: %(default)s)"
    )
    serve.add_argument(
        "--max-queue-seconds",
        type=_seconds,
        default=3.0,
        metavar="SECONDS",
        help="that rounds may wait for their first token; then new ones are told to come back (default: %(default)g)",
    )
    serve.add_argument(
        "--grace",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="for rounds to end at SIGTERM, while new ones are refused (default: %(default)g)",
    )
    serve.add_argument(
        "--draft",
        type=Path,
        metavar="DRAFT",
        help="to say the target's own tokens several to a forward: a bundle, as boards have it, which runs on the CPU, "
        "or a draft's directory (draft.json), which runs where the target does",
    )
    serve.add_argument(
        "--draft-tokens",
        type=positive,
        default=5,
        metavar="K",
        help="tokens to draft for one forward (default: %(default)s)",
    )
    serve.add_argument(
        "--draft-threads", type=int, default=0, help="CPU threads for the draft (default: one per core, at most 4)"
    )
    serve.add_argument(
        "--draft-rounds",
        type=positive,
        default=4,
        metavar="N",
        help="with more rounds than these at once nothing is drafted here; boards do (default: %(default)s)",
    )
    scale = serve.add_argument_group("several replicas, on Ray Serve")
    scale.add_argument(
        "--replicas",
        type=_replicas,
        metavar="N[-MOST]",
        help="so many, or between them as many as the rounds need, each with its own copy of the target (a GPU of its "
        "own with --device cuda); all limits are each replica's",
    )
    scale.add_argument(
        "--replica-rounds",
        type=positive,
        default=16,
        metavar="N",
        help="that a replica should have at once, waiting ones included, before there are more (default: %(default)s)",
    )
    scale.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="of a Ray cluster, such as auto; its machines need FlexSpec and TARGET at the same places "
        "(default: one of its own, on this machine)",
    )
    serve.set_defaults(run=_serve)


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _up_to(most: int, text: str) -> float:
    number = float(text)
    if not 0 <= number <= most:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {most}")
    return number


def _seconds(text: str) -> float:
    return _up_to(3600, text)


def _milliseconds(text: str) -> float:
    return _up_to(1000, text)


def _replicas(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= fewest <= most:
        raise argparse.ArgumentTypeError(f"{text} is neither a number of replicas, such as 2, nor a range, such as 1-8")
    return fewest, most


def _credential(name: str) -> Path | None:
    """What systemd's LoadCredential= passes under that name; None where it does not."""
    place = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nowhere"), name)
    return place if place.is_file() else None


def _serve(options: argparse.Namespace) -> int:
    import uvloop

    from cloud_verifier.api.server import serve
    from cloud_verifier.engine.auth import Doors
    from edge_runtime.common.http_server import Listening
    from edge_runtime.settings.validators import authorities, is_loopback

    # A watchdog ends a process that hangs with SIGABRT: then it says where.
    faulthandler.enable(2)
    if (options.target is None) == (options.registry is None):
        raise InputError("give a TARGET to serve, or --registry DIR for all versions of a registry")
    if bool(options.certificate) != bool(options.key):
        raise InputError("--certificate and --key go together")
    if options.client_ca and not options.certificate:
        raise InputError("--client-ca asks for certificates over TLS: give --certificate and --key, too")
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
    if options.replicas is not None:
        return _serve_replicas(options, listening, doors)
    loading = _loading(options)
    if options.registry is None and loading.is_team and int(os.environ["RANK"]):
        loading.follow(options.target, options.max_tokens)
        return 0
    # Loading takes seconds: requests meanwhile are told so, rather than refused a connection.
    service = _service(options, loading, doors)

    def announce(url: str) -> None:
        assert service.target is not None
        print(f"cloud-verifier: {service.target.version} on {url}", flush=True)

    uvloop.run(serve(service, listening, announce, options.grace))
    return 0


def _serve_replicas(options: argparse.Namespace, listening: Listening, doors: Doors) -> int:
    from cloud_verifier.replicas.fleet import Scaling, serve_replicas

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torchrun splits one target over several GPUs, --replicas has one whole target on each")
    device, _, number = options.device.partition(":")
    if number:
        raise InputError(f"--device {options.device}: Ray chooses each replica's GPU; give --device {device}")
    fewest, most = options.replicas
    cpus = max(1, options.threads)
    scaling = Scaling(fewest, most, options.replica_rounds, cpus, float(device == "cuda"), options.ray or "")
    # What a replica's process is told has to travel there.
    told = argparse.Namespace(**{name: value for name, value in vars(options).items() if not callable(value)})

    def announce(url: str) -> None:
        print(f"cloud-verifier: replicas of {options.target or options.registry} on {url}", flush=True)

    serve_replicas(
        functools.partial(_replica, told), scaling, _limits(options), listening, doors, announce, options.grace
    )
    return 0


def _replica(options: argparse.Namespace) -> Service:
    """The service of one replica, in its own process."""
    from cloud_verifier.engine.auth import Doors
    from edge_runtime.common import logs

    logs.set_up(options.log_level, "cloud-verifier", form=options.log_format)
    return _service(options, _loading(options), Doors(options.tokens))


def _service(options: argparse.Namespace, loading: Loading, doors: Doors) -> Service:
    """What serves, in this process."""
    from cloud_verifier.api.app import Service

    limits = _limits(options)
    if options.registry is not None:
        return _several(options, loading, limits, doors)
    return Service(
        lambda: loading.alone(options.target),
        limits,
        lambda target: _speculate(options, target),
        doors,
        window=options.batch_window / 1e3,
    )


def _limits(options: argparse.Namespace) -> VerifierLimits:
    from cloud_verifier.model.kv_cache import page_of
    from cloud_verifier.model.limits import VerifierLimits

    return VerifierLimits(
        max_sessions=options.max_sessions,
        max_tokens=options.max_tokens,
        idle_seconds=options.idle_seconds,
        max_queue_seconds=options.max_queue_seconds,
        page=page_of(options.device),
    )


def _several(options: argparse.Namespace, loading: Loading, limits: VerifierLimits, doors: Doors) -> Service:
    """A service of all versions of a registry."""
    from cloud_verifier.api.app import Service
    from cloud_verifier.engine.rollout import Patience, Rollout, load_default
    from cloud_verifier.registry.registry import Registry

    registry = Registry(options.registry)
    # A check gives way to those who are served.
    check_options = ["--device", options.device, "--dtype", options.dtype, "--threads", "1"]
    return Service(
        lambda: load_default(registry, loading.beside),
        limits,
        lambda target: _speculate(options, target),
        doors,
        lambda engine, sessions: Rollout(registry, engine, sessions, Patience(grace=options.retired_seconds)),
        check_options,
        loading.beside,
        options.batch_window / 1e3,
    )


def _loading(options: argparse.Namespace) -> Loading:
    """How targets are loaded. Raises InputError."""
    from cloud_verifier.model.loading import Loading

    loading = Loading(
        options.device, options.dtype, options.max_context, options.threads, options.exact, options.compile
    )
    loading.check()
    return loading


def _speculate(options: argparse.Namespace, target: Target) -> Speculation | None:
    from cloud_verifier.model.speculation import Speculation

    if options.draft is None:
        return None
    if not (options.draft / "draft.json").is_file():
        return Speculation(options.draft, target, options.draft_tokens, options.draft_threads, options.draft_rounds)
    # The one place where the verifier asks the export, which alone knows how a draft and its target are put together.
    from cloud_verifier.draft_models.checkpoint import load_draft
    from cloud_verifier.model import attention
    from cloud_verifier.model.torch_speculation import Drafting

    draft = load_draft(options.draft, target.base)
    draft.set_attn_implementation(attention.NAME)
    return Drafting(draft, target, options.draft_tokens, options.draft_rounds)
