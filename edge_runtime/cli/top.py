"""`edge-runtime top`: what a board does, live in a terminal or as JSON, from the service's own feed."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.protocol.errors import FlexSpecError, InputError

# Every command of `edge-runtime` adds this parser; only this one should pay for what it needs.
if TYPE_CHECKING:
    import httpx

    from edge_runtime.service.monitoring.dashboard_state import Onlooker
    from edge_runtime.service.monitoring.events import News

DESCRIPTION = """\
Watches the service of this board, or of another: tokens as they come, plans and their reasons, rounds, link, energy.
The same as the dashboard, which the service serves at its URL.

examples:
  edge-runtime top                                         # live, until ^C
  edge-runtime top --url https://board.example:8400 --api-key-file key --ca-file board.pem
  edge-runtime top --once --json | jq .rates.acceptance
  edge-runtime top --json | jq -c 'select(.type == "planned")'
"""

CONNECT_SECONDS = 5.0
# The feed says something at least every 15 seconds.
READ_SECONDS = 20.0
RETRY_SECONDS = 1.0
# For the first gauges of a service that has just begun.
LOOK_SECONDS = 3.0


class ServiceUnreachable(FlexSpecError):
    """No service answers, or not as one."""

    exit_code = 4


def add_parser(commands: Any) -> None:
    """Adds `top` to argparse's sub-parsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "top",
        help="watch what a board does, live",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8400", help="of the service (default: %(default)s)")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="of one of the keys that the service asks for"
    )
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="PEM authorities to trust instead of the system's")
    parser.add_argument("--once", action="store_true", help="one look (the default without a terminal)")
    parser.add_argument(
        "--json", action="store_true", help="print every event as a line of JSON; with --once, one object that sums up"
    )
    parser.set_defaults(run=top)


async def top(options: argparse.Namespace) -> int:
    """Runs the command. Returns the exit code; raises FlexSpecError."""
    from edge_runtime.service.monitoring.dashboard_state import Onlooker

    async with _client(options) as client:
        if options.json and not options.once:
            async for line, _ in _events(client, options.url):
                print(line, flush=True)
            raise ServiceUnreachable(f"the service at {options.url} has closed the stream; it may have been stopped")
        onlooker = Onlooker()
        if options.once or not sys.stdout.isatty():
            await _look(client, options, onlooker)
        else:
            await _watch(client, options, onlooker)
    return 0


async def _look(client: httpx.AsyncClient, options: argparse.Namespace, onlooker: Onlooker) -> None:
    import msgspec
    from rich.console import Console

    from edge_runtime.cli.top_view import screen
    from edge_runtime.service.monitoring.events import Gauges

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CONNECT_SECONDS + LOOK_SECONDS):
            started = time.time()
            async for _, event in _events(client, options.url):
                onlooker.hear(event)
                # The board's clock may be another: after a while, any gauges will do.
                if isinstance(event, Gauges) and (event.at >= started or time.time() > started + LOOK_SECONDS):
                    break
    if options.json:
        print(msgspec.json.encode(onlooker.summary()).decode())
    else:
        Console().print(screen(onlooker, "live" if onlooker.gauges else "loading the draft"))


async def _watch(client: httpx.AsyncClient, options: argparse.Namespace, onlooker: Onlooker) -> None:
    from rich.console import Console
    from rich.live import Live

    from edge_runtime.cli.top_view import screen

    # Refused at first, this ends with a sentence; later, the service may come back.
    state, met = "connecting", False
    console = Console()
    with Live(console=console, screen=True, refresh_per_second=8, get_renderable=lambda: screen(onlooker, state)):
        while True:
            try:
                async for _, event in _events(client, options.url):
                    onlooker.hear(event)
                    met = True
                    state = "live" if onlooker.gauges else "loading the draft"
                state = "the service has closed the stream; trying again"
            except ServiceUnreachable as error:
                if not met:
                    raise
                state = str(error)
            await asyncio.sleep(RETRY_SECONDS)


def _client(options: argparse.Namespace) -> httpx.AsyncClient:
    """Raises InputError: the URL, the key or the authorities are unusable, or the key would travel in clear."""
    import ssl

    import httpx

    from edge_runtime.settings.validators import is_in_clear, read_secret

    key = read_secret(options.api_key_file) if options.api_key_file else ""
    try:
        url = httpx.URL(options.url)
    except httpx.InvalidURL as error:
        raise InputError(f"--url {options.url}: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"--url {options.url}: not the URL of a service; write for instance http://127.0.0.1:8400")
    if key and is_in_clear(options.url):
        raise InputError(f"the key would go to {options.url} unencrypted; serve with --certificate, and use https")
    trust: ssl.SSLContext | bool = True
    if options.ca_file:
        try:
            trust = ssl.create_default_context(cafile=options.ca_file)
        except OSError as error:
            raise InputError(f"cannot trust the authorities in {options.ca_file}: {error}") from None
    return httpx.AsyncClient(
        verify=trust,
        headers={"authorization": f"Bearer {key}"} if key else None,
        timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
    )


async def _events(client: httpx.AsyncClient, url: str) -> AsyncIterator[tuple[str, News]]:
    """Each event, as JSON and as a struct. Raises ServiceUnreachable and InputError."""
    import httpx
    import msgspec

    from edge_runtime.service.monitoring.events import AnyNews

    decoder = msgspec.json.Decoder(AnyNews)
    try:
        async with client.stream("GET", url.rstrip("/") + "/events") as response:
            if not response.is_success:
                raise _refused(url, response.status_code, await response.aread())
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise ServiceUnreachable(f"what answers at {url} is no service of a board; check --url")
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    event = line.removeprefix("data: ")
                    yield event, decoder.decode(event)
    except httpx.TransportError as error:
        cause = str(error) or type(error).__name__
        raise ServiceUnreachable(f"no service answers at {url} ({cause}); is `edge-runtime serve` running?") from None
    except msgspec.MsgspecError as error:
        raise ServiceUnreachable(f"the service at {url} says what this version does not know: {error}") from None


def _refused(url: str, status: int, body: bytes) -> FlexSpecError:
    import msgspec

    from edge_runtime.service.errors import ErrorBody

    if status == 401:
        return InputError(f"the service at {url} wants one of its API keys: name a file of it with --api-key-file")
    try:
        message = msgspec.json.decode(body, type=ErrorBody).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError):
        message = "and not as a service of a board does; check --url"
    return ServiceUnreachable(f"{url} answered {status}: {message}")
