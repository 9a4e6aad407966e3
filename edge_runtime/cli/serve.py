"""`edge-runtime serve`: any OpenAI client on or beside the board can ask the target."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import faulthandler
import logging
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cli import memory, planner_options, verifier_options
from edge_runtime.common import logs
from edge_runtime.protocol.errors import InputError

# Every command of `edge-runtime` adds this parser; only this one should pay for what it needs.
if TYPE_CHECKING:
    from edge_runtime.service.app import Service
    from edge_runtime.service.state import Board
    from edge_runtime.verifier.client import VerifierClient

log = logging.getLogger(__name__)

# Of malloc.h; and from how many bytes on memory is given back, and taken by itself.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, MAPPED_BYTES = 1 << 17, 1 << 16

DESCRIPTION = """\
Serves OpenAI's HTTP interface on this board: /v1/completions, /v1/chat/completions and /v1/models, with streaming. The
draft runs here, the target in the cloud. Prometheus finds /metrics, programs /openapi.json, watchdogs /readyz. SIGHUP
has it read the configuration again. `edge-runtime service` has systemd run it.

At its URL is a dashboard for browsers; `edge-runtime top` shows the same in a terminal, and /events tells programs.

examples:
  edge-runtime serve --verifier https://verifier.example
  edge-runtime serve --host 0.0.0.0 --api-key-file keys --certificate board.pem --key board.key
  curl http://127.0.0.1:8400/v1/completions -H 'content-type: application/json' \\
      -d '{"prompt": "import os", "max_tokens": 32, "stream": true}'
  python -c 'import openai; c = openai.OpenAI(base_url="http://127.0.0.1:8400/v1", api_key="none"); \\
      print(c.completions.create(model="", prompt="import os", extra_body={"speculation": False}).choices[0].text)'
"""


def add_parser(commands: Any, bundle: Path) -> None:
    """Adds `serve` to argparse's sub-parsers; `bundle` is the draft where none is named."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve OpenAI's HTTP interface on this board",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, default=bundle, metavar="DIR", help="draft (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the draft (default: one per core, to 4)")
    verifier_options.add_options(parser)
    memory.add_options(parser, memory.state_directory())

    listening = parser.add_argument_group("listening")
    listening.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    listening.add_argument("--port", type=int, default=8400, help="0 picks a free one (default: %(default)s)")
    listening.add_argument("--certificate", type=Path, metavar="FILE", help="PEM certificate chain: serve over TLS")
    listening.add_argument("--key", type=Path, metavar="FILE", help="PEM private key of the certificate")
    listening.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="serve only who presents one of these keys, one a line"
    )

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-concurrent",
        type=int,
        default=2,
        metavar="N",
        help="answers that are written at once; each takes memory (default: %(default)s)",
    )
    limits.add_argument(
        "--max-waiting",
        type=int,
        default=8,
        metavar="N",
        help="requests that wait for that; more are told to come back (default: %(default)s)",
    )
    limits.add_argument(
        "--max-new-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of an answer; also what a request gets that names no max_tokens (default: %(default)s)",
    )
    limits.add_argument(
        "--max-body", type=int, default=1 << 18, metavar="BYTES", help="of a request (default: %(default)s)"
    )
    limits.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="for answers to end at SIGTERM (default: %(default)g)",
    )
    logging_ = parser.add_argument_group("log")
    logging_.add_argument("--log-level", choices=logs.LEVELS, default="info", help="default: %(default)s")
    logging_.add_argument("--log-prompts", action="store_true", help="prompts and answers, too")
    planner_options.add_options(parser)
    parser.set_defaults(run=serve)


async def serve(options: argparse.Namespace) -> int:
    """Runs the command until SIGINT or SIGTERM. Returns the exit code; raises FlexSpecError."""
    from edge_runtime.cli.reload import Reloading
    from edge_runtime.cli.serve_limits import keys_of, limits_of
    from edge_runtime.common.http_server import Listening, Server, stop_requested
    from edge_runtime.common.sd_notify import Notifier
    from edge_runtime.service.app import Service
    from edge_runtime.settings.validators import is_loopback
    from edge_runtime.verifier.client import VerifierClient

    logs.set_up(options.log_level, "edge-runtime", prompts=options.log_prompts)
    # A watchdog ends a process that hangs with SIGABRT: then it says where.
    faulthandler.enable(2)
    _return_memory()
    limits, keys = limits_of(options), keys_of(options)
    if not 0 <= options.port < 1 << 16:
        raise InputError(f"--port {options.port}: must be in [0, 65535]")
    if bool(options.certificate) != bool(options.key):
        raise InputError("--certificate and --key go together")
    local = is_loopback(options.host)
    if not local and not keys:
        log.warning(
            "everybody who reaches %s can use this service, and read what others ask it: --api-key-file asks for keys",
            options.host,
        )
    stopping, notifier = stop_requested(), Notifier()
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(VerifierClient(**verifier_options.client_arguments(options)))
        service = Service(client, limits, keys, local=local)
        reloading = Reloading(options, service, client, notifier)
        server = Server(service.app, Listening(options.host, options.port, options.certificate, options.key))
        await server.start()
        stack.push_async_callback(server.stop)
        notifier.starting("loading the draft")
        # Loading takes a while: requests meanwhile are told so, rather than refused a connection.
        board = await _load(options, service, client, stack)
        if not stopping.is_set():
            print(f"edge-runtime: serving {options.verifier} on {server.url}", flush=True)
            notifier.ready(reloading.status())
        telling = notifier.keep_telling(reloading.status, lambda: board.draft.step_seconds)
        stack.enter_context(_beside(telling))
        stack.enter_context(_beside(reloading.run(board)))
        await stopping.wait()
        notifier.stopping("answers that are being written may end")
        await service.drain(options.grace)
    return 0


def _return_memory() -> None:
    """Has glibc give freed memory back: answers free much, and its own thresholds, which grow, would keep it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


async def _load(
    options: argparse.Namespace, service: Service, client: VerifierClient, stack: contextlib.AsyncExitStack
) -> Board:
    """Loads the draft, and opens the service."""
    from edge_runtime.cli.serve_limits import check_memory
    from edge_runtime.draft.model import OnnxDraft
    from edge_runtime.service.chat_template import read_chat
    from edge_runtime.service.state import Board

    draft = await asyncio.to_thread(OnnxDraft.load, options.bundle, threads=options.threads)
    check_memory(draft.manifest, options.max_concurrent)
    chat = read_chat(options.bundle)
    planner = await asyncio.to_thread(planner_options.planner_of, options, draft)
    surroundings = await stack.enter_async_context(planner_options.watching(client.meter))
    power = planner_options.power_of(options)
    remembered = await asyncio.to_thread(memory.memory_of, options, draft.manifest)
    board = Board(draft, chat, planner, surroundings, options.model, power, options.on_link_loss, remembered)
    service.open(board)
    return board


@contextlib.contextmanager
def _beside(work: Coroutine[None, None, None]) -> Iterator[None]:
    """Runs `work` on the event loop until the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
