"""`draft-export evaluate`: how well a draft does with target versions, in tables and a picture."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.protocol.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from export.evaluate.proposers import Draft

DESCRIPTION = """\
Measures a draft against target versions: acceptance per position, tokens per round, expected speed on a board, and
retention, its acceptance over that of a draft that was made anew for a version; greedy, at T=0.7 and at T=1, along what
the target writes and along given text, each with a 95 % interval (bootstrap over texts). What merely repeats itself is
counted apart, for it flatters every draft.

BUNDLE is a bundle, run as a board runs it, or a draft's directory, run in PyTorch (on a GPU with --device cuda). A
target is the directory of a checkpoint, an adapter, or changed tensors; a bare name is looked for beside BUNDLE, too.

examples:
  draft-export evaluate export/example_family/bundle --target target-v1 target-v2 --output /tmp/evaluation
  draft-export evaluate export/example_family/draft-anchor --target target-v1 target-v2 \\
      --retrained target-v2=/tmp/draft-v2
  draft-export evaluate bundle --target /models/Llama-3.1-8B --text prose.txt code.py --temperature 0 --texts 16
  draft-export evaluate bundle --target v1 v2 --memory --profile jetson-orin-nano --link 4g --verifier 32b
"""

FILES = ("evaluation.json", "evaluation.md", "evaluation.png")


def add_parser(commands: Any) -> None:
    """Adds `evaluate` to argparse's sub-parsers."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a draft against target versions",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("draft", type=Path, metavar="BUNDLE", help="a bundle, or a draft's directory")
    parser.add_argument("--target", nargs="+", required=True, metavar="VERSION", help="directories of targets")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="held-out text (default: the family's)"
    )
    parser.add_argument(
        "--retrained", nargs="+", default=[], metavar="VERSION=DRAFT", help="drafts or bundles made for one version"
    )
    parser.add_argument("--memory", action="store_true", help="rows with the board's memory of verified text, too")
    parser.add_argument("--profile", default="raspberry-pi-5", help="board of the speeds (default: %(default)s)")
    parser.add_argument("--link", default="wifi", help="as `edge-runtime simulate` takes it (default: %(default)s)")
    parser.add_argument("--verifier", default="loaded", help="likewise (default: %(default)s)")
    parser.add_argument("--temperature", type=float, nargs="+", metavar="T", help="default: 0, 0.7 and 1")
    parser.add_argument("--texts", type=int, default=48, help="pieces of text (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each to read (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each to judge (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and bootstrap (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of PyTorch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"save {', '.join(FILES)} there; must not exist")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command. Returns the exit code; raises FlexSpecError."""
    import torch

    from cloud_verifier.model.target import base_of, load_model
    from export.common.atomic import new_directory
    from export.data.held_out import encoded, held_out
    from export.evaluate.evaluation import Order, evaluate
    from export.evaluate.report import draw, markdown
    from export.evaluate.speeds import Scene

    order = Order(
        options.texts,
        options.prompt,
        options.tokens,
        tuple(dict.fromkeys(options.temperature or Order.temperatures)),
        seed=options.seed,
    )
    scene = Scene(options.profile, options.link, options.verifier)
    if options.threads < 1:
        raise InputError(f"--threads {options.threads}: at least one thread must work")
    torch.set_num_threads(options.threads)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        # What follows its first line is for PyTorch's developers.
        raise InputError(f"--device {options.device} cannot be used here: {str(error).splitlines()[0]}") from None
    with contextlib.nullcontext() if options.output is None else new_directory(options.output) as output:
        versions = _versions(options.target, options.draft)
        first = next(iter(versions.values()))
        draft, tokenizer = open_draft(options.draft, base_of(first), options.device, options.threads)
        for path in versions.values():
            _check_tokenizer(options.draft, tokenizer, path)
        name = options.draft.resolve().name
        drafts = {name: draft}
        if options.memory:
            drafts[f"{name} + memory"] = _remembering(options.draft, options.threads)
        retrained = {}
        for version, path in _retrained(options.retrained, versions).items():
            other, its_tokenizer = open_draft(path, base_of(versions[version]), options.device, options.threads)
            _check_tokenizer(path, its_tokenizer, versions[version])
            retrained[version] = other
        documents = held_out(options.text)
        text = {name: [*chain.from_iterable(encoded(tokenizer, some))] for name, some in documents.items()}

        def loader(path: Path) -> Callable[[], Any]:
            return lambda: load_model(path, options.device, torch.float32)[0]

        targets = {version: loader(path) for version, path in versions.items()}
        evaluation = evaluate(drafts, targets, text, retrained=retrained, order=order, scene=scene)
        print(markdown(evaluation))
        if output is not None:
            record = evaluation.record() | {"draft": str(options.draft), "targets": [str(p) for p in versions.values()]}
            json_file, markdown_file, picture = (output / name for name in FILES)
            json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            markdown_file.write_text(markdown(evaluation), encoding="utf-8")
            draw(evaluation, picture)
    if options.output is not None:
        print(f"{options.output}: {', '.join(FILES)}")
    return 0


def open_draft(path: Path, target: Path, device: str = "cpu", threads: int = 1) -> tuple[Draft, Tokenizer]:
    """The draft at `path` and the tokenizer that it takes.

    Args:
        path: a bundle, or a directory that `cloud_verifier.draft_models.checkpoint` reads.
        target: the checkpoint that a draft's directory belongs to.

    Raises:
        InputError: there is neither here.
        BundleError, DraftError, TargetError: it cannot be used.
    """
    from cloud_verifier.draft_models.checkpoint import DESCRIPTION, load_draft
    from cloud_verifier.model.target import tokenizer_of
    from edge_runtime.draft.model import OnnxDraft
    from edge_runtime.protocol.bundle import MANIFEST
    from export.evaluate.estimates import estimate
    from export.evaluate.proposers import OnnxProposer, TorchProposer

    if (path / MANIFEST).exists():
        board = OnnxDraft.load(path, threads=threads)
        return OnnxProposer(board), board.tokenizer
    if not (path / DESCRIPTION).exists():
        raise InputError(f"no draft at {path}: it has neither {MANIFEST}, as bundles have, nor {DESCRIPTION}")
    model = load_draft(path, target).to(device)
    size = estimate(model.config)
    return TorchProposer(model, size.weight_bytes, size.cache_bytes), tokenizer_of(target, target)


def _remembering(path: Path, threads: int) -> Draft:
    """The bundle at `path` with a memory."""
    from edge_runtime.draft.model import OnnxDraft
    from edge_runtime.protocol.bundle import MANIFEST
    from export.evaluate.proposers import OnnxProposer

    if not (path / MANIFEST).exists():
        raise InputError(f"--memory: {path} is no bundle, and a memory is the board's; make one with draft-export onnx")
    return OnnxProposer(OnnxDraft.load(path, threads=threads), remembers=True)


def _versions(names: list[str], draft: Path) -> dict[str, Path]:
    """The targets' directories by their names."""
    found: dict[str, Path] = {}
    for name in names:
        path = next((place for place in _places(name, draft) if place.is_dir()), None)
        if path is None:
            beside = ", ".join(sorted(_targets_in(draft.resolve().parent))) or "none"
            raise InputError(
                f"unknown target version {name!r}: no such directory; beside the draft there are: {beside}"
            )
        path = path.resolve()
        if path.name in found:
            raise InputError(f"two targets are called {path.name!r}: name each once, or rename a directory")
        found[path.name] = path
    return found


def _places(name: str, draft: Path) -> Iterator[Path]:
    yield Path(name)
    if Path(name).name == name:
        yield draft.resolve().parent / name


def _targets_in(directory: Path) -> Iterator[str]:
    for path in directory.iterdir():
        if any((path / name).is_file() for name in ("config.json", "adapter_config.json", "changes.json")):
            yield path.name


def _retrained(arguments: list[str], versions: dict[str, Path]) -> dict[str, Path]:
    """Directories of retrained drafts by version."""
    found: dict[str, Path] = {}
    for argument in arguments:
        name, separator, place = argument.partition("=")
        if not separator or not name or not place:
            raise InputError(f"--retrained {argument!r}: write the version, =, and the draft's directory")
        version = Path(name).name
        if version not in versions:
            raise InputError(
                f"--retrained {argument!r}: version {version!r} is not evaluated; those evaluated are "
                f"{', '.join(versions)}"
            )
        if version in found:
            raise InputError(f"--retrained {argument!r}: version {version!r} has a retrained draft already")
        found[version] = Path(place)
    return found


def _check_tokenizer(draft: Path, tokenizer: Tokenizer, target: Path) -> None:
    from cloud_verifier.model.target import base_of, tokenizer_of
    from edge_runtime.protocol.bundle import vocabulary_hash

    theirs = tokenizer_of(target, base_of(target)).get_vocab(with_added_tokens=True)
    ours = tokenizer.get_vocab(with_added_tokens=True)
    if vocabulary_hash(theirs) != vocabulary_hash(ours):
        differing = len(ours.items() ^ theirs.items())
        raise InputError(
            f"the draft {draft} and the target {target} have different tokenizers ({len(ours)} and {len(theirs)} "
            f"tokens, {differing} entries differ): a draft needs its target's own"
        )
