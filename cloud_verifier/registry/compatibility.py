"""The compatibility gate: whether the drafts deployed on boards fit a target version, judged from its files alone.

A frozen draft keeps fitting as long as a version keeps the tokenizer, the special ids and every tensor that the draft
shares. Weights are read and hashed tensor by tensor; no model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from tokenizers import Tokenizer

from cloud_verifier.registry.adapter import check_adapter, is_adapter
from cloud_verifier.registry.catalog import VersionKind
from cloud_verifier.registry.checkpoint import (
    accepted_vocabularies,
    base_directory,
    load_config,
    load_tokenizer,
    read_end_ids,
    shared_fingerprints,
    tokenizer_vocabulary_hash,
    version_kind,
    version_name,
)
from cloud_verifier.registry.version_files import version_hash
from edge_runtime.protocol.bundle import Bundle, read_bundle
from edge_runtime.protocol.errors import DraftError, TargetError

# Of the tokens that differ, a report names this many.
MAX_NAMED_TOKENS = 5


class Difference(msgspec.Struct, frozen=True):
    """One difference of a version from a draft, or from the version in use.

    Attributes:
        what: a token of the `vocabulary`, a `special id`, a `tensor`, the number of `logits`, or the `end`-of-text ids.
        name: of the token or tensor; may be empty.
    """

    what: Literal["vocabulary", "special id", "tensor", "logits", "end"]
    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.what} {self.name}: {self.why}" if self.name else f"{self.what}: {self.why}"


class DraftFit(msgspec.Struct, frozen=True):
    """How a draft fits a version: `differences` is empty if it does."""

    draft: str
    identity: str
    differences: list[Difference]


class CompatibilityReport(msgspec.Struct, frozen=True):
    """The findings of the gate on one version.

    Attributes:
        version: exact version.
        fits: one entry per draft.
        differences: from the version in use, in properties that drafts do not record.
    """

    version: str
    kind: VersionKind
    fits: list[DraftFit]
    differences: list[Difference]

    @property
    def compatible(self) -> bool:
        return not self.differences and not any(fit.differences for fit in self.fits)

    def describe(self) -> str:
        """Every difference, one per line; empty if there is none."""
        lines = [f"  {difference}, compared with the version in use" for difference in self.differences]
        lines += [
            f"  {difference}, compared with the draft {fit.draft}"
            for fit in self.fits
            for difference in fit.differences
        ]
        return "\n".join(lines)


class IncompatibleVersion(TargetError):
    """A version that deployed drafts do not fit.

    Attributes:
        report: the findings of the gate.
    """

    def __init__(self, report: CompatibilityReport) -> None:
        super().__init__(
            f"{report.version} does not match what the deployed drafts were made for:\n{report.describe()}\n"
            "boards with these drafts would be refused; add --unshared to admit it anyway"
        )
        self.report = report


def check_compatibility(path: Path, drafts: Sequence[Path], in_use: Path | None = None) -> CompatibilityReport:
    """Compare the version at `path` with every bundle of `drafts`, and with the version at `in_use`.

    Raises:
        TargetError: there is no complete target at `path`.
        BundleError: a bundle cannot be read.
    """
    name = version_name(path)
    path = path.resolve()
    base = base_directory(path)
    config = load_config(base).get_text_config(decoder=True)
    # Recurrent models may name no number of layers; no draft shares any of theirs.
    depth: int = getattr(config, "num_hidden_layers", 0)
    version = f"{name}@{version_hash(path, base)}"
    if is_adapter(path):
        check_adapter(path)
    tokenizer = load_tokenizer(path, base)
    accepted = accepted_vocabularies(tokenizer)
    known: dict[tuple[str, int, int | None], dict[str, str]] = {}
    fits = []
    for draft in drafts:
        bundle = read_bundle(draft)
        shared = bundle.manifest.shared
        draft_logits = bundle.manifest.architecture.vocabulary_size
        # Where special tokens were added, the embedding has more rows, which the draft does not need.
        rows = accepted.get(bundle.manifest.vocabulary.hash)
        rows = rows if rows == draft_logits else None
        layout = (shared.layout, shared.blocks, rows)
        if layout not in known:
            known[layout] = shared_fingerprints(path, base, shared.layout, shared.blocks, depth, rows=rows)
        differences = [*_compare_vocabulary(tokenizer, bundle), *_compare_tensors(known[layout], shared.fingerprints)]
        if config.vocab_size < draft_logits:
            differences.append(Difference("logits", "", f"{config.vocab_size}, and the draft has {draft_logits}"))
        fits.append(DraftFit(str(draft), shared.identity, differences))
    return CompatibilityReport(
        version=version,
        kind=version_kind(path, base),
        fits=fits,
        differences=[] if in_use is None else list(_compare_with_version(base, tokenizer, in_use)),
    )


def _compare_with_version(base: Path, tokenizer: Tokenizer, in_use: Path) -> Iterator[Difference]:
    base_in_use = base_directory(in_use.resolve())
    accepted = accepted_vocabularies(tokenizer)
    old_hash = tokenizer_vocabulary_hash(load_tokenizer(in_use, base_in_use))
    if old_hash not in accepted:
        yield Difference("vocabulary", "", f"{next(iter(accepted))}, was {old_hash}")
    new_ids, old_ids = read_end_ids(base), read_end_ids(base_in_use)
    if new_ids != old_ids:
        yield Difference("end", "", f"{new_ids}, was {old_ids}")


def _compare_vocabulary(tokenizer: Tokenizer, bundle: Bundle) -> Iterator[Difference]:
    expected, accepted = bundle.manifest.vocabulary, accepted_vocabularies(tokenizer)
    if expected.hash not in accepted:
        try:
            draft = Tokenizer.from_file(str(bundle.tokenizer_path)).get_vocab(with_added_tokens=True)
        except Exception as error:  # tokenizers raises bare Exception
            raise DraftError(f"{bundle.tokenizer_path} is not a tokenizer: {error}; copy the bundle again") from None
        target = tokenizer.get_vocab(with_added_tokens=True)
        differing = sorted(token for token in draft.keys() | target.keys() if draft.get(token) != target.get(token))
        for token in differing[:MAX_NAMED_TOKENS]:
            yield Difference("vocabulary", repr(token), _describe_ids(target.get(token), draft.get(token)))
        if differing[MAX_NAMED_TOKENS:] or not differing:
            rest = f"{len(differing) - MAX_NAMED_TOKENS} more tokens" if differing else "another hash"
            yield Difference("vocabulary", "", rest)
    first_added = accepted.get(expected.hash)
    special = {
        token.content: index
        for index, token in tokenizer.get_added_tokens_decoder().items()
        if token.special and (first_added is None or index < first_added)
    }
    for token in sorted(special.keys() | expected.special_ids.keys()):
        target_id, draft_id = special.get(token), expected.special_ids.get(token)
        if target_id != draft_id:
            yield Difference("special id", repr(token), _describe_ids(target_id, draft_id))


def _describe_ids(target: int | None, draft: int | None) -> str:
    return f"{'none' if target is None else target}, and the draft has {'none' if draft is None else draft}"


def _compare_tensors(target: dict[str, str], draft: dict[str, str]) -> Iterator[Difference]:
    """Compare fingerprints by tensor name."""
    for name in sorted(target.keys() | draft.keys()):
        fingerprint = target.get(name)
        if fingerprint == draft.get(name):
            continue
        if fingerprint is None:
            why = "the version has no such tensor"
        elif name not in draft:
            why = "the draft has no such tensor"
        elif fingerprint.endswith("+adapter"):
            why = "an adapter changes it"
        else:
            why = "it has other values"
        yield Difference("tensor", name, why)
