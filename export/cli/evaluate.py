"""`draft-export evaluate`: measures drafts against target versions, in tables and a chart."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.common.options import add_option, number
from edge_runtime.protocol.errors import InputError
from export.cli.former_options import add_removed_ngram_cache_options

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from export.evaluate.evaluation import Evaluation
    from export.evaluate.proposers import Proposer

DESCRIPTION = """\
Measures a draft against target versions: acceptance by position, tokens per round, expected speed on a board, and
retention, which is its acceptance divided by that of a draft retrained for the version; greedy, at T=0.7 and at T=1,
along what the target generates and along given text, each with a 95 % bootstrap interval over texts. Loops are counted
separately, because they inflate the acceptance of every draft. Without --text and --chats: chats that no draft was
trained on, everyday questions, and source code.

BUNDLE is a bundle, run as a board runs it, or a draft's directory, run in PyTorch (on a GPU with --device cuda). A
target is the directory of a checkpoint, an adapter, or changed tensors; a bare name is also looked up next to BUNDLE.

examples:
  draft-export evaluate family/bundle --target target-v1 target-v2 --output /tmp/evaluation
  draft-export evaluate tests/toy_family/draft-anchor --target target-v1 target-v2 \\
      --retrained target-v2=/tmp/draft-v2
  draft-export evaluate bundle --target /models/Llama-3.1-8B --text prose.txt code.py --temperature 0 --texts 16
  draft-export evaluate bundle --target v1 v2 --profile jetson-orin-nano --link 4g --verifier 32b
"""

JSON_FILE, MARKDOWN_FILE, CHART_FILE = "evaluation.json", "evaluation.md", "evaluation.png"
OUTPUT_FILES = (JSON_FILE, MARKDOWN_FILE, CHART_FILE)
# Any of these in a directory marks it as a target version.
TARGET_FILES = ("config.json", "adapter_config.json", "changes.json")


def add_parser(commands: Any) -> None:
    """Add `evaluate` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a draft against target versions",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("draft", type=Path, metavar="BUNDLE", help="a bundle, or a draft's directory")
    add_option(parser, "--target VERSION", "directories of targets", nargs="+", required=True)
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="held-out text")
    parser.add_argument(
        "--chats", type=Path, nargs="+", default=[], metavar="FILE", help="prompts as JSON lines with `messages`"
    )
    parser.add_argument(
        "--retrained", nargs="+", default=[], metavar="VERSION=DRAFT", help="drafts or bundles made for one version"
    )
    add_removed_ngram_cache_options(parser)
    add_option(parser, "--profile", "board of the modeled speed", default="raspberry-pi-5")
    add_option(parser, "--link", "link, as in `edge-runtime simulate`", default="wifi")
    add_option(parser, "--verifier", "verifier, as in `edge-runtime simulate`", default="loaded")
    add_option(parser, "--temperature T", "default: 0, 0.7 and 1", type=number(), nargs="+")
    add_option(parser, "--texts", "pieces of text", default=48)
    add_option(parser, "--prompt", "tokens of each to prefill", default=64)
    add_option(parser, "--tokens", "tokens of each to judge", default=128)
    add_option(parser, "--seed", "seed of noise and bootstrap", default=0)
    add_option(parser, "--device", "of PyTorch", default="cpu")
    add_option(parser, "--threads", "CPU threads", default=1)
    add_option(parser, "--output DIR", f"save {', '.join(OUTPUT_FILES)} there; must not exist", type=Path)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises FlexSpecError."""
    import torch

    from export.common.atomic import new_directory
    from export.evaluate.report import format_markdown

    if options.threads < 1:
        raise InputError(f"--threads {options.threads}: at least one thread is needed")
    torch.set_num_threads(options.threads)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        # The lines after the first are for developers of PyTorch.
        raise InputError(f"--device {options.device} cannot be used here: {str(error).splitlines()[0]}") from None
    with contextlib.nullcontext() if options.output is None else new_directory(options.output) as output:
        versions = _find_versions(options.target, options.draft)
        evaluation = _evaluate(options, versions)
        print(format_markdown(evaluation))
        if output is not None:
            _save(evaluation, output, {"draft": str(options.draft), "targets": [str(p) for p in versions.values()]})
    if options.output is not None:
        print(f"{options.output}: {', '.join(OUTPUT_FILES)}")
    return 0


def _evaluate(options: argparse.Namespace, versions: dict[str, Path]) -> Evaluation:
    """Load drafts and texts, and measure."""
    import torch

    from cloud_verifier.model.target import load_model
    from cloud_verifier.registry.checkpoint import base_directory
    from export.evaluate.evaluation import EvaluationConfig, evaluate
    from export.evaluate.prompts import load_prompts
    from export.evaluate.speeds import SimulatedDeployment

    config = EvaluationConfig(
        texts=options.texts,
        prompt=options.prompt,
        tokens=options.tokens,
        temperatures=tuple(dict.fromkeys(options.temperature or EvaluationConfig.temperatures)),
        seed=options.seed,
    )
    deployment = SimulatedDeployment(options.profile, options.link, options.verifier)
    first = next(iter(versions.values()))
    draft, tokenizer = open_draft(options.draft, base_directory(first), options.device, options.threads)
    for path in versions.values():
        _check_tokenizer(options.draft, tokenizer, path)
    retrained = {}
    for version, path in _parse_retrained(options.retrained, versions).items():
        base = base_directory(versions[version])
        other, other_tokenizer = open_draft(path, base, options.device, options.threads)
        _check_tokenizer(path, other_tokenizer, versions[version])
        retrained[version] = other
    texts = load_prompts(tokenizer, base_directory(first), options.text, options.chats)

    def make_loader(path: Path) -> Callable[[], Any]:
        return lambda: load_model(path, options.device, torch.float32)[0]

    targets = {version: make_loader(path) for version, path in versions.items()}
    return evaluate(
        {options.draft.resolve().name: draft}, targets, texts, retrained=retrained, config=config, deployment=deployment
    )


def _save(evaluation: Evaluation, directory: Path, sources: dict[str, Any]) -> None:
    from export.evaluate.report import format_markdown, save_chart

    record = json.dumps(evaluation.record() | sources, indent=1)
    (directory / JSON_FILE).write_text(record + "\n", encoding="utf-8")
    (directory / MARKDOWN_FILE).write_text(format_markdown(evaluation), encoding="utf-8")
    save_chart(evaluation, directory / CHART_FILE)


def open_draft(path: Path, target: Path, device: str = "cpu", threads: int = 1) -> tuple[Proposer, Tokenizer]:
    """Open the draft at `path`; return it with its tokenizer.

    Args:
        path: a bundle, or a directory that `cloud_verifier.draft_models.checkpoint` reads.
        target: the checkpoint that a draft's directory belongs to.

    Raises:
        InputError: there is neither a bundle nor a draft.
        BundleError, DraftError, TargetError: it cannot be used.
    """
    from cloud_verifier.draft_models.checkpoint import DESCRIPTION_FILE, load_draft
    from cloud_verifier.registry.checkpoint import load_tokenizer
    from edge_runtime.draft import OnnxDraft
    from edge_runtime.protocol.bundle import MANIFEST_NAME
    from export.evaluate.estimates import estimate_size
    from export.evaluate.proposers import OnnxProposer, TorchProposer

    if (path / MANIFEST_NAME).exists():
        board_draft = OnnxDraft.load(path, threads=threads)
        return OnnxProposer(board_draft), board_draft.tokenizer
    if not (path / DESCRIPTION_FILE).exists():
        raise InputError(f"no draft at {path}: it has neither {MANIFEST_NAME}, as bundles have, nor {DESCRIPTION_FILE}")
    model: Any = load_draft(path, target)
    model.to(device)
    size = estimate_size(model.config)
    return TorchProposer(model, size.weight_bytes, size.cache_bytes), load_tokenizer(target, target)


def _find_versions(names: list[str], draft: Path) -> dict[str, Path]:
    """Directories of the targets by name."""
    versions: dict[str, Path] = {}
    for name in names:
        path = next((candidate for candidate in _candidate_paths(name, draft) if candidate.is_dir()), None)
        if path is None:
            known = ", ".join(sorted(_target_names(draft.resolve().parent))) or "none"
            raise InputError(
                f"unknown target version {name!r}: no such directory; next to the draft there are: {known}"
            )
        path = path.resolve()
        if path.name in versions:
            raise InputError(f"two targets are named {path.name!r}: give each once, or rename a directory")
        versions[path.name] = path
    return versions


def _candidate_paths(name: str, draft: Path) -> Iterator[Path]:
    yield Path(name)
    if Path(name).name == name:
        yield draft.resolve().parent / name


def _target_names(directory: Path) -> Iterator[str]:
    for path in directory.iterdir():
        if any((path / name).is_file() for name in TARGET_FILES):
            yield path.name


def _parse_retrained(arguments: list[str], versions: dict[str, Path]) -> dict[str, Path]:
    """Directories of retrained drafts by version."""
    retrained: dict[str, Path] = {}
    for argument in arguments:
        name, separator, directory = argument.partition("=")
        if not separator or not name or not directory:
            raise InputError(f"--retrained {argument!r}: write the version, =, and the draft's directory")
        version = Path(name).name
        if version not in versions:
            raise InputError(
                f"--retrained {argument!r}: version {version!r} is not evaluated; those evaluated are "
                f"{', '.join(versions)}"
            )
        if version in retrained:
            raise InputError(f"--retrained {argument!r}: version {version!r} already has a retrained draft")
        retrained[version] = Path(directory)
    return retrained


def _check_tokenizer(draft: Path, tokenizer: Tokenizer, target: Path) -> None:
    from cloud_verifier.registry.checkpoint import accepted_vocabularies, base_directory, load_tokenizer
    from edge_runtime.protocol.bundle import hash_vocabulary

    target_tokenizer = load_tokenizer(target, base_directory(target))
    theirs, ours = (each.get_vocab(with_added_tokens=True) for each in (target_tokenizer, tokenizer))
    if hash_vocabulary(ours) not in accepted_vocabularies(target_tokenizer):
        differing = len(ours.items() ^ theirs.items())
        raise InputError(
            f"the draft {draft} and the target {target} have different tokenizers ({len(ours)} and {len(theirs)} "
            f"tokens, {differing} entries differ): a draft needs its target's own"
        )
