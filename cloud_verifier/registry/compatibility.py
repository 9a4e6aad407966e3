"""The gate: whether the drafts that boards have fit a target version, told from its files alone.

A frozen draft goes on fitting as long as a version keeps the tokenizer, the special ids and every tensor that the draft
shares. Weights are read piece by piece, to be hashed; no model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from tokenizers import Tokenizer

from cloud_verifier.registry.catalog import Kind
from cloud_verifier.registry.checkpoint import (
    base_of,
    check_whole,
    config_of,
    end_ids_of,
    kind_of,
    shared_fingerprints,
    tokenizer_of,
    version_hash,
    vocabulary_of,
)
from edge_runtime.protocol.bundle import Bundle, read_bundle
from edge_runtime.protocol.errors import DraftError, TargetError

# Of several tokens that differ, so many are named.
MOST_NAMED = 5


class Difference(msgspec.Struct, frozen=True):
    """One thing in which a version is not what a draft, or the version in use, has.

    Attributes:
        what: a token of the `vocabulary`, a `special id`, a `tensor`, the number of `logits`, or the ids that `end` a
            text.
        name: of the token or tensor; may be empty.
        why: the difference.
    """

    what: Literal["vocabulary", "special id", "tensor", "logits", "end"]
    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.what} {self.name}: {self.why}" if self.name else f"{self.what}: {self.why}"


class Fit(msgspec.Struct, frozen=True):
    """How a draft fits: `differences` is empty where it does."""

    draft: str
    identity: str
    differences: list[Difference]


class Examined(msgspec.Struct, frozen=True):
    """What the gate found.

    Attributes:
        version: exact.
        fits: of each draft.
        differences: from the version in use, as far as no draft tells them.
    """

    version: str
    kind: Kind
    fits: list[Fit]
    differences: list[Difference]

    @property
    def compatible(self) -> bool:
        return not self.differences and not any(fit.differences for fit in self.fits)

    def report(self) -> str:
        """Every difference, a line each; empty if there is none."""
        lines = [f"  {difference}, against the version in use" for difference in self.differences]
        lines += [
            f"  {difference}, against the draft {fit.draft}" for fit in self.fits for difference in fit.differences
        ]
        return "\n".join(lines)


class Incompatible(TargetError):
    """A version that the deployed drafts do not fit. `examined` says why."""

    def __init__(self, examined: Examined) -> None:
        super().__init__(
            f"{examined.version} is not what the deployed drafts were made for:\n{examined.report()}\n"
            "boards with these drafts would be refused; admit it with --unshared if that is meant"
        )
        self.examined = examined


def examine(path: Path, drafts: Sequence[Path], in_use: Path | None = None) -> Examined:
    """Compares the version at `path` with every bundle of `drafts`, and with the version at `in_use`.

    Raises:
        TargetError: there is no whole target at `path`.
        BundleError: a bundle cannot be read.
    """
    path = path.resolve()
    base = base_of(path)
    config = config_of(base)
    check_whole(base)
    tokenizer = tokenizer_of(path, base)
    known: dict[tuple[str, int], dict[str, str]] = {}
    fits = []
    for place in drafts:
        bundle = read_bundle(place)
        shared = bundle.manifest.shared
        layout = (shared.layout, shared.blocks)
        if layout not in known:
            known[layout] = shared_fingerprints(path, base, *layout, config.num_hidden_layers)
        differences = [
            *_vocabulary_differences(tokenizer, bundle),
            *_tensor_differences(known[layout], shared.fingerprints),
        ]
        needed = bundle.manifest.architecture.vocabulary_size
        if config.vocab_size < needed:
            differences.append(Difference("logits", "", f"{config.vocab_size}, and the draft has {needed}"))
        fits.append(Fit(str(place), shared.identity, differences))
    between = []
    if in_use is not None:
        other = base_of(in_use.resolve())
        for what, mine, theirs in (
            ("vocabulary", vocabulary_of(tokenizer), vocabulary_of(tokenizer_of(in_use, other))),
            ("end", end_ids_of(base), end_ids_of(other)),
        ):
            if mine != theirs:
                between.append(Difference(what, "", f"{mine}, was {theirs}"))  # type: ignore[arg-type]
    return Examined(f"{path.name}@{version_hash(path, base)}", kind_of(path, base), fits, between)


def _vocabulary_differences(tokenizer: Tokenizer, bundle: Bundle) -> Iterator[Difference]:
    said = bundle.manifest.vocabulary
    if vocabulary_of(tokenizer) != said.hash:
        try:
            draft = Tokenizer.from_file(str(bundle.tokenizer_path)).get_vocab(with_added_tokens=True)
        except Exception as error:  # tokenizers raises bare Exception
            raise DraftError(f"{bundle.tokenizer_path} is not a tokenizer: {error}; copy the bundle again") from None
        target = tokenizer.get_vocab(with_added_tokens=True)
        other = sorted(token for token in draft.keys() | target.keys() if draft.get(token) != target.get(token))
        for token in other[:MOST_NAMED]:
            yield Difference("vocabulary", repr(token), _ids(target.get(token), draft.get(token)))
        if other[MOST_NAMED:] or not other:
            left = f"{len(other) - MOST_NAMED} more tokens" if other else "another hash"
            yield Difference("vocabulary", "", left)
    special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for token in sorted(special.keys() | said.special_ids.keys()):
        if special.get(token) != said.special_ids.get(token):
            yield Difference("special id", repr(token), _ids(special.get(token), said.special_ids.get(token)))


def _ids(target: int | None, draft: int | None) -> str:
    return f"{'none' if target is None else target}, and the draft has {'none' if draft is None else draft}"


def _tensor_differences(target: dict[str, str], draft: dict[str, str]) -> Iterator[Difference]:
    for name in sorted(target.keys() | draft.keys()):
        mine = target.get(name)
        if mine == draft.get(name):
            continue
        if mine is None:
            why = "the version has no such tensor"
        elif name not in draft:
            why = "the draft has no such tensor"
        elif mine.endswith("+adapter"):
            why = "an adapter changes it"
        else:
            why = "it has other values"
        yield Difference("tensor", name, why)
