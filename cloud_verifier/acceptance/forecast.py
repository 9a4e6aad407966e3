"""What a draft is worth to a target version before it is rolled out: how often it says what the version would say.

The draft follows a text, as it follows every answer: at each position, given all tokens before it, its choice is the
version's or it is not, both drawn with the same noise. Several versions are asked about the same positions, so that
the difference between two is known better than either figure. A text of one's own traffic (`--text`) tells more than
the one that ships (`calibration.txt`: Python, C++ and prose of this project's, on which nothing was trained).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import msgspec
import torch

from cloud_verifier.acceptance.bootstrap import Bootstrap, Interval
from cloud_verifier.model.sampling import Warping, choose
from cloud_verifier.model.target import load_model
from cloud_verifier.registry.checkpoint import base_of, tokenizer_of, vocabulary_of
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.protocol.errors import InputError, TargetError
from edge_runtime.protocol.sampling import Sampling

TEXT = "calibration.txt"
TEMPERATURES = (0.0, 1.0)
# Of a passage: tokens that are only read, and tokens that are guessed.
READ, JUDGED = 64, 128
MOST_PASSAGES = 48
# Passages are what is drawn for intervals; of fewer than this nothing can be said.
FEWEST_PASSAGES = 8
RESAMPLES = 2000


class Expectation(msgspec.Struct, frozen=True):
    """Acceptance at one temperature, as shares of the positions.

    Attributes:
        of: each version's, in the order in which they were given.
        change: from the last version to the first; None where there is one only.
    """

    temperature: float
    of: list[Interval]
    change: Interval | None


class Forecast(msgspec.Struct, frozen=True):
    """How often the draft would be right.

    Attributes:
        draft: directory of the bundle.
        versions: exact, or directories.
        positions: how many were judged, in how many passages.
    """

    draft: str
    versions: list[str]
    positions: int
    passages: int
    expectations: list[Expectation]

    @property
    def loss(self) -> float:
        """The most that the first version loses against the last, in points; negative where it gains."""
        return max((-100 * e.change.value for e in self.expectations if e.change is not None), default=0.0)


def forecast(
    bundle: Path,
    versions: Sequence[tuple[str, Path]],
    text: Path | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 0,
) -> Forecast:
    """Measures the draft in `bundle` against each of `versions`, which are loaded one after the other.

    Args:
        versions: what to call it, and its directory; the first is compared with the last.
        text: what to follow; None for the one that ships.
        threads: CPU threads of draft and target; 0 leaves it to them.

    Raises:
        InputError: the text cannot be read, or is too short.
        TargetError: a version does not load, or has another vocabulary than the draft.
        BundleError, DraftError: the draft does not load.
    """
    if threads:
        torch.set_num_threads(threads)
    found = read_bundle(bundle)
    for name, path in versions:
        theirs = vocabulary_of(tokenizer_of(path, base_of(path)))
        if theirs != found.manifest.vocabulary.hash:
            raise TargetError(
                f"{name} has the vocabulary {theirs}, the draft in {bundle} {found.manifest.vocabulary.hash}: "
                "no token of the one means anything to the other, so there is nothing to measure"
            )
    draft = OnnxDraft(found, threads)
    passages = _passages(draft, text)
    guesses = {temperature: _guessed(draft, passages, temperature) for temperature in TEMPERATURES}
    hits: dict[float, list[list[int]]] = {temperature: [] for temperature in TEMPERATURES}
    for _, path in versions:
        chosen = _chosen(path, passages, device, dtype)
        for temperature in TEMPERATURES:
            pairs = zip(guesses[temperature], chosen[temperature], strict=True)
            hits[temperature].append([sum(a == b for a, b in zip(mine, true, strict=True)) for mine, true in pairs])
    return Forecast(
        str(bundle),
        [name for name, _ in versions],
        JUDGED * len(passages),
        len(passages),
        [_expectation(temperature, counts) for temperature, counts in hits.items()],
    )


def _expectation(temperature: float, hits: list[list[int]]) -> Expectation:
    """From the hits of each version in each passage."""
    bootstrap = Bootstrap(RESAMPLES, 0)

    def share(counts: Sequence[float]) -> Interval:
        interval = bootstrap.ratio([(count, JUDGED) for count in counts])
        assert interval is not None  # no passage is empty
        return interval

    change = [first - last for first, last in zip(hits[0], hits[-1], strict=True)]
    return Expectation(temperature, [share(counts) for counts in hits], share(change) if len(hits) > 1 else None)


def _passages(draft: OnnxDraft, text: Path | None) -> list[list[int]]:
    """Pieces of READ + JUDGED tokens, from all over the text."""
    try:
        source = text if text is not None else files("cloud_verifier.acceptance") / TEXT
        words = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --text {text}: {error}") from None
    ids = draft.tokenizer.encode(words, add_special_tokens=False).ids
    length = READ + JUDGED
    if length > draft.manifest.architecture.context:
        raise InputError(f"the draft's context is shorter than a passage of {length} tokens; nothing can be measured")
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if len(pieces) < FEWEST_PASSAGES:
        raise InputError(f"the text has {len(ids)} tokens: give a --text of at least {FEWEST_PASSAGES * length}")
    step = max(1.0, len(pieces) / MOST_PASSAGES)
    return [pieces[int(index * step)] for index in range(min(len(pieces), MOST_PASSAGES))]


def _sampling(temperature: float, index: int) -> Sampling:
    return Sampling(temperature=temperature, seed=index)


def _guessed(draft: OnnxDraft, passages: list[list[int]], temperature: float) -> list[list[int]]:
    """The draft's token for every judged position of each passage."""
    guessed = []
    for index, ids in enumerate(passages):
        context, sampling = draft.context(), _sampling(temperature, index)
        guessed.append([context.propose(ids[:end], 1, sampling).tokens[0] for end in range(READ, len(ids))])
    return guessed


@torch.inference_mode()
def _chosen(path: Path, passages: list[list[int]], device: str, dtype: str) -> dict[float, list[list[int]]]:
    """The target's, at each temperature."""
    model, _, _ = load_model(path, device, dtype)
    chosen: dict[float, list[list[int]]] = {temperature: [] for temperature in TEMPERATURES}
    for index, ids in enumerate(passages):
        rows = torch.tensor([ids[:-1]], device=device)
        logits = model(input_ids=rows, use_cache=False, logits_to_keep=JUDGED).logits[0].float()
        for temperature in TEMPERATURES:
            warping = Warping.of([(_sampling(temperature, index), list(range(READ, len(ids))))], logits.device)
            chosen[temperature].append([int(token) for token in choose(logits, warping)[0].tolist()])
    return chosen
