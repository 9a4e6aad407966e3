"""Every form that a draft can have on a board, measured, and the one to take: `draft-export forms`.

A form is a kind of graph, a type of weights, and a head, whole or trimmed. Each becomes a bundle in a directory of its
own, so a run that was stopped goes on where it was. The rule: the smallest file of a fused graph whose acceptance at
T=0 and at T=1, on the same positions, is within a tolerance of fp32's; optimum's graphs are there to compare with, they
copy all keys and values at every step. Acceptance is the share of positions of a given text where draft
and target choose the same token with the same noise, the draft's logits coming from the board's own runner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edge_runtime.protocol.bundle import Manifest, read_bundle, read_head_ids, record_file
from edge_runtime.protocol.errors import InputError
from export.bundle import footprint
from export.bundle.build import BundleOrder, Original, make_bundle
from export.bundle.onnx_graph import WEIGHTS
from export.common.progress import Progress

ORDER, JSON, MARKDOWN = "order.json", "forms.json", "forms.md"
JUDGED = ("T=0", "T=1")
WHOLE = (*(("fused", weights) for weights in WEIGHTS), ("concat", "fp32"), ("concat", "int8"), ("concat", "int4"))
# What trimming costs by itself, and what it leaves of the small ones.
TRIMMED = (("fused", "fp32"), ("fused", "int8"), ("fused", "int4"))
REFERENCE = "fused-fp32"


class Form(msgspec.Struct, frozen=True):
    """One row of the table.

    Attributes:
        name: such as `fused-int8`, also of its bundle's directory.
        head: how many ids the head has.
        file_bytes: all files of the bundle but the tokenizer.
        agreement: share of positions where the argmax is PyTorch's, over the same ids.
        logit_difference: the largest.
        acceptance: by temperature.
        footprint: in a process of its own, with one thread.
    """

    name: str
    head: int
    file_bytes: int
    agreement: float
    logit_difference: float
    acceptance: dict[str, float]
    footprint: footprint.Footprint


class Forms(msgspec.Struct, frozen=True):
    """The table.

    Attributes:
        positions: how many were compared.
        tolerance: how much acceptance may be lost.
        chosen: name of the form to take.
    """

    positions: int
    tolerance: float
    chosen: str
    forms: list[Form]


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        order: target, draft, text, context, positions, and what to trim heads by; kind and weights are not used.
        output: directory of the bundles and of the table.
        tolerance: acceptance that may be lost, as a share.
        names: only these forms and REFERENCE; empty for all.
    """

    order: BundleOrder
    output: Path
    tolerance: float = 0.01
    names: tuple[str, ...] = ()


def compare(comparison: Comparison) -> Forms:
    """Makes and measures what is not there yet, and writes JSON and MARKDOWN into the output directory.

    Raises:
        InputError: a form that does not exist, or the directory holds the forms of something else.
        FlexSpecError: target or draft cannot be used, or the disk is full.
    """
    orders = _orders(comparison)
    output = comparison.output
    _claim(comparison)
    original: Original | None = None
    rows: list[Form] = []
    with Progress("forms", len(orders)) as progress:
        for name, order in orders.items():
            progress.update(len(rows), name)
            measured = output / f"{name}.json"
            if not (output / name).is_dir():
                original = original or Original(order)
                make_bundle(order, output / name, lambda step: None, original)
                measured.unlink(missing_ok=True)
            if not measured.is_file():
                _write(measured, msgspec.json.format(msgspec.json.encode(_row(name, output / name))))
            rows.append(msgspec.json.decode(measured.read_bytes(), type=Form))
        progress.update(len(rows), "done")
    positions = read_bundle(output / REFERENCE, verify=False).manifest.parity.positions
    table = Forms(positions, comparison.tolerance, choose(rows, comparison.tolerance).name, rows)
    _write(output / JSON, msgspec.json.format(msgspec.json.encode(table)) + b"\n")
    _write(output / MARKDOWN, markdown(table).encode())
    return table


def choose(rows: Sequence[Form], tolerance: float) -> Form:
    """The smallest fused one that is accepted as often as REFERENCE, which is one of `rows`, but for `tolerance`."""
    bar = next(row for row in rows if row.name == REFERENCE).acceptance
    # Shares are rounded to four digits: a difference of exactly the tolerance is within it.
    fused = [row for row in rows if row.name.startswith("fused")]
    fit = [row for row in fused if all(row.acceptance[key] >= bar[key] - tolerance - 1e-9 for key in JUDGED)]
    return min(fit, key=lambda row: (row.file_bytes, row.footprint.milliseconds))


def markdown(table: Forms) -> str:
    """The table, and the choice with its reason."""
    lines = [
        "| form | head | MB on disk | MB resident (own) | ms per token | same argmax as PyTorch | "
        "accepted at T=0 | T=0.7 | T=1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.forms:
        name = f"**{row.name}**" if row.name == table.chosen else row.name
        place = row.footprint
        shares = (row.acceptance[key] for key in ("T=0", "T=0.7", "T=1"))
        cells = [
            name,
            str(row.head),
            f"{row.file_bytes / 1e6:.1f}",
            f"{place.resident_bytes / 1e6:.0f} ({place.own_bytes / 1e6:.0f})",
            f"{place.milliseconds:.2f}",
            f"{row.agreement:.1%}",
            *(f"{share:.1%}" for share in shares),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{table.positions} positions of a given text. To take: **{table.chosen}**, the smallest fused one whose "
        f"acceptance at T=0 and T=1 is at most {100 * table.tolerance:g} points below that of {REFERENCE}. Memory and "
        "time: one process, one thread, on the machine that made the table; own memory is what is not a file's pages.",
        "",
    ]
    return "\n".join(lines)


def _orders(comparison: Comparison) -> dict[str, BundleOrder]:
    whole = replace(comparison.order, head_text=None, head_size=None)
    orders = {f"{kind}-{weights}": replace(whole, kind=kind, weights=weights) for kind, weights in WHOLE}
    if comparison.order.head_text is not None:
        for kind, weights in TRIMMED:
            orders[f"{kind}-{weights}-trimmed"] = replace(comparison.order, kind=kind, weights=weights)
    unknown = [name for name in comparison.names if name not in orders]
    if unknown:
        raise InputError(f"no form {unknown[0]!r}; there are {', '.join(orders)}")
    return {n: order for n, order in orders.items() if n in (REFERENCE, *comparison.names) or not comparison.names}


def _claim(comparison: Comparison) -> None:
    """Makes the output directory, or finds there what was made of the same things."""
    order, output = comparison.order, comparison.output
    described = {
        "target": _digest(order.target),
        "draft": _digest(order.draft),
        "text": hashlib.sha256(order.text.encode()).hexdigest(),
        "head_text": order.head_text and hashlib.sha256(order.head_text.encode()).hexdigest(),
        "head_size": order.head_size,
        "context": order.context,
        "positions": order.positions,
    }
    text = msgspec.json.format(msgspec.json.encode(described))
    path = output / ORDER
    try:
        if path.is_file() and path.read_bytes() != text:
            then = msgspec.json.decode(path.read_bytes())
            other = ", ".join(key for key, value in described.items() if then.get(key) != value)
            raise InputError(f"{output} holds forms of another {other}; remove it or choose another --output")
        if output.is_dir() and any(output.iterdir()) and not path.is_file():
            raise InputError(f"{output} has other things in it; choose another --output")
        output.mkdir(parents=True, exist_ok=True)
    except (OSError, msgspec.MsgspecError) as error:
        raise InputError(f"cannot use {output}: {error}; choose another --output") from None
    _write(path, text)


def _digest(directory: Path) -> str:
    """One hash over the names and contents of a directory's files."""
    if not directory.is_dir():
        raise InputError(f"no directory {directory}; give a target's and a draft's")
    lines = (f"{record_file(path).sha256}  {path.name}\n" for path in sorted(directory.iterdir()) if path.is_file())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _row(name: str, path: Path) -> Form:
    bundle = read_bundle(path)
    manifest: Manifest = bundle.manifest
    head = read_head_ids(bundle)
    return Form(
        name,
        manifest.architecture.vocabulary_size if head is None else len(head),
        sum(record.bytes for file, record in manifest.files.items() if file != bundle.tokenizer_path.name),
        manifest.parity.greedy_agreement,
        manifest.parity.max_logit_difference,
        manifest.acceptance,
        footprint.measure(path),
    )


def _write(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
