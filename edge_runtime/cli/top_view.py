"""What an onlooker knows, in a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edge_runtime.service.monitoring.dashboard_state import Onlooker

# As on the dashboard: none is told from the others by its colour alone.
STYLES = {
    "accepted": "green underline",
    "corrected": "bold magenta underline2",
    "own": "yellow",
    "unverified": "italic dim",
    "withdrawn": "strike dim",
}
LEGEND = {
    "accepted": "drafted here and accepted",
    "corrected": "corrected by the target",
    "own": "the target's own",
    "unverified": "unverified",
    "withdrawn": "withdrawn",
}
PRIVACY = {"tls": "encrypted (TLS)", "loopback": "on this machine", "clear": "NOT encrypted"}
BARS = "▁▂▃▄▅▆▇█"
CURVE = 24
# Characters of the newest answer that are shown.
SHOWN = 1200

Curve = list[float | None]


def screen(onlooker: Onlooker, state: str) -> RenderableType:
    """Everything; `state` says how the connection does."""
    return Group(_head(onlooker, state), _gauges(onlooker), *_round(onlooker), *_answer(onlooker))


def curve(values: Curve, least: float = 1.0) -> str:
    """The values as bars of text, from 0 to their greatest, or to `least`; a blank where there is none."""
    top = max([least, *(value for value in values if value is not None)])
    return "".join(
        " " if value is None else BARS[min(len(BARS) - 1, int(max(0.0, value) / top * len(BARS)))] for value in values
    )


def plain(text: str) -> str:
    """`text` without what a terminal would obey: models write escape sequences, too."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "�" for c in text)


def _head(onlooker: Onlooker, state: str) -> Text:
    board = onlooker.board
    head = Text.assemble(("FlexSpec", "bold"), f" {state}" if board is None else f" {board.version}, {state}")
    gauges = onlooker.gauges[-1] if onlooker.gauges else None
    known = gauges or board
    if known:
        style = "bold red" if known.privacy == "clear" else "green"
        head.append(f"\nverifier {plain(known.verifier)}, ").append(PRIVACY[known.privacy], style)
    if gauges:
        head.append(f"\n{gauges.running} answers being written, {gauges.waiting} waiting")
        for said, text in (
            (gauges.on_battery, "on battery"),
            (gauges.metered, "metered link"),
            (gauges.throttled, "throttled"),
        ):
            head.append(f", {text}" if said else "", "bold" if text == "throttled" else "")
        if gauges.fault:
            head.append(f"\nno verifier: {plain(gauges.fault)}", "bold red")
    return head


def _gauges(onlooker: Onlooker) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, values, unit, note, least in _lines(onlooker):
        value = values[-1]
        said = "" if value is None else f"{value:.4g} {unit}"
        table.add_row(
            Text(name, "dim"), said, Text(curve(values[-CURVE:], least), "cyan", no_wrap=True), Text(note, "dim")
        )
    return table


def _lines(onlooker: Onlooker) -> Iterator[tuple[str, Curve, str, str, float]]:
    """Name, values, unit, note, and least scale of what the board has; a sensor that it lacks has no line."""
    rates, gauges = list(onlooker.rates), list(onlooker.gauges)
    if not gauges:
        return
    now = gauges[-1]
    count = f"{now.tokens} since the start"
    yield "tokens per second", [rate.tokens_per_second for rate in rates], "", count, 10.0
    acceptance = [None if rate.acceptance is None else 100 * rate.acceptance for rate in rates]
    yield "acceptance", acceptance, "%", f"{now.accepted} of {now.drafted}", 100.0
    yield "draft length", [rate.draft_length for rate in rates], "", f"{now.rounds} rounds", 4.0
    moved = f"sent {now.sent} B, received {now.received} B"
    yield "link", [rate.bytes_per_second for rate in rates], "B/s", moved, 100.0
    sensors: list[tuple[str, Curve, str, str, float]] = [
        ("round trip", [None if g.rtt_seconds is None else 1e3 * g.rtt_seconds for g in gauges], "ms", "", 1.0),
        (
            "power",
            [g.watts for g in gauges],
            "W",
            ("" if now.joules is None else f"{now.joules:.0f} J") + (", modelled" if now.energy == "profile" else ""),
            5.0,
        ),
        ("temperature", [g.celsius for g in gauges], "°C", "", 90.0),
        ("battery", [g.battery_percent for g in gauges], "%", "", 100.0),
        ("in the battery", [g.battery_joules for g in gauges], "J", "", 1.0),
    ]
    yield from (sensor for sensor in sensors if sensor[1][-1] is not None)


def _round(onlooker: Onlooker) -> Iterator[Text]:
    plan, round_ = onlooker.plan, onlooker.round
    if plan:
        head = f"plan: {plan.draft} drafted here + {plan.own} by the target"
        yield Text.assemble((head, "bold"), f", {plan.reason}" if plan.reason else "")
    if round_:
        times = {"draft": round_.draft_seconds, "link": round_.link_seconds, "verifier": round_.verifier_seconds}
        yield Text(
            f"last round: {round_.accepted} of {round_.drafted} accepted, "
            + ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items())
            + f", {round_.sent} B sent, {round_.received} B received"
        )


def _answer(onlooker: Onlooker) -> Iterator[RenderableType]:
    begun, ended = onlooker.begun, onlooker.ended
    if begun is None:
        return
    text = Text(plain(begun.prompt), "dim")
    for kind, token in onlooker.tokens:
        text.append(plain(token), STYLES[kind])
    over = ended is not None and ended.answer == begun.answer
    title = f"answer {begun.answer}" + (f": {ended.tokens} tokens, {plain(ended.outcome)}" if over and ended else "")
    yield Panel(text[max(0, len(text) - SHOWN) :], title=title, title_align="left")
    yield Text(", ").join([Text(meaning, STYLES[kind]) for kind, meaning in LEGEND.items()])
