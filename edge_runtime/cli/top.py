"""`edge-runtime top`: watch a board's service, live in a terminal or as JSON, from its GET /events."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.common.http_client import UNCOMPRESSED, UnusableAnswer, read_answer, read_lines
from edge_runtime.common.options import add_flag, add_option
from edge_runtime.common.terminal import Escaped, escape_json, new_console
from edge_runtime.protocol.errors import FlexSpecError, InputError

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    import httpx

    from edge_runtime.service.monitoring.dashboard_state import DashboardState
    from edge_runtime.service.monitoring.events import Event

HELP = "watch a board's service, live"
DESCRIPTION = """\
Watches the service of this board or another: tokens as they arrive, plans and their reasons, rounds, link, energy. The
page that the service has at its URL shows the same in a browser, beside a chat. q quits.

examples:
  edge-runtime top                                         # live, until q
  edge-runtime top --url https://board.example:8400 --api-key-file key --ca-file board.pem
  edge-runtime top --once --json | jq .rates.acceptance
  edge-runtime top --json | jq -c 'select(.type == "planned")'
"""

CONNECT_SECONDS = 5.0
# The service sends an event or a comment at least every 15 seconds.
READ_SECONDS = 20.0
RETRY_SECONDS = 1.0
# How long --once waits for the gauges of a service that has just started.
ONCE_SECONDS = 3.0


class ServiceUnreachable(FlexSpecError):
    """No service answers at the URL, or something else does."""

    exit_code = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_option(parser, "--url", "URL of the service", default="http://127.0.0.1:8400")
    text = "file with one of the service's API keys (default: no key)"
    add_option(parser, "--api-key-file FILE", text, type=Path)
    text = "PEM file of certificate authorities to trust (default: the system's)"
    add_option(parser, "--ca-file FILE", text, type=Path)
    add_flag(parser, "--once", "print the current state and exit (default without a terminal)")
    add_flag(parser, "--json", "print every event as a line of JSON; with --once, a summary as one object")
    parser.set_defaults(run=_run)


async def _run(options: argparse.Namespace) -> int:
    from edge_runtime.service.monitoring.dashboard_state import DashboardState

    async with _client(options) as client:
        if options.json and not options.once:
            async for line, _ in _events(client, options.url):
                print(escape_json(line), flush=True)
            raise ServiceUnreachable(f"the service at {options.url} has closed the stream; it may have been stopped")
        dashboard = DashboardState()
        if options.once or not sys.stdout.isatty():
            await _print_once(client, options, dashboard)
        else:
            await _watch(client, options, dashboard)
    return 0


async def _print_once(client: httpx.AsyncClient, options: argparse.Namespace, dashboard: DashboardState) -> None:
    import msgspec

    from edge_runtime.cli.top_view import DashboardView
    from edge_runtime.service.monitoring.events import GaugeSample
    from edge_runtime.service.monitoring.words import load_words

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CONNECT_SECONDS + ONCE_SECONDS):
            started = time.time()
            async for _, event in _events(client, options.url):
                dashboard.apply(event)
                # A remote board's clock may differ from ours: after ONCE_SECONDS, accept any gauges.
                if isinstance(event, GaugeSample) and (event.at >= started or time.time() > started + ONCE_SECONDS):
                    break
    if options.json:
        print(escape_json(msgspec.json.encode(dashboard.summary()).decode()))
    else:
        state = load_words().states["live" if dashboard.gauges else "loading"]
        new_console().print(DashboardView(dashboard, state))


async def _watch(client: httpx.AsyncClient, options: argparse.Namespace, dashboard: DashboardState) -> None:
    """Show the live view until q is pressed. Raises ServiceUnreachable if the first connection fails."""
    from rich.live import Live

    from edge_runtime.cli.top_view import DashboardView
    from edge_runtime.service.monitoring.words import load_words

    states = load_words().states
    # A failure of the first connection ends the command; later, the service may come back.
    state, connected = states["connecting"], False

    async def follow() -> None:
        nonlocal state, connected
        while True:
            try:
                async for _, event in _events(client, options.url):
                    dashboard.apply(event)
                    connected = True
                    state = states["live" if dashboard.gauges else "loading"]
                state = "the service has closed the stream; reconnecting"
            except ServiceUnreachable as error:
                if not connected:
                    raise
                state = str(error)
            await asyncio.sleep(RETRY_SECONDS)

    with _quit_key() as (pressed, keys):

        def render() -> Escaped:
            return Escaped(DashboardView(dashboard, state, screen=True, keys=keys))

        with Live(console=new_console(), screen=True, refresh_per_second=8, get_renderable=render):
            following, quitting = asyncio.ensure_future(follow()), asyncio.ensure_future(pressed.wait())
            try:
                done, _ = await asyncio.wait({following, quitting}, return_when=asyncio.FIRST_COMPLETED)
                if following in done:
                    await following
            finally:
                following.cancel()
                quitting.cancel()
                await asyncio.gather(following, quitting, return_exceptions=True)


@contextlib.contextmanager
def _quit_key() -> Iterator[tuple[asyncio.Event, str]]:
    """Yield an event that is set when q is pressed, and a hint about the key; without a terminal, nothing is read."""
    import os
    import termios
    import tty

    pressed = asyncio.Event()
    if not sys.stdin.isatty():
        yield pressed, ""
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def read_keys() -> None:
        keys = os.read(terminal, 64)
        if not keys or b"q" in keys.lower():
            pressed.set()

    # Characters arrive at once and are not shown; Ctrl-C still interrupts.
    tty.setcbreak(terminal)
    loop = asyncio.get_running_loop()
    loop.add_reader(terminal, read_keys)
    try:
        yield pressed, "q quits"
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _client(options: argparse.Namespace) -> httpx.AsyncClient:
    """Create the HTTP client.

    Raises:
        InputError: the URL, the key or the authorities are unusable, or the key would be sent unencrypted.
    """
    import ssl

    import httpx

    from edge_runtime.common.network import is_http_url
    from edge_runtime.settings import is_in_clear, read_secret

    key = read_secret(options.api_key_file) if options.api_key_file else ""
    try:
        httpx.URL(options.url)
    except httpx.InvalidURL as error:
        raise InputError(f"--url {options.url}: {error}") from None
    if not is_http_url(options.url):
        raise InputError(f"--url {options.url}: not the URL of a service; write for instance http://127.0.0.1:8400")
    if key and is_in_clear(options.url):
        raise InputError(
            f"the key would be sent to {options.url} unencrypted; start the service with --certificate, and use https"
        )
    trust: ssl.SSLContext | bool = True
    if options.ca_file:
        try:
            trust = ssl.create_default_context(cafile=options.ca_file)
        except OSError as error:
            raise InputError(f"cannot trust the authorities in {options.ca_file}: {error}") from None
    return httpx.AsyncClient(
        verify=trust,
        headers=UNCOMPRESSED | ({"authorization": f"Bearer {key}"} if key else {}),
        timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        # A board is on this network: proxies of the environment are not for it.
        trust_env=False,
    )


async def _events(client: httpx.AsyncClient, url: str) -> AsyncIterator[tuple[str, Event]]:
    """Yield each event, as JSON and as a struct. Raises ServiceUnreachable and InputError."""
    import httpx
    import msgspec

    from edge_runtime.service.monitoring.events import AnyEvent

    decoder = msgspec.json.Decoder(AnyEvent)
    try:
        async with client.stream("GET", url.rstrip("/") + "/events") as response:
            if not response.is_success:
                raise _refusal_error(url, response.status_code, await read_answer(response))
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise ServiceUnreachable(f"the server at {url} is not a board's service; check --url")
            async for line in read_lines(response):
                if line.startswith("data: "):
                    event = line.removeprefix("data: ")
                    yield event, decoder.decode(event)
    except httpx.TransportError as error:
        cause = str(error) or type(error).__name__
        raise ServiceUnreachable(f"no service answers at {url} ({cause}); is `edge-runtime serve` running?") from None
    except UnusableAnswer as error:
        raise ServiceUnreachable(f"{error}; the server is not a board's service, check --url") from None
    except msgspec.MsgspecError as error:
        raise ServiceUnreachable(
            f"the service at {url} sent an event that this version does not know: {error}"
        ) from None


def _refusal_error(url: str, status: int, body: bytes) -> FlexSpecError:
    import msgspec

    from edge_runtime.service.errors import ErrorBody

    if status == 401:
        return InputError(f"the service at {url} requires an API key: name a file that holds one with --api-key-file")
    try:
        message = msgspec.json.decode(body, type=ErrorBody).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError):
        message = "the response is not a board's; check --url"
    return ServiceUnreachable(f"{url} answered {status}: {message}")
