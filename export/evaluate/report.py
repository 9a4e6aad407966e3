"""An evaluation as Markdown tables and as a chart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloud_verifier.acceptance.bootstrap import Interval
from export.evaluate.evaluation import OWN_TEXT, Evaluation, EvaluationRow
from export.evaluate.speeds import CLOUD_ALONE, ModeledSpeed

KIND_TITLES = {"own": "Along what the target writes", "given": "Along given text"}
MISSING = "-"
# Draft lengths whose survival the tables show.
SHOWN_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)


def format_markdown(evaluation: Evaluation) -> str:
    """Format all rows: tables of acceptance, survival and tokens per round for each kind of text, and of speeds."""
    config = evaluation.config
    sources = ", ".join(f"{count} of {name}" for name, count in evaluation.texts.items())
    lines = [
        f"{sum(evaluation.texts.values())} texts ({sources}), each of {config.prompt} tokens of prompt and "
        f"{config.tokens} judged tokens; seed {config.seed}. In brackets: 95 % bootstrap intervals over texts "
        f"({config.resamples} resamples). Loops are excluded unless a column states otherwise.",
    ]
    for kind in config.kinds:
        rows = [row for row in evaluation.rows if row.kind == kind]
        names = [name for name in evaluation.texts if evaluation.texts[name]]
        heads = ["draft", "target", "T", "accepted", "retention", *(names if len(names) > 1 else ())]
        heads += ["in loops", "accepted in loops", "with loops"]
        lines += ["", f"### {KIND_TITLES[kind]}", "", *_table(heads, (_acceptance_cells(row, names) for row in rows))]
        heads = ["draft", "target", "T", *(f"first {k} accepted" for k in SHOWN_LENGTHS)]
        survival = ([*_key_cells(row), *(_percent(row.survival[k - 1]) for k in SHOWN_LENGTHS)] for row in rows)
        lines += ["", *_table(heads, survival)]
        plans = list(rows[0].tokens_per_round) if rows else []
        heads = ["draft", "target", "T", *(f"tokens/round {plan}" for plan in plans)]
        rounds = ([*_key_cells(row), *map(_decimal, row.tokens_per_round.values())] for row in rows)
        lines += ["", *_table(heads, rounds)]
    modeled = [(row, row.speed) for row in evaluation.rows if row.speed is not None]
    if modeled:
        heads = ["draft", "target", "T", "draft step ms", CLOUD_ALONE, "best fixed plan", "ms/token", "speed-up"]
        title = f"### Expected speed, modeled: {modeled[0][1].scene}"
        lines += ["", title, "", *_table(heads, (_speed_cells(row, speed) for row, speed in modeled))]
    return "\n".join([*lines, ""])


def save_chart(evaluation: Evaluation, path: Path) -> None:
    """Save a PNG: acceptance with its intervals above, survival of drafts below, one column for each temperature."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    temperatures = evaluation.config.temperatures
    kind = OWN_TEXT if OWN_TEXT in evaluation.config.kinds else evaluation.config.kinds[0]
    figure, axes = pyplot.subplots(
        2, len(temperatures), figsize=(5 * len(temperatures), 8), squeeze=False, sharey="row"
    )
    for column, temperature in enumerate(temperatures):
        rows = [row for row in evaluation.rows if (row.kind, row.temperature) == (kind, temperature)]
        _draw_column(axes[0][column], axes[1][column], rows)
        axes[0][column].set_title(f"T={temperature:g}")
    axes[0][0].set_ylabel("accepted, without loops")
    axes[1][0].set_ylabel("share of drafts with all tokens accepted")
    axes[1][-1].legend(fontsize="small")
    figure.suptitle(KIND_TITLES[kind])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_column(bars: Any, curves: Any, rows: list[EvaluationRow]) -> None:
    """Draw one temperature into two matplotlib axes."""
    versions = list(dict.fromkeys(row.version for row in rows))
    drafts = list(dict.fromkeys(row.draft for row in rows))
    for row in rows:
        color = f"C{drafts.index(row.draft)}"
        x = versions.index(row.version) + (drafts.index(row.draft) + 0.5) / len(drafts) * 0.8 - 0.4
        if row.acceptance is not None:
            value, low, high = row.acceptance.value, row.acceptance.low, row.acceptance.high
            bars.bar(x, value, 0.8 / len(drafts), color=color)
            bars.errorbar(x, value, [[max(0.0, value - low)], [max(0.0, high - value)]], color="0.2", capsize=3)
        points = [(k + 1, share.value) for k, share in enumerate(row.survival) if share is not None]
        style = ("-", "--", ":", "-.")[versions.index(row.version) % 4]
        if points:
            curves.plot(*zip(*points, strict=True), style, color=color, label=f"{row.draft}, {row.version}")
    bars.set_xticks(range(len(versions)), versions)
    bars.set_ylim(0, 1)
    bars.grid(axis="y", alpha=0.3)
    curves.set_xlabel("drafted tokens")
    curves.set_ylim(0, 1)
    curves.grid(alpha=0.3)


def _table(heads: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _key_cells(row: EvaluationRow) -> list[str]:
    return [row.draft, row.version, f"{row.temperature:g}"]


def _acceptance_cells(row: EvaluationRow, names: list[str]) -> list[str]:
    return [
        *_key_cells(row),
        _percent(row.acceptance),
        _decimal(row.retention, 3),
        *((_percent(row.by_text[name]) for name in names) if len(names) > 1 else ()),
        f"{row.looped:.0%}",
        _percent(row.looped_acceptance),
        _percent(row.overall_acceptance),
    ]


def _speed_cells(row: EvaluationRow, speed: ModeledSpeed) -> list[str]:
    best, cloud_alone = speed.milliseconds[speed.best], speed.milliseconds[CLOUD_ALONE]
    step, ratio = f"{speed.step_milliseconds:.2f}", f"{cloud_alone.value / best.value:.2f}"
    return [*_key_cells(row), step, _decimal(cloud_alone, 1), speed.best, _decimal(best, 1), ratio]


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return MISSING
    return f"{100 * interval.value:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _decimal(interval: Interval | None, digits: int = 2) -> str:
    if interval is None:
        return MISSING
    return f"{interval.value:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"
