"""`draft-export onnx`: exports a draft into a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_runtime.common.options import add_flag, add_option, whole_number
from edge_runtime.protocol.bundle import Manifest
from edge_runtime.protocol.errors import InputError
from export.cli.choices import GRAPH_KINDS, WEIGHT_TYPES

# Imported by every command; it is slow to import.
if TYPE_CHECKING:
    from export.bundle.chat_format import TargetChat

DESCRIPTION = """\
Exports a draft and packs it into a bundle. DRAFT is a directory of `draft-export distill` or `family` (the draft's own
tensors; shared tensors come from TARGET), or a whole model with TARGET's tokenizer, which is then a standalone draft.
Whole models are Hugging Face directories or GGUF files. Parity with PyTorch and acceptance by TARGET are measured on a
text and recorded in the manifest.
"""


def add_parser(commands: Any) -> None:
    """Add `onnx` to argparse's sub-parsers."""
    parser = commands.add_parser("onnx", help="export a draft into a bundle", description=DESCRIPTION)
    parser.add_argument("target", type=Path, help="Hugging Face directory or GGUF file of the target")
    parser.add_argument("draft", type=Path, help="directory of the draft, or a GGUF file")
    add_option(parser, "--output DIR", "the bundle; must not exist", type=Path, required=True)
    add_option(
        parser, "--graph", "fused: onnxruntime-genai's, fast; concat: optimum's", default="fused", choices=GRAPH_KINDS
    )
    add_option(
        parser,
        "--weights",
        "default: int8 for fused, which loses next to no acceptance, and fp32 for concat; int4 is smaller and "
        "loses up to half of a real model's acceptance; `draft-export forms` compares them",
        choices=WEIGHT_TYPES,
    )
    add_option(parser, "--context TOKENS", "longest text (default: the model's)", type=whole_number())
    add_option(parser, "--text", "text to measure on (default: one that ships with FlexSpec)", type=Path)
    add_option(parser, "--positions", "tokens of it to measure", default=2000)
    add_option(parser, "--trim-vocabulary FILE", "trim the head to this text's tokens and the special ones", type=Path)
    add_option(parser, "--head-size IDS", "keep at most this many, the most frequent", type=whole_number())
    add_flag(
        parser,
        "--no-acceptance",
        "do not measure acceptance: of the target's weights only the shared tensors are then read",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    from cloud_verifier.acceptance.measure import read_calibration_text
    from export.bundle.build import BUILD_STEPS, BundleConfig, make_bundle
    from export.bundle.chat_format import read_target_chat
    from export.common.progress import Progress

    config = BundleConfig(
        target=options.target,
        draft=options.draft,
        kind=options.graph,
        weights=options.weights or ("fp32" if options.graph == "concat" else "int8"),
        text=read_calibration_text() if options.text is None else _read_text(options.text),
        context=options.context,
        positions=options.positions,
        acceptance=not options.no_acceptance,
        head_text=None if options.trim_vocabulary is None else _read_text(options.trim_vocabulary),
        head_size=options.head_size,
    )
    with Progress("bundle", len(BUILD_STEPS)) as progress:
        manifest = make_bundle(config, options.output, lambda step: progress.update(BUILD_STEPS.index(step), step))
        progress.update(len(BUILD_STEPS), "done")
    _print_manifest(manifest, options.output)
    _print_chat(read_target_chat(options.target))
    return 0


def _print_manifest(manifest: Manifest, output: Path) -> None:
    size = sum(record.bytes for record in manifest.files.values())
    parity = manifest.parity
    print(f"{output}: {manifest.graph.kind} {manifest.graph.weights}, {size / 1e6:.1f} MB, {manifest.shared.identity}")
    print(
        f"parity with PyTorch over {parity.positions} positions: {parity.greedy_agreement:.1%} same argmax, "
        f"largest logit difference {parity.max_logit_difference:g}"
    )
    acceptance = ", ".join(f"{share:.1%} at {name}" for name, share in manifest.acceptance.items()) or "not measured"
    print(f"acceptance by the target on given text: {acceptance}")


def _print_chat(chat: TargetChat) -> None:
    names = ", ".join(sorted(chat.format.templates)) or "none, so that boards write chats as plain text"
    print(f"chat templates: {names}")
    defaults = msgspec.structs.asdict(chat.format.sampling)
    sampling = ", ".join(f"{name} {value:g}" for name, value in defaults.items() if value is not None)
    print(f"sampling defaults: {sampling or 'none'}")
    if chat.unsupported:
        print(f"boards do not support these defaults of the target and leave them out: {', '.join(chat.unsupported)}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text {path}: {error}") from None
