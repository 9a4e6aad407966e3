"""Measures all variants of a draft and chooses one: `draft-export forms`.

A variant is a kind of graph, a weight type, and a head that is whole or trimmed. Each variant becomes a bundle in a
directory of its own, so an interrupted run resumes. The choice is int8, the default, unless another fused graph has a
smaller file and its acceptance at T=0 and at T=1, on the same positions, is within a tolerance of int8's. Larger
weights are only for comparison: on a real draft float32 takes 4.7 times the time of int8, for 3 % more acceptance. So
are Optimum's graphs, because they copy the whole KV cache at every step. Acceptance is measured by
`export.bundle.build`, with logits from the board's own runner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edge_runtime.protocol.bundle import Manifest, read_bundle, read_head_ids, record_file
from edge_runtime.protocol.errors import InputError
from export.bundle.build import BundleConfig, ReferenceDraft, make_bundle
from export.bundle.footprint import Footprint, measure_footprint
from export.bundle.onnx_graph import WEIGHT_TYPES
from export.common.progress import Progress

CONFIG_FILE, JSON_FILE, MARKDOWN_FILE = "order.json", "forms.json", "forms.md"
# Keys of the manifest's acceptance that decide.
DECISIVE_TEMPERATURES = ("T=0", "T=1")
SHOWN_TEMPERATURES = ("T=0", "T=0.7", "T=1")
WHOLE_HEAD_VARIANTS = (
    *(("fused", weights) for weights in WEIGHT_TYPES),
    *(("concat", weights) for weights in ("fp32", "int8", "int4")),
)
# fp32 shows what trimming alone costs; the others are the ones worth trimming.
TRIMMED_HEAD_VARIANTS = (("fused", "fp32"), ("fused", "int8"), ("fused", "int4"))
DEFAULT_VARIANT = "fused-int8"
# Shows what rounding the weights costs.
FLOAT_VARIANT = "fused-fp32"


class DraftVariant(msgspec.Struct, frozen=True):
    """One row of the table.

    Attributes:
        name: name of the variant and of its bundle's directory, such as `fused-int8`.
        head: number of ids of the head.
        file_bytes: size of all files of the bundle except the tokenizer.
        agreement: share of positions with PyTorch's argmax, over the ids of the head.
        logit_difference: largest absolute difference of a logit from PyTorch's.
        acceptance: acceptance rate by temperature.
        footprint: memory and speed in a process of its own, with one thread.
    """

    name: str
    head: int
    file_bytes: int
    agreement: float
    logit_difference: float
    acceptance: dict[str, float]
    footprint: Footprint


class VariantTable(msgspec.Struct, frozen=True):
    """The measured variants and the choice.

    Attributes:
        positions: number of compared positions.
        tolerance: acceptance that may be lost, as a share.
        chosen: name of the chosen variant.
        forms: the variants.
    """

    positions: int
    tolerance: float
    chosen: str
    forms: list[DraftVariant]


@dataclass(frozen=True)
class ComparisonConfig:
    """What to compare.

    Attributes:
        bundle: target, draft, text, context, positions, and what to trim heads by; `kind` and `weights` are ignored.
        output: directory of the bundles and of the table.
        tolerance: acceptance that may be lost, as a share.
        names: measure only these variants, DEFAULT_VARIANT and FLOAT_VARIANT; empty for all.
    """

    bundle: BundleConfig
    output: Path
    tolerance: float = 0.01
    names: tuple[str, ...] = ()


def compare_variants(config: ComparisonConfig) -> VariantTable:
    """Build and measure the variants that are missing, and write JSON_FILE and MARKDOWN_FILE into the output directory.

    Raises:
        InputError: a variant does not exist, or the directory holds variants of something else.
        FlexSpecError: target or draft cannot be used, or the disk is full.
    """
    bundle_configs = _bundle_configs(config)
    output = config.output
    _claim_output(config)
    reference: ReferenceDraft | None = None
    variants: list[DraftVariant] = []
    with Progress("forms", len(bundle_configs)) as progress:
        for name, bundle_config in bundle_configs.items():
            progress.update(len(variants), name)
            row_path = output / f"{name}.json"
            if not (output / name).is_dir():
                reference = reference or ReferenceDraft(bundle_config)
                make_bundle(bundle_config, output / name, lambda step: None, reference)
                row_path.unlink(missing_ok=True)
            if not row_path.is_file():
                variant = _measure_variant(name, output / name)
                _write(row_path, msgspec.json.format(msgspec.json.encode(variant)))
            variants.append(msgspec.json.decode(row_path.read_bytes(), type=DraftVariant))
        progress.update(len(variants), "done")
    positions = read_bundle(output / DEFAULT_VARIANT, verify=False).manifest.parity.positions
    table = VariantTable(positions, config.tolerance, choose_variant(variants, config.tolerance).name, variants)
    _write(output / JSON_FILE, msgspec.json.format(msgspec.json.encode(table)) + b"\n")
    _write(output / MARKDOWN_FILE, format_table(table).encode())
    return table


def choose_variant(variants: Sequence[DraftVariant], tolerance: float) -> DraftVariant:
    """Choose the smallest fused variant whose acceptance is within `tolerance` of DEFAULT_VARIANT's."""
    default = next(variant for variant in variants if variant.name == DEFAULT_VARIANT)
    # Shares are rounded to four digits: a difference of exactly the tolerance is within it.
    eligible = [
        variant
        for variant in variants
        if variant.name.startswith("fused")
        and variant.file_bytes <= default.file_bytes
        and all(variant.acceptance[key] >= default.acceptance[key] - tolerance - 1e-9 for key in DECISIVE_TEMPERATURES)
    ]
    return min(eligible, key=lambda variant: (variant.file_bytes, variant.footprint.milliseconds))


def format_table(table: VariantTable) -> str:
    """Format the table as Markdown, with the choice and its reason."""
    lines = [
        "| form | head | MB on disk | MB resident (own) | ms per token | same argmax as PyTorch | "
        "accepted at T=0 | T=0.7 | T=1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in table.forms:
        footprint = variant.footprint
        cells = [
            f"**{variant.name}**" if variant.name == table.chosen else variant.name,
            str(variant.head),
            f"{variant.file_bytes / 1e6:.1f}",
            f"{footprint.resident_bytes / 1e6:.0f} ({footprint.own_bytes / 1e6:.0f})",
            f"{footprint.milliseconds:.2f}",
            f"{variant.agreement:.1%}",
            *(f"{variant.acceptance[key]:.1%}" for key in SHOWN_TEMPERATURES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{table.positions} positions of a given text. Recommended: **{table.chosen}**, the smallest fused one whose "
        f"acceptance at T=0 and T=1 is at most {100 * table.tolerance:g} points below that of {DEFAULT_VARIANT}, the "
        "default. "
        "Memory and time: one process, one thread, on the machine that made the table; own memory excludes pages of "
        "files.",
        "",
    ]
    return "\n".join(lines)


def _bundle_configs(config: ComparisonConfig) -> dict[str, BundleConfig]:
    """The bundle of each variant to measure, by the variant's name."""
    whole = replace(config.bundle, head_text=None, head_size=None)
    configs = {f"{kind}-{weights}": replace(whole, kind=kind, weights=weights) for kind, weights in WHOLE_HEAD_VARIANTS}
    if config.bundle.head_text is not None:
        for kind, weights in TRIMMED_HEAD_VARIANTS:
            configs[f"{kind}-{weights}-trimmed"] = replace(config.bundle, kind=kind, weights=weights)
    unknown = [name for name in config.names if name not in configs]
    if unknown:
        raise InputError(f"no form {unknown[0]!r}; there are {', '.join(configs)}")
    selected = {DEFAULT_VARIANT, FLOAT_VARIANT, *config.names} if config.names else set(configs)
    return {name: bundle for name, bundle in configs.items() if name in selected}


def _claim_output(config: ComparisonConfig) -> None:
    """Create the output directory, or check that it holds variants of the same inputs."""
    bundle, output = config.bundle, config.output
    inputs = {
        "target": _hash_directory(bundle.target),
        "draft": _hash_directory(bundle.draft),
        "text": hashlib.sha256(bundle.text.encode()).hexdigest(),
        "head_text": bundle.head_text and hashlib.sha256(bundle.head_text.encode()).hexdigest(),
        "head_size": bundle.head_size,
        "context": bundle.context,
        "positions": bundle.positions,
    }
    content = msgspec.json.format(msgspec.json.encode(inputs))
    path = output / CONFIG_FILE
    try:
        if path.is_file() and path.read_bytes() != content:
            previous = msgspec.json.decode(path.read_bytes())
            differing = ", ".join(key for key, value in inputs.items() if previous.get(key) != value)
            raise InputError(f"{output} holds forms of another {differing}; remove it or choose another --output")
        if output.is_dir() and any(output.iterdir()) and not path.is_file():
            raise InputError(f"{output} holds other files; choose another --output")
        output.mkdir(parents=True, exist_ok=True)
    except (OSError, msgspec.MsgspecError) as error:
        raise InputError(f"cannot use {output}: {error}; choose another --output") from None
    _write(path, content)


def _hash_directory(directory: Path) -> str:
    """One hash over the names and contents of a directory's files."""
    if not directory.is_dir():
        raise InputError(f"no directory {directory}; give the directories of a target and of a draft")
    lines = (f"{record_file(path).sha256}  {path.name}\n" for path in sorted(directory.iterdir()) if path.is_file())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _measure_variant(name: str, path: Path) -> DraftVariant:
    bundle = read_bundle(path)
    manifest: Manifest = bundle.manifest
    head = read_head_ids(bundle)
    return DraftVariant(
        name=name,
        head=manifest.architecture.vocabulary_size if head is None else len(head),
        file_bytes=sum(record.bytes for file, record in manifest.files.items() if file != bundle.tokenizer_path.name),
        agreement=manifest.parity.greedy_agreement,
        logit_difference=manifest.parity.max_logit_difference,
        acceptance=manifest.acceptance,
        footprint=measure_footprint(path),
    )


def _write(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
