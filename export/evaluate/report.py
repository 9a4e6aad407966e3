"""An evaluation for people: tables in Markdown, and a chart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cloud_verifier.acceptance.bootstrap import Interval
from export.evaluate.evaluation import OWN, Evaluation, Row
from export.evaluate.speeds import STREAMED

KINDS = {"own": "Along what the target writes", "given": "Along given text"}
NOTHING = "-"
# Drafted tokens of which tables tell how often all are accepted.
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16)


def markdown(evaluation: Evaluation) -> str:
    """All rows: tables of acceptance, of how far drafts survive and of rounds for each kind of text, and speeds."""
    order = evaluation.order
    sources = ", ".join(f"{count} of {name}" for name, count in evaluation.texts.items())
    lines = [
        f"{sum(evaluation.texts.values())} texts ({sources}), each of {order.prompt} tokens to read and {order.tokens} "
        f"that are judged; seed {order.seed}. In brackets: 95 % of {order.resamples} bootstrap draws of texts. Loops "
        "are left out except where a column says otherwise.",
    ]
    for kind in order.kinds:
        rows = [row for row in evaluation.rows if row.kind == kind]
        names = [name for name in evaluation.texts if evaluation.texts[name]]
        heads = ["draft", "target", "T", "accepted", "retention", *(names if len(names) > 1 else ())]
        heads += ["in loops", "accepted in loops", "with loops"]
        lines += ["", f"### {KINDS[kind]}", "", *_table(heads, (_acceptance(row, names) for row in rows))]
        heads = ["draft", "target", "T", *(f"first {k} right" for k in SHOWN)]
        lines += ["", *_table(heads, ([*_key(row), *(_share(row.survival[k - 1]) for k in SHOWN)] for row in rows))]
        plans = list(rows[0].tokens_per_round) if rows else []
        heads = ["draft", "target", "T", *(f"tokens/round {plan}" for plan in plans)]
        lines += ["", *_table(heads, ([*_key(row), *map(_few, row.tokens_per_round.values())] for row in rows))]
    fast = [row for row in evaluation.rows if row.speed is not None]
    if fast:
        heads = ["draft", "target", "T", "draft step ms", STREAMED, "best fixed plan", "ms/token", "times as fast"]
        assert fast[0].speed is not None
        lines += ["", f"### Expected speed, modelled: {fast[0].speed.scene}", "", *_table(heads, map(_speed, fast))]
    return "\n".join([*lines, ""])


def _table(heads: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _key(row: Row) -> list[str]:
    return [row.draft, row.version, f"{row.temperature:g}"]


def _acceptance(row: Row, names: list[str]) -> list[str]:
    return [
        *_key(row),
        _share(row.acceptance),
        _few(row.retention, 3),
        *((_share(row.by_text[name]) for name in names) if len(names) > 1 else ()),
        f"{row.looped:.0%}",
        _share(row.looped_acceptance),
        _share(row.overall_acceptance),
    ]


def _speed(row: Row) -> list[str]:
    assert row.speed is not None
    best, streamed = row.speed.milliseconds[row.speed.best], row.speed.milliseconds[STREAMED]
    ratio = f"{streamed.value / best.value:.2f}"
    return [*_key(row), f"{row.speed.step_milliseconds:.2f}", _few(streamed, 1), row.speed.best, _few(best, 1), ratio]


def _share(interval: Interval | None) -> str:
    if interval is None:
        return NOTHING
    return f"{100 * interval.value:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _few(interval: Interval | None, digits: int = 2) -> str:
    if interval is None:
        return NOTHING
    return f"{interval.value:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def draw(evaluation: Evaluation, path: Path) -> None:
    """Acceptance with its intervals above, and how far drafts survive below, a column for each temperature."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    temperatures = evaluation.order.temperatures
    kind = OWN if OWN in evaluation.order.kinds else evaluation.order.kinds[0]
    figure, axes = pyplot.subplots(
        2, len(temperatures), figsize=(5 * len(temperatures), 8), squeeze=False, sharey="row"
    )
    for column, temperature in enumerate(temperatures):
        rows = [row for row in evaluation.rows if (row.kind, row.temperature) == (kind, temperature)]
        versions, drafts = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("version", "draft"))
        bars, curves = axes[0][column], axes[1][column]
        for row in rows:
            colour = f"C{drafts.index(row.draft)}"
            place = versions.index(row.version) + (drafts.index(row.draft) + 0.5) / len(drafts) * 0.8 - 0.4
            if row.acceptance is not None:
                value, low, high = row.acceptance.value, row.acceptance.low, row.acceptance.high
                bars.bar(place, value, 0.8 / len(drafts), color=colour)
                bars.errorbar(place, value, [[max(0.0, value - low)], [max(0.0, high - value)]], color="0.2", capsize=3)
            points = [(k + 1, share.value) for k, share in enumerate(row.survival) if share is not None]
            style = ("-", "--", ":", "-.")[versions.index(row.version) % 4]
            if points:
                curves.plot(*zip(*points, strict=True), style, color=colour, label=f"{row.draft}, {row.version}")
        bars.set_title(f"T={temperature:g}")
        bars.set_xticks(range(len(versions)), versions)
        bars.set_ylim(0, 1)
        bars.grid(axis="y", alpha=0.3)
        curves.set_xlabel("drafted tokens")
        curves.set_ylim(0, 1)
        curves.grid(alpha=0.3)
    axes[0][0].set_ylabel("accepted, without loops")
    axes[1][0].set_ylabel("share of drafts still right")
    axes[1][-1].legend(fontsize="small")
    figure.suptitle(KINDS[kind])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
