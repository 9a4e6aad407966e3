"""`cloud-verifier serve`: serves one target, or all versions of a registry, over HTTP."""

from __future__ import annotations

import argparse
import faulthandler
import functools
import importlib.util
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud_verifier.cli import gpu_processes
from cloud_verifier.registry.catalog import NAME
from edge_runtime.common.connections import DEFAULT_CONNECTIONS, ConnectionLimits
from edge_runtime.common.credentials import find_credential
from edge_runtime.common.network import check_ca_file, check_host_name, is_loopback
from edge_runtime.common.options import add_option, number, whole_number
from edge_runtime.common.program import killed_by_sigint
from edge_runtime.common.terminal import print_note
from edge_runtime.protocol.errors import InputError

# Imports that need the extras are inside the functions; see `cli.main`.
if TYPE_CHECKING:
    from cloud_verifier.api.app import VerifierService
    from cloud_verifier.engine.auth import Authenticator
    from cloud_verifier.model.limits import VerifierLimits
    from cloud_verifier.model.loading import TargetLoader
    from cloud_verifier.model.speculation import Speculation
    from cloud_verifier.model.target import Target
    from edge_runtime.common.http_server import ListenOptions

log = logging.getLogger(__name__)

# Chosen: more than a machine has cores.
MAX_THREADS = 1024

DESCRIPTION = """\
Verifies what boards draft, and generates with a target, over HTTP: one target, or every version in a registry. Rounds
of all boards share forwards. Ready once it prints its address; until then requests get 503 `starting`. SIGHUP rereads
tokens and certificate, SIGTERM lets running rounds end.

examples:
  cloud-verifier serve family/target-v1 --draft family/bundle            # speculate here too, with that draft
  cloud-verifier serve /srv/models/Llama-3.1-8B --device cuda --dtype bfloat16 --host 0.0.0.0 \\
      --certificate server.pem --key server.key --tokens tokens.toml
  cloud-verifier serve --registry /var/lib/flexspec-verifier/targets     # see `cloud-verifier targets --help`
  curl http://127.0.0.1:8500/v1/models
"""


def add_parser(commands: Any, model_options: argparse.ArgumentParser) -> None:
    """Add `serve` to argparse's subparsers. `model_options` has the options of how targets are loaded."""
    serve = commands.add_parser(
        "serve",
        parents=[model_options],
        help="serve a target, or several, over HTTP",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "target",
        type=Path,
        nargs="?",
        metavar="TARGET",
        help="directory of a Hugging Face checkpoint or a PEFT adapter, or a GGUF file; alternatively --registry",
    )
    option = functools.partial(add_option, serve)
    text = "serve every version in this registry, and apply its changes (see `cloud-verifier targets`)"
    option("--registry DIR", text, type=Path)
    text = "close the sessions of a retired version after this time"
    option("--retired-seconds SECONDS", text, default=3600.0, type=number(0, 3600))
    text = "name of TARGET, as boards request it and versions show it (default: that of its directory)"
    option("--name NAME", text, type=_name)
    option("--host", "address to listen on", default="127.0.0.1")
    option("--port", "0 picks a free port", default=8500, type=whole_number(0, 65535))
    option("--http", "HTTP version", default="auto", choices=["auto", "1", "2"])
    for name, text in (
        ("certificate", "PEM certificate chain: serve over TLS"),
        ("key", "PEM private key of the certificate"),
        ("client-ca", "PEM certificate authorities: require a client certificate signed by one of them"),
    ):
        credential = name if name == "client-ca" else f"tls-{name}"
        serve.add_argument(
            f"--{name}",
            type=Path,
            default=find_credential(credential),
            metavar="FILE",
            help=f"{text} (default: systemd's credential {credential}, if there is one)",
        )
    serve.add_argument(
        "--tokens",
        type=Path,
        default=find_credential("verifier-tokens"),
        metavar="FILE",
        help="require a token from this file, see `cloud-verifier token --help`; reread at SIGHUP "
        "(default: systemd's credential verifier-tokens, else no token is required)",
    )
    text = "how long a forward waits for boards that are about to send a round; 0: not at all"
    option("--batch-window MS", text, default=2.0, type=number(0, 1000))
    text = (
        "on CUDA: let torch fuse layers, which makes rounds a third faster; takes a while at the first start, after "
        "that the code is in the cache (default: on CUDA, but not with --gpus; layers that cannot be compiled, or "
        "then compute something else, run as they are)"
    )
    serve.add_argument("--compile", action=argparse.BooleanOptionalAction, help=text)
    text = (
        "on CUDA: keep keys and values in fp8, for half the memory of 16 bits; texts are then those of the target with "
        "these, whose version ends with -kv-fp8; comes with --exact"
    )
    option("--kv-cache-dtype DTYPE", text, choices=("fp8",))
    text = (
        "on CUDA in 16 bits: make every text independent of the batch it was computed in, even in a near tie; "
        "costs a single board about 15 %% per round"
    )
    serve.add_argument("--exact", action="store_true", help=text)
    text = (
        "further names under which a verifier without tokens that listens on loopback answers, for instance behind a "
        "proxy (default: localhost and the machine's own name, also with .local)"
    )
    option("--allowed-hosts NAME[,NAME...]", text, type=_host_names)
    text = (
        "connections at once; when there are more, the address with most of them loses the one that has been idle for "
        "longest"
    )
    option("--max-connections N", text, default=DEFAULT_CONNECTIONS.total, type=whole_number(1))
    text = (
        "connections from one IPv4 address or IPv6 /64 network, this machine excepted; 0 for no limit of its own, for "
        "instance behind a proxy on another machine"
    )
    option("--max-connections-per-address N", text, default=DEFAULT_CONNECTIONS.per_address, type=whole_number())
    option("--max-body BYTES", "size of a request body", default=1 << 20, type=whole_number(1))
    option("--max-sessions", "concurrent sessions", default=256, type=whole_number(1))
    text = (
        "KV cache capacity in tokens, all sessions together (default, printed at start: what the GPU's free memory has "
        "room for; on a CPU half of the available memory, at most 262,144; with --gpus 262,144)"
    )
    option("--max-tokens N", text, type=whole_number(1))
    text = "prefill every prompt as a whole, instead of reusing the KV caches of the same token's earlier sessions"
    serve.add_argument("--no-prefix-cache", action="store_true", help=text)
    text = "evict sessions, and on a CPU cached prefixes, that have been unused for longer, and free their memory"
    option("--idle-seconds SECONDS", text, default=600.0)
    text = "refuse new rounds while one has waited longer for its first token"
    option("--max-queue-seconds SECONDS", text, default=3.0, type=number(0, 3600))
    text = "at SIGTERM, let rounds in progress run this long while new ones are refused"
    option("--grace SECONDS", text, default=10.0, type=number(0, 3600))
    text = (
        "speculate on the server too: draft the target's own tokens with this bundle, on the CPU, or with this draft "
        "checkpoint (a directory with draft.json), on the target's device"
    )
    option("--draft DRAFT", text, type=Path)
    text = (
        "most tokens to draft per forward; fewer where the draft is unsure, and none where measured times and "
        "acceptance say that they cost more than they save"
    )
    option("--draft-tokens K", text, default=12, type=whole_number(1))
    text = "CPU threads of the draft (default: one per core, at most 4)"
    serve.add_argument("--draft-threads", type=whole_number(0, MAX_THREADS), default=0, metavar="N", help=text)
    text = "leave drafting to the boards while more than N rounds are running"
    option("--draft-rounds N", text, default=4, type=whole_number(1))
    text = "split the target over N GPUs of this machine (tensor parallelism), with a process for each"
    option("--gpus N", text, default=1, type=whole_number(1))
    scale = serve.add_argument_group("replicas, with Ray Serve")
    text = (
        "number of replicas, or a range that is scaled with the load; each has its own copy of the target (and its own "
        "GPU with --device cuda), and all limits apply per replica"
    )
    add_option(scale, "--replicas MIN[-MAX]", text, type=_replica_range)
    text = "target number of rounds per replica, waiting ones included, for scaling"
    add_option(scale, "--replica-rounds N", text, default=16, type=whole_number(1))
    text = (
        "address of a Ray cluster, or auto; its machines need FlexSpec and TARGET at the same paths "
        "(default: start a cluster on this machine)"
    )
    add_option(scale, "--ray ADDRESS", text)
    serve.set_defaults(run=_serve)


def _host_names(text: str) -> list[str]:
    try:
        return [check_host_name(name) for name in text.split(",")]
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: use up to 80 letters, digits, dots and dashes")
    return text


def _replica_range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    minimum, maximum = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= minimum <= maximum:
        raise argparse.ArgumentTypeError(f"{text} is neither a number of replicas, such as 2, nor a range, such as 1-8")
    return minimum, maximum


def _serve(options: argparse.Namespace) -> int:
    # Checked first, so that the error names the extra for replicas. Not imported: Ray reads its environment variables
    # when it is imported, and `serve_replicas` sets them.
    if options.replicas is not None and importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")
    with killed_by_sigint():
        import uvloop

        from cloud_verifier.api.server import serve
        from cloud_verifier.engine.auth import Authenticator
        from edge_runtime.common.http_server import ListenOptions

    # The watchdog ends a hanging process with SIGABRT; this prints the stacks of its threads.
    faulthandler.enable(2)
    if (options.target is None) == (options.registry is None):
        raise InputError("give a TARGET to serve, or --registry DIR for all versions of a registry")
    if options.name and options.registry:
        raise InputError("--name is for a TARGET; the versions of a registry have their names")
    if options.quantize and options.registry:
        raise InputError("--quantize is for a TARGET; a registry's versions are as in their files, quantized or not")
    if options.kv_cache_dtype and options.registry:
        raise InputError("--kv-cache-dtype is for a TARGET; a registry's versions have caches of their own dtype")
    if options.gpus > 1 and not options.device.startswith("cuda"):
        raise InputError("--gpus splits a target over GPUs: give --device cuda")
    if options.gpus > 1 and (options.registry or options.replicas):
        raise InputError("--gpus is for a single TARGET, neither for a registry's versions nor for replicas")
    if bool(options.certificate) != bool(options.key):
        raise InputError("--certificate and --key must be given together")
    if options.client_ca and not options.certificate:
        raise InputError("--client-ca requires TLS: give --certificate and --key too")
    client_ca = check_ca_file(options.client_ca) if options.client_ca else None
    listening = ListenOptions(
        host=options.host,
        port=options.port,
        certificate=options.certificate,
        key=options.key,
        http=options.http,
        client_ca=client_ca,
        connections=ConnectionLimits(options.max_connections, options.max_connections_per_address),
        allowed_hosts=tuple(options.allowed_hosts or ()),
    )
    authenticator = Authenticator(options.tokens)
    if options.replicas is not None:
        _warn_of_access(options, authenticator)
        return _serve_replicas(options, listening, authenticator)
    loader = _target_loader(options)
    if options.gpus > 1 and not loader.is_tensor_parallel:
        return gpu_processes.run_group([sys.executable, "-m", "cloud_verifier.cli", *sys.argv[1:]], options.gpus)
    if options.registry is None and loader.is_tensor_parallel and int(os.environ["RANK"]):
        gpu_processes.ignore_signals()
        loader.follow_leader(options.target, _limits(options).max_tokens)
        return 0
    # In a tensor-parallel group, only by the process that serves.
    _warn_of_access(options, authenticator)
    # The service answers while the target loads: clients get `starting` instead of a refused connection.
    service = _build_service(options, loader, authenticator)

    def announce(url: str) -> None:
        assert service.target is not None
        print(f"cloud-verifier: {service.target.version} on {url}", flush=True)
        if options.max_tokens is None:
            tokens, size = service.sessions.max_tokens, service.target.runner.shape.bytes_per_token
            print(f"cloud-verifier: KV cache of at most {tokens} tokens, {tokens * size / 2**30:.2f} GiB", flush=True)

    if sys.stderr.isatty():
        print_note(f"cloud-verifier: loading {options.target or options.registry}")
    uvloop.run(serve(service, listening, announce, options.grace))
    return 0


def _warn_of_access(options: argparse.Namespace, authenticator: Authenticator) -> None:
    """Say in the log who can use the verifier, and read what is sent to it, if that may not be meant."""
    if not is_loopback(options.host):
        if options.tokens is None and options.client_ca is None:
            log.warning("anyone who can reach %s can use this verifier: --tokens requires tokens", options.host)
        if options.certificate is None:
            log.warning(
                "prompts and tokens are sent to %s unencrypted: give --certificate and --key, unless a proxy in front "
                "of it terminates TLS",
                options.host,
            )
    if options.tokens and not len(authenticator):
        log.warning("%s has no tokens, so every request is refused", options.tokens)


def _serve_replicas(options: argparse.Namespace, listening: ListenOptions, authenticator: Authenticator) -> int:
    from cloud_verifier.replicas.deployment import ScalingOptions, serve_replicas

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torchrun splits one target over several GPUs; --replicas puts a whole target on each")
    device, _, number = options.device.partition(":")
    if number:
        raise InputError(f"--device {options.device}: Ray chooses the GPU of each replica; give --device {device}")
    minimum, maximum = options.replicas
    scaling = ScalingOptions(
        min_replicas=minimum,
        max_replicas=maximum,
        target_rounds=options.replica_rounds,
        cpus=max(1, options.threads),
        gpus=float(device == "cuda"),
        cluster=options.ray or "",
    )
    # The options are pickled and sent to the replicas; the callables that argparse adds are not needed there.
    replica_options = argparse.Namespace(
        **{name: value for name, value in vars(options).items() if not callable(value)}
    )

    def announce(url: str) -> None:
        print(f"cloud-verifier: replicas of {options.target or options.registry} on {url}", flush=True)

    serve_replicas(
        functools.partial(_build_replica, replica_options),
        scaling=scaling,
        limits=_limits(options),
        listening=listening,
        authenticator=authenticator,
        announce=announce,
        grace=options.grace,
    )
    return 0


def _build_replica(options: argparse.Namespace) -> VerifierService:
    """Build the service of one replica, in its own process."""
    from cloud_verifier.engine.auth import Authenticator
    from edge_runtime.common import logs

    logs.configure(options.log_level, "cloud-verifier", form=options.log_format)
    return _build_service(options, _target_loader(options), Authenticator(options.tokens))


def _build_service(options: argparse.Namespace, loader: TargetLoader, authenticator: Authenticator) -> VerifierService:
    """Build the service of one target, or of all versions of a registry."""
    from cloud_verifier.api.app import VerifierService
    from cloud_verifier.engine.rollout import RetirementPolicy, Rollout, load_default_target
    from cloud_verifier.registry.registry import Registry

    registry = Registry(options.registry) if options.registry is not None else None
    policy = RetirementPolicy(grace_seconds=options.retired_seconds)

    def load_target() -> Target:
        return load_default_target(registry, loader.load_version) if registry else loader.load_single(options.target)

    return VerifierService(
        load_target,
        _limits(options),
        load_speculation=functools.partial(_load_speculation, options),
        authenticator=authenticator,
        make_rollout=(lambda scheduler, sessions: Rollout(registry, scheduler, sessions, policy)) if registry else None,
        # One thread: a check must not slow the verifier down.
        check_options=["--device", options.device, "--dtype", options.dtype, "--threads", "1"],
        target_factory=loader.load_version,
        window=options.batch_window / 1e3,
        reuse_prefixes=not options.no_prefix_cache,
    )


def _limits(options: argparse.Namespace) -> VerifierLimits:
    from cloud_verifier.model.kv_cache import CACHE_TOKENS, allocation_granularity
    from cloud_verifier.model.limits import VerifierLimits

    # The followers of a tensor-parallel group have as many as the leader.
    max_tokens = options.max_tokens or (CACHE_TOKENS if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0)
    return VerifierLimits(
        max_sessions=options.max_sessions,
        max_tokens=max_tokens,
        max_body=options.max_body,
        idle_seconds=options.idle_seconds,
        max_queue_seconds=options.max_queue_seconds,
        page=allocation_granularity(options.device),
    )


def _target_loader(options: argparse.Namespace) -> TargetLoader:
    """Raises InputError if this machine cannot load targets with these options."""
    from cloud_verifier.model.loading import TargetLoader

    loader = TargetLoader(
        device=options.device,
        dtype=options.dtype,
        context=options.max_context,
        threads=options.threads,
        name=options.name or "",
        exact=options.exact,
        compiled=options.compile,
        quantize=options.quantize or "",
        cache_format=options.kv_cache_dtype or "",
    )
    loader.validate()
    return loader


def _load_speculation(options: argparse.Namespace, target: Target) -> Speculation | None:
    """Load the draft of --draft: a bundle runs on the CPU, a draft checkpoint on the target's device."""
    if options.draft is None:
        return None
    if not (options.draft / "draft.json").is_file():
        from cloud_verifier.model.onnx_speculation import OnnxSpeculation
        from edge_runtime.draft import DEFAULT_PREFIX_CACHE_BYTES

        return OnnxSpeculation(
            options.draft,
            target,
            max_draft_tokens=options.draft_tokens,
            threads=options.draft_threads,
            max_rounds=options.draft_rounds,
            prefix_cache_bytes=0 if options.no_prefix_cache else DEFAULT_PREFIX_CACHE_BYTES,
        )
    from cloud_verifier.draft_models.checkpoint import load_draft
    from cloud_verifier.model.torch_speculation import TorchSpeculation

    draft = load_draft(options.draft, target.base)
    return TorchSpeculation(draft, target, max_draft_tokens=options.draft_tokens, max_rounds=options.draft_rounds)
