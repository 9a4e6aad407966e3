"""`edge-runtime serve`: run the OpenAI-compatible service of this board."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.cli.draft_options import load_draft
from edge_runtime.cli.planner_options import (
    add_planner_options,
    add_planner_state_option,
    make_planner,
    open_planner_state,
    read_board_power,
    run_probes,
)
from edge_runtime.cli.settings_options import add_config_option, add_removed_options, add_settings, read_settings
from edge_runtime.cli.verifier_client import add_verifier_options
from edge_runtime.common import logs
from edge_runtime.common.options import add_option, whole_number
from edge_runtime.common.tasks import background_task
from edge_runtime.planning.plan import Planner
from edge_runtime.protocol.errors import BundleMissing
from edge_runtime.settings import Settings, state_directory

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    from edge_runtime.service.app import Service
    from edge_runtime.service.state import BoardRuntime

log = logging.getLogger(__name__)

HELP = "run the OpenAI-compatible service of this board"
DESCRIPTION = """\
Serves an OpenAI-compatible HTTP API on this board, with streaming: /v1/chat/completions, /v1/completions,
/v1/responses and /v1/models. The draft model runs here, the target model on a verifier. Also served: a page to chat
with (/), its events (/events), Prometheus metrics (/metrics), an OpenAPI document (/openapi.json) and readiness
(/readyz). `edge-runtime top` shows the live view of the page in a terminal, and `edge-runtime service` installs a
systemd service.

SIGHUP reloads the configuration; one with errors changes nothing.

examples:
  edge-runtime serve --verifier http://127.0.0.1:8500
  edge-runtime serve --host 0.0.0.0 --api-key-file keys --certificate board.pem --key board.key
  curl http://127.0.0.1:8400/v1/chat/completions -H 'content-type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64, "stream": true}'
  python -c 'import openai; c = openai.OpenAI(base_url="http://127.0.0.1:8400/v1", api_key="none"); \\
      print(c.completions.create(model="", prompt="The sea is", extra_body={"speculation": False}).choices[0].text)'
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_settings(parser, "draft.bundle", "draft.threads", "draft.prefix_cache_mib")
    add_config_option(parser)
    add_verifier_options(parser)
    add_removed_options(parser)

    listening = parser.add_argument_group("listening")
    add_settings(listening, "service.host", "service.port")
    add_option(listening, "--certificate FILE", "PEM certificate chain (default: no TLS, plain HTTP)", type=Path)
    add_option(listening, "--key FILE", "PEM private key of the certificate", type=Path)
    add_settings(listening, "service.api_key_file", "service.allowed_hosts", "service.cors_origins")

    add_settings(parser.add_argument_group("form of answers"), "service.tool_call_form", "service.reasoning_form")

    limits = parser.add_argument_group("limits")
    add_settings(limits, "service.max_concurrent", "service.max_waiting")
    add_settings(limits, "service.max_connections", "service.max_connections_per_address")
    text = "tokens per answer at most; 0 for what the context leaves"
    add_option(limits, "--max-new-tokens N", text, default=0)
    add_option(limits, "--max-body BYTES", "size of a request body at most", default=1 << 18, type=whole_number(1))
    add_option(limits, "--grace SECONDS", "time for running answers to finish after SIGTERM", default=10.0)
    add_settings(parser.add_argument_group("log"), "log.level", "log.prompts")
    add_planner_options(parser)
    add_planner_state_option(parser)
    parser.set_defaults(run=_run)


async def _run(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    from edge_runtime.cli.reload import ConfigurationReloader
    from edge_runtime.cli.serve_checks import check_serve, make_access
    from edge_runtime.common.connections import ConnectionLimits
    from edge_runtime.common.http_server import HttpServer, ListenOptions, watch_stop_signals
    from edge_runtime.common.memory import (
        accounts_for_services,
        freeze_objects,
        keep_releasing_memory,
        limit_heap_growth,
        limit_own_memory,
    )
    from edge_runtime.common.network import is_loopback
    from edge_runtime.common.sd_notify import Notifier
    from edge_runtime.service.app import Service
    from edge_runtime.verifier import LinkMonitor

    settings, limits, keys, client, bundle = check_serve(options, read_settings(options))
    if bundle is None:
        raise BundleMissing(
            f"no draft bundle is installed in {settings.draft.store}: run `edge-runtime bundle install FILE --store "
            f"{settings.draft.store}`, or name a bundle with --bundle"
        )
    host, port = settings.service.host, settings.service.port
    logs.configure(settings.log.level, "edge-runtime", prompts=settings.log.prompts)
    # systemd's watchdog ends a process that hangs with SIGABRT: print every thread's stack then.
    faulthandler.enable(2)
    limit_heap_growth()
    local = is_loopback(host)
    if not local and not keys:
        log.warning(
            "everyone who can reach %s can use this service and read what others ask; --api-key-file requires keys",
            host,
        )
    stop, notifier = watch_stop_signals(), Notifier()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(client)
        access = make_access(settings.service, keys)
        models_file = state_directory(os.environ) / "models.json"
        service = Service(client, limits, access, models_file=models_file)
        reloader = ConfigurationReloader(options, settings, bundle, service, notifier)
        bounds = ConnectionLimits(settings.service.max_connections, settings.service.max_connections_per_address)
        listening = ListenOptions(host, port, options.certificate, options.key, connections=bounds)
        server = HttpServer(service.app, listening)
        await server.start()
        stack.push_async_callback(server.stop)
        notifier.starting("loading the draft")
        # Loading takes seconds. The server already listens, so that requests get a proper "not ready" answer.
        board = await _load_board(options, settings, bundle, service, stack)
        freeze_objects()
        if notifier.enabled and not accounts_for_services():
            log.info("the kernel does not account for memory: bounded to %d MB by itself", limit_own_memory() >> 20)
        if not stop.is_set():
            print(f"edge-runtime: verifier {', '.join(settings.verifier.urls)}; listening on {server.url}", flush=True)
            notifier.ready(reloader.status())
        feeding = notifier.run(reloader.status, lambda: board.draft.step_seconds, reloader.errno)
        for coroutine in (feeding, reloader.run(board), LinkMonitor(client).run(), keep_releasing_memory()):
            await stack.enter_async_context(background_task(coroutine))
        await stop.wait()
        notifier.stopping("waiting for running answers")
        await service.drain(options.grace)
    return 0


async def _load_board(
    options: argparse.Namespace, settings: Settings, bundle: Path, service: Service, stack: contextlib.AsyncExitStack
) -> BoardRuntime:
    """Load the draft and everything else that answers need, and activate the service."""
    from edge_runtime.protocol.bundle import read_bundle, read_chat_format
    from edge_runtime.service.chat_template import ChatTemplate
    from edge_runtime.service.state import BoardRuntime

    draft = await asyncio.to_thread(load_draft, bundle, settings)
    chat = await asyncio.to_thread(lambda: read_chat_format(read_bundle(bundle, verify=False)))
    chat_template = ChatTemplate(chat, bundle)
    if chat_template.is_plain:
        log.warning(
            "the bundle %s has no chat template: chats are written as plain text, `User: ... Assistant:`; if the "
            "target has one, export the bundle again",
            bundle,
        )
    planner = await asyncio.to_thread(make_planner, options, settings.planner, draft)
    planner_state = open_planner_state(settings.planner, draft.manifest)
    planner_state.restore(planner)
    board = BoardRuntime(
        draft,
        chat_template,
        planner=planner,
        surroundings=await stack.enter_async_context(run_probes(service.client.meter, settings.planner)),
        model=settings.verifier.model,
        power=read_board_power(settings.planner),
        on_link_loss=settings.service.on_link_loss,
        tool_call_form=settings.service.tool_call_form,
        reasoning_form=settings.service.reasoning_form,
        sampling=chat.sampling,
    )
    service.activate(board)

    def current_planner() -> Planner:
        """Return the planner in use, which a reload may have replaced."""
        return (service.state.board or board).planner

    stack.callback(lambda: planner_state.save(current_planner()))
    await stack.enter_async_context(background_task(planner_state.keep_saving(current_planner)))
    return board
