"""Renders the dashboard of `edge-runtime top` for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edge_runtime.service.monitoring.dashboard_state import DashboardState

# As in the browser dashboard: no kind of token differs from another by color alone.
# Style and legend by kind.
TOKEN_KINDS = {
    "accepted": ("green underline", "drafted on the board and accepted"),
    "corrected": ("bold magenta underline2", "corrected by the target"),
    "own": ("yellow", "the target's own"),
    "unverified": ("italic dim", "unverified"),
    "withdrawn": ("strike dim", "withdrawn"),
}
PRIVACY = {"tls": "encrypted (TLS)", "loopback": "on this machine", "clear": "NOT encrypted"}
BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_CHARACTERS = 24
# Of the newest answer.
MAX_TEXT_CHARACTERS = 1200

# One value per second; None if there is none.
Series = list[float | None]


def render_dashboard(dashboard: DashboardState, state: str) -> RenderableType:
    """Render everything. `state` describes the connection."""
    head, gauges = _render_header(dashboard, state), _render_gauges(dashboard)
    return Group(head, gauges, *_render_round(dashboard), *_render_answer(dashboard))


def sparkline(values: Series, min_scale: float = 1.0) -> str:
    """Draw the values as bars, one character each, from 0 to the maximum or `min_scale`, whichever is greater."""
    top = max([min_scale, *(value for value in values if value is not None)])
    return "".join(
        " " if value is None else BARS[min(len(BARS) - 1, int(max(0.0, value) / top * len(BARS)))] for value in values
    )


def replace_control_characters(text: str) -> str:
    """Replace what a terminal would interpret: a model may write escape sequences."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "�" for c in text)


def _render_header(dashboard: DashboardState, state: str) -> Text:
    board = dashboard.board
    head = Text.assemble(("FlexSpec", "bold"), f" {state}" if board is None else f" {board.version}, {state}")
    gauges = dashboard.gauges[-1] if dashboard.gauges else None
    known = gauges or board
    if known:
        style = "bold red" if known.privacy == "clear" else "green"
        head.append(f"\nverifier {replace_control_characters(known.verifier)}, ").append(PRIVACY[known.privacy], style)
    if gauges:
        head.append(f"\n{gauges.running} answers running, {gauges.waiting} waiting")
        head.append(", on battery" if gauges.on_battery else "")
        head.append(", metered link" if gauges.metered else "")
        head.append(", throttled" if gauges.throttled else "", "bold")
        if gauges.fault:
            head.append(f"\nno verifier: {replace_control_characters(gauges.fault)}", "bold red")
    return head


def _render_gauges(dashboard: DashboardState) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, values, unit, note, min_scale in _gauge_rows(dashboard):
        shown = "" if values[-1] is None else f"{values[-1]:.4g} {unit}"
        bars = Text(sparkline(values[-SPARKLINE_CHARACTERS:], min_scale), "cyan", no_wrap=True)
        table.add_row(Text(name, "dim"), shown, bars, Text(note, "dim"))
    return table


def _gauge_rows(dashboard: DashboardState) -> Iterator[tuple[str, Series, str, str, float]]:
    """Yield name, values, unit, note and minimum scale of each gauge; a sensor that the board lacks has no row."""
    rates, gauges = list(dashboard.rates), list(dashboard.gauges)
    if not gauges:
        return
    now = gauges[-1]
    count = f"{now.tokens} since start"
    yield "tokens per second", [rate.tokens_per_second for rate in rates], "", count, 10.0
    acceptance = [None if rate.acceptance is None else 100 * rate.acceptance for rate in rates]
    yield "acceptance", acceptance, "%", f"{now.accepted} of {now.drafted}", 100.0
    yield "draft length", [rate.draft_length for rate in rates], "", f"{now.rounds} rounds", 4.0
    traffic = f"sent {now.sent} B, received {now.received} B"
    yield "link", [rate.bytes_per_second for rate in rates], "B/s", traffic, 100.0
    energy = ("" if now.joules is None else f"{now.joules:.0f} J") + (", modelled" if now.energy == "profile" else "")
    sensors: list[tuple[str, Series, str, str, float]] = [
        ("round trip", [None if g.rtt_seconds is None else 1e3 * g.rtt_seconds for g in gauges], "ms", "", 1.0),
        ("power", [g.watts for g in gauges], "W", energy, 5.0),
        ("temperature", [g.celsius for g in gauges], "°C", "", 90.0),
        ("battery", [g.battery_percent for g in gauges], "%", "", 100.0),
        ("energy left", [g.battery_joules for g in gauges], "J", "", 1.0),
    ]
    yield from (sensor for sensor in sensors if sensor[1][-1] is not None)


def _render_round(dashboard: DashboardState) -> Iterator[Text]:
    plan, round_ = dashboard.plan, dashboard.round
    if plan:
        head = f"plan: {plan.draft} drafted + {plan.own} by the target"
        yield Text.assemble((head, "bold"), f", {plan.reason}" if plan.reason else "")
    if round_:
        times = {"draft": round_.draft_seconds, "link": round_.link_seconds, "verifier": round_.verifier_seconds}
        yield Text(
            f"last round: {round_.accepted} of {round_.drafted} accepted, "
            + ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items())
            + f", {round_.sent} B sent, {round_.received} B received"
        )


def _render_answer(dashboard: DashboardState) -> Iterator[RenderableType]:
    started, finished = dashboard.started, dashboard.finished
    if started is None:
        return
    text = Text(replace_control_characters(started.prompt), "dim")
    for kind, token in dashboard.tokens:
        text.append(replace_control_characters(token), TOKEN_KINDS[kind][0])
    title = f"answer {started.answer}"
    if finished is not None and finished.answer == started.answer:
        title += f": {finished.tokens} tokens, {replace_control_characters(finished.outcome)}"
    yield Panel(text[max(0, len(text) - MAX_TEXT_CHARACTERS) :], title=title, title_align="left")
    yield Text(", ").join([Text(meaning, style) for style, meaning in TOKEN_KINDS.values()])
