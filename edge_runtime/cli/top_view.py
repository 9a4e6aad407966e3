"""Renders the live view of `edge-runtime top` for a terminal of any size."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edge_runtime.common.terminal import escape
from edge_runtime.service.monitoring.dashboard_state import DashboardState
from edge_runtime.service.monitoring.words import capitalize, count, load_words

WORDS = load_words()
# As in the browser: no kind of token differs from another by color alone.
TOKEN_STYLES = {
    "accepted": "green underline",
    "corrected": "bold magenta underline2",
    "own": "yellow",
    "unverified": "italic dim",
    "withdrawn": "strike dim",
}
TIME_STYLES = {"draft": "green", "link": "cyan", "verifier": "yellow"}
BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_CHARACTERS = 24
# Below this width, gauges have no notes and no curves, and the bar of times has no legend beside it; chosen.
NARROW_COLUMNS = 72
# Of the newest answer.
MAX_TEXT_CHARACTERS = 1200
# Lines of the newest answer that are shown even where the rest leaves no room.
MIN_TEXT_LINES = 3

# One value per second; None if there is none.
Series = list[float | None]


class DashboardView:
    """The live view, as wide as the terminal is at that moment.

    Args:
        state: describes the connection.
        screen: it fills the terminal, where what does not fit would be cut off; the text gets the lines that are left.
        keys: describes the keys, if there are any.
    """

    def __init__(self, dashboard: DashboardState, state: str, *, screen: bool = False, keys: str = "") -> None:
        self._dashboard, self._state, self._screen, self._keys = dashboard, state, screen, keys

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < NARROW_COLUMNS
        parts: list[RenderableType] = [
            _render_header(self._dashboard, self._state, self._keys),
            _render_gauges(self._dashboard, narrow),
            *_render_round(self._dashboard, options.max_width),
        ]
        yield from parts
        if self._dashboard.started is None:
            return
        text_lines = None
        if self._screen:
            used = console.render_lines(Group(*parts, _render_legend()), options, pad=False)
            # The panel's frame takes two lines.
            text_lines = max(MIN_TEXT_LINES, console.height - len(used) - 2)
        yield from _render_answer(self._dashboard, options.max_width, text_lines)


def sparkline(values: Series, min_scale: float = 1.0) -> str:
    """Draw the values as bars, one character each, from 0 to the maximum or `min_scale`, whichever is greater."""
    top = max([min_scale, *(value for value in values if value is not None)])
    return "".join(
        " " if value is None else BARS[min(len(BARS) - 1, int(max(0.0, value) / top * len(BARS)))] for value in values
    )


def _render_header(dashboard: DashboardState, state: str, keys: str) -> Text:
    board = dashboard.board
    head = Text.assemble(("FlexSpec", "bold"), f" {state}" if board is None else f" {board.version}, {state}")
    head.append(f"  ({keys})" if keys else "", "dim")
    gauges = dashboard.gauges[-1] if dashboard.gauges else None
    if gauges and gauges.version:
        head.append("\ntarget model ").append(escape(gauges.version), "bold")
    known = gauges or board
    if known:
        style = "bold red" if known.privacy == "clear" else "green"
        head.append(f"\nverifier {escape(known.verifier)}, ").append(WORDS.privacy[known.privacy], style)
    if gauges:
        facts = [
            WORDS.answers["running"].format(answers=count(gauges.running, "answer")),
            WORDS.answers["waiting"].format(requests=count(gauges.waiting, "request")) if gauges.waiting else "",
            *(words for field, words in WORDS.board.items() if getattr(gauges, field)),
        ]
        head.append("\n" + ", ".join(filter(None, facts)))
        if gauges.unverified_answers:
            answers = count(gauges.unverified_answers, "answer")
            head.append("\n" + WORDS.answers["unverified"].format(answers=answers), "bold")
        if gauges.fault:
            head.append("\n" + capitalize(escape(gauges.fault)), "bold red")
    return head


def _render_gauges(dashboard: DashboardState, narrow: bool) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, values, note in _gauge_rows(dashboard):
        gauge = WORDS.gauges[key]
        value = "–" if values[-1] is None else f"{values[-1]:.{gauge.digits}f} {gauge.unit}"
        cells = [Text(gauge.name, "dim"), Text(value)]
        if not narrow:
            bars = Text(sparkline(values[-SPARKLINE_CHARACTERS:], gauge.scale), "cyan", no_wrap=True)
            cells += [bars, Text(note, "dim")]
        table.add_row(*cells)
    return table


def _gauge_rows(dashboard: DashboardState) -> Iterator[tuple[str, Series, str]]:
    """Yield name, values and note of each gauge; a sensor that the board lacks has no row."""
    rates, gauges = list(dashboard.rates), list(dashboard.gauges)
    if not gauges:
        return
    now = gauges[-1]
    yield "rate", [rate.tokens_per_second for rate in rates], f"{count(now.tokens, 'token')} since start"
    acceptance = [None if rate.acceptance is None else 100 * rate.acceptance for rate in rates]
    accepted = WORDS.round.format(accepted=now.accepted, draft=count(now.drafted, "draft token"))
    yield "acceptance", acceptance, accepted
    yield "draft", [rate.draft_length for rate in rates], count(now.rounds, "round")
    traffic = [None if rate.bytes_per_second is None else rate.bytes_per_second / 1e3 for rate in rates]
    yield "bytes", traffic, f"{now.sent / 1e3:.1f} kB sent, {now.received / 1e3:.1f} kB received"
    energy = ("" if now.joules is None else f"{now.joules:.0f} J") + (", modeled" if now.energy == "profile" else "")
    sensors: list[tuple[str, Series, str]] = [
        ("rtt", [None if g.rtt_seconds is None else 1e3 * g.rtt_seconds for g in gauges], ""),
        ("watts", [g.watts for g in gauges], energy),
        ("celsius", [g.celsius for g in gauges], ""),
        (
            "battery",
            [g.battery_percent for g in gauges],
            "" if now.battery_joules is None else f"{now.battery_joules:.0f} J",
        ),
    ]
    yield from (sensor for sensor in sensors if sensor[1][-1] is not None)


def _render_round(dashboard: DashboardState, width: int) -> Iterator[Text]:
    plan, round_ = dashboard.plan, dashboard.round
    if plan:
        yield Text.assemble((WORDS.plan(plan), "bold"), f" Reason: {WORDS.reason(plan)}" if plan.reason else "")
    if round_:
        times = {
            "draft": round_.draft_seconds,
            "link": round_.link_seconds,
            "verifier": round_.verifier_seconds,
        }
        facts = [
            Text(WORDS.outcome_of(round_)),
            *(Text(f"{WORDS.times[part]} {1e3 * times[part]:.1f} ms", style) for part, style in TIME_STYLES.items()),
            Text(f"{round_.sent} B sent, {round_.received} B received"),
        ]
        yield Text("Last round: ") + Text(", ").join(filter(None, facts))
        yield _render_times(times, width)


def _render_times(times: dict[str, float], width: int) -> Text:
    """Draw the parts of a round's duration to scale, over the whole width."""
    total, bar, end, drawn = sum(times.values()), Text(no_wrap=True), 0.0, 0
    for part, seconds in times.items():
        end += seconds
        cells = round(width * end / total) - drawn if total else 0
        bar.append("━" * cells, TIME_STYLES[part])
        drawn += cells
    return bar


def _render_answer(dashboard: DashboardState, width: int, lines: int | None) -> Iterator[RenderableType]:
    started, finished = dashboard.started, dashboard.finished
    assert started is not None
    text = Text(escape(started.prompt, keep="\n\t"), "dim")
    for kind, token in dashboard.tokens:
        text.append(escape(token, keep="\n\t"), TOKEN_STYLES[kind])
    title = f"answer {started.answer}"
    if finished is not None and finished.answer == started.answer:
        outcome = WORDS.outcomes.get(finished.outcome, finished.message or finished.outcome)
        title += f": {count(finished.tokens, 'token')}, {escape(outcome)}"
        if finished.unverified:
            title += f", {finished.unverified} {WORDS.tokens['unverified']}"
    text = text[max(0, len(text) - MAX_TEXT_CHARACTERS) :]
    text.rstrip()
    if lines is not None:
        # The newest lines; a panel's border and padding take four columns.
        wrapped = text.wrap(Console(width=width), max(1, width - 4))
        text = Text("\n").join(wrapped[-lines:])
    yield Panel(text, title=Text(title, overflow="ellipsis"), title_align="left")
    yield _render_legend()


def _render_legend() -> Text:
    return Text(", ").join([Text(WORDS.tokens[kind], style) for kind, style in TOKEN_STYLES.items()])
