"""`draft-export`: from a target checkpoint to the bundle that a board keeps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_runtime.protocol.bundle import Manifest
from edge_runtime.protocol.errors import FlexSpecError, InputError

DESCRIPTION = """\
Makes the frozen draft: trains it against a target, exports it to ONNX, and packs it for the board.

examples:
  draft-export onnx export/example_family/target-v1 export/example_family/draft-anchor --output /tmp/bundle
  draft-export onnx /models/Llama-3.2-1B /models/Llama-3.2-1B --weights int4 --output /tmp/bundle
  draft-export onnx /models/Llama-3.1-8B draft --weights int4 --context 4096 --no-acceptance --output /tmp/bundle
  draft-export forms export/example_family/target-v1 export/example_family/draft-anchor --output /tmp/forms
  draft-export distill /models/Llama-3.1-8B --text corpus/ --output draft
  draft-export family --size smoke --corpus /tmp/corpus --out /tmp/family
  draft-export evaluate export/example_family/bundle --target target-v1 target-v2 --output /tmp/evaluation
  draft-export doctor /models/Llama-3.1-8B --layout anchor --weights int4
  draft-export record export/example_family/bundle --target export/example_family/target-v1 --output acceptance.npz
  draft-export policy --output /tmp/policy
  draft-export keygen --output maker
  draft-export sign /tmp/bundle --key maker.key
"""

ONNX_DESCRIPTION = """\
Exports a draft and packs it into a bundle. DRAFT is a directory of `draft-export family` (the draft's own tensors; what
it shares comes from TARGET), or a whole Hugging Face model with TARGET's tokenizer, which is then a standalone draft.
Parity with PyTorch, and acceptance by TARGET, are measured on a text and written into the manifest.
"""

RECORD_DESCRIPTION = """\
Records how often, and how surely, the draft in BUNDLE guesses what targets write: an acceptance trace, on which
`edge-runtime simulate` plays plans without running a model. Every target continues every prompt at every temperature.

examples:
  draft-export record export/example_family/bundle --target export/example_family/target-v1 --output acceptance.npz
  draft-export record bundle --target /models/Llama-3.1-8B --text prompts.txt --prompts 8 --temperature 0 --output a.npz
"""

POLICY_DESCRIPTION = """\
Trains the policy of the learned planner (`edge-runtime --policy learned`) on simulated rounds: recorded acceptance, and
links, boards and verifiers at random around the shipped presets. Writes learned.onnx, learned.json with what it was
trained on and what it came to on texts that it has not seen, and learned.png with its learning curve.

examples:
  draft-export policy --steps 20000 --drills 100 --settings 50 --output /tmp/policy  # to see it work, seconds
  draft-export policy --output /tmp/policy                                             # five minutes on one CPU core
  draft-export policy --objective cloud --seed 1 --output /tmp/policy
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    from export.bundle import sign
    from export.cli import doctor, evaluate, forms
    from export.cli import family as growing
    from export.draft import distillation_run

    parser = argparse.ArgumentParser(
        prog="draft-export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    onnx = commands.add_parser("onnx", help="export a draft into a bundle", description=ONNX_DESCRIPTION)
    onnx.add_argument("target", type=Path, help="Hugging Face directory of the target")
    onnx.add_argument("draft", type=Path, help="directory of the draft")
    onnx.add_argument("--output", type=Path, required=True, metavar="DIR", help="the bundle; must not exist")
    onnx.add_argument(
        "--graph", default="fused", choices=["fused", "concat"], help="fused: fast; concat: optimum's (default: fused)"
    )
    onnx.add_argument(
        "--weights",
        choices=["fp32", "fp16", "int8", "mixed", "int4", "int4-k", "int4-head8", "int4-head32"],
        help="default: int8; concat: fp32; `draft-export forms` compares them",
    )
    onnx.add_argument("--context", type=int, metavar="TOKENS", help="longest text (default: the model's)")
    onnx.add_argument("--text", type=Path, help="what to measure on (default: FlexSpec's own sources)")
    onnx.add_argument("--positions", type=int, default=2000, help="how many tokens of it (default: %(default)s)")
    onnx.add_argument(
        "--trim-vocabulary", type=Path, metavar="FILE", help="trim the head to this text's tokens and special ones"
    )
    onnx.add_argument("--head-size", type=int, metavar="IDS", help="and to so many of them, the most frequent")
    onnx.add_argument(
        "--no-acceptance",
        action="store_true",
        help="do not measure it: needs no memory for the target, and of its tensors only those that the draft shares",
    )
    onnx.set_defaults(run=_onnx)
    family = commands.add_parser(
        "family",
        help="train the example family from nothing",
        description=growing.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    growing.add_arguments(family)
    family.set_defaults(run=growing.run_with)
    record = commands.add_parser(
        "record",
        help="record how a draft is accepted, for simulations",
        description=RECORD_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    record.add_argument("bundle", type=Path, help="bundle of the draft")
    record.add_argument(
        "--target", type=Path, action="append", required=True, metavar="DIR", help="directory of a target, may repeat"
    )
    record.add_argument("--output", type=Path, required=True, metavar="FILE", help="the trace, .npz; replaced if there")
    record.add_argument(
        "--temperature", type=float, action="append", metavar="T", help="may repeat (default: 0, 0.7 and 1)"
    )
    record.add_argument("--top-p", type=float, default=1.0, help="at temperatures above 0 (default: %(default)s)")
    record.add_argument("--prompts", type=int, default=24, help="default: %(default)s")
    record.add_argument("--tokens", type=int, default=128, help="of each text (default: %(default)s)")
    record.add_argument("--seed", type=int, default=0, help="of prompts and sampling (default: %(default)s)")
    record.add_argument("--text", type=Path, help="what prompts are cut from (default: the family's held-out files)")
    record.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    record.set_defaults(run=_record)
    sign.add_parsers(commands)
    distillation_run.add_parser(commands)
    forms.add_parser(commands)
    evaluate.add_parser(commands)
    doctor.add_parser(commands)
    policy = commands.add_parser(
        "policy",
        help="train the learned planner's policy",
        description=POLICY_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    policy.add_argument("--output", type=Path, required=True, metavar="DIR", help="files of its names are replaced")
    policy.add_argument("--steps", type=int, default=200_000, help="simulated rounds (default: %(default)s)")
    policy.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    policy.add_argument(
        "--objective", default="latency", help="latency, cloud, energy, balanced, or prices (default: %(default)s)"
    )
    policy.add_argument(
        "--drills", type=int, default=6000, help="settings to try each correction in first (default: %(default)s)"
    )
    policy.add_argument("--settings", type=int, default=1000, help="to evaluate on (default: %(default)s)")
    policy.set_defaults(run=_policy)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except FlexSpecError as error:
        print(f"draft-export: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _onnx(options: argparse.Namespace) -> int:
    from export.bundle.build import STEPS, BundleOrder, make_bundle
    from export.common.progress import Progress

    order = BundleOrder(
        options.target,
        options.draft,
        options.graph,
        options.weights or ("fp32" if options.graph == "concat" else "int8"),
        _text(options.text),
        options.context,
        options.positions,
        not options.no_acceptance,
        None if options.trim_vocabulary is None else _text(options.trim_vocabulary),
        options.head_size,
    )
    with Progress("bundle", len(STEPS)) as progress:
        manifest = make_bundle(order, options.output, lambda step: progress.update(STEPS.index(step), step))
        progress.update(len(STEPS), "done")
    _print(manifest, options.output)
    return 0


def _record(options: argparse.Namespace) -> int:
    from export.evaluate.record import Recording, record

    order = Recording(
        options.bundle,
        tuple(options.target),
        tuple(options.temperature or (0.0, 0.7, 1.0)),
        top_p=options.top_p,
        prompts=options.prompts,
        tokens=options.tokens,
        seed=options.seed,
        text=options.text,
        threads=options.threads,
    )
    texts = record(order, options.output)
    print(f"{options.output}: {len(texts)} texts, {options.output.stat().st_size / 1e3:.0f} kB")
    for target, temperature in dict.fromkeys((text.target, text.temperature) for text in texts):
        some = [text for text in texts if (text.target, text.temperature) == (target, temperature)]
        share = sum(text.acceptance for text in some) / len(some)
        print(f"  {target} T={temperature:g}: {share:.1%} of {sum(map(len, some))} guesses are the target's token")
    return 0


def _policy(options: argparse.Namespace) -> int:
    from edge_runtime.planning.objective import parse_objective
    from export.planner_policy.train import Lesson, make_policy

    lesson = Lesson(parse_objective(options.objective), options.steps, options.seed, options.settings, options.drills)
    training = make_policy(lesson, options.output)
    evaluation = training.trained["evaluation"]
    print(f"{options.output}: cost on texts not learned from, as a multiple of the analytic planner's, modelled:")
    print("  " + ", ".join(f"{name} {value:g}" for name, value in evaluation.items()))
    return 0


def _print(manifest: Manifest, output: Path) -> None:
    size = sum(record.bytes for record in manifest.files.values())
    parity = manifest.parity
    print(f"{output}: {manifest.graph.kind} {manifest.graph.weights}, {size / 1e6:.1f} MB, {manifest.shared.identity}")
    print(
        f"parity with PyTorch over {parity.positions} positions: {parity.greedy_agreement:.1%} same argmax, "
        f"largest logit difference {parity.max_logit_difference:g}"
    )
    accepted = ", ".join(f"{share:.1%} at {name}" for name, share in manifest.acceptance.items()) or "not measured"
    print(f"acceptance by the target on given text: {accepted}")


def _text(path: Path | None) -> str:
    if path is None:
        sources = sorted((Path(__file__).parents[2] / "edge_runtime").rglob("*.py"))
        return "\n".join(source.read_text() for source in sources)
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text {path}: {error}") from None
