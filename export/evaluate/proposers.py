"""What is compared: drafts, which propose a token for a position given the text so far, and targets, which decide it.

A draft may be the board's own runner on a bundle, a model in PyTorch, or anything else with the methods of `Draft`,
such as a memory of verified text in front of one of these. All choose with the board's noise (`contract.coupling`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cloud_verifier.model.sampling import Warping, choose, coupled_scores
from edge_runtime.draft.model import DraftContext, OnnxDraft, Proposal
from edge_runtime.ngram_cache.lookup import Memory
from edge_runtime.planning.board_profile import cache_bytes, weight_bytes
from edge_runtime.protocol.sampling import Chooser, Sampling
from edge_runtime.simulation.recorded_texts import SIBLINGS

# Most logits of one forward that are held at once, 4 bytes each; and of the 8-byte scores made from them.
LOGITS_AT_ONCE = 1 << 27
SCORES_AT_ONCE = 1 << 24
# Texts that a target writes side by side.
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Passage:
    """A text and the part of it that is judged.

    Attributes:
        ids: all of it.
        start: the first position that is judged, at least 1; all behind it are.
        sampling: how the tokens of these positions are chosen.
    """

    ids: list[int]
    start: int
    sampling: Sampling

    @property
    def positions(self) -> list[int]:
        """The positions that are judged."""
        return list(range(self.start, len(self.ids)))


@dataclass(frozen=True)
class Guesses:
    """What a draft proposes for the judged positions of a passage, each given the true ids before it.

    Attributes:
        candidates: for each position, at most 1 + SIBLINGS ids by coupled score, best first.
        confidences: for each position, the draft's probability of the first of them.
    """

    candidates: list[list[int]]
    confidences: list[float]


class Draft(Protocol):
    """Anything that proposes tokens.

    Attributes:
        vocabulary_size: ids that it knows.
        context: longest text in tokens.
        weight_bytes, cache_bytes: what a step reads on a board (see `planning.board_profile`); 0 where that is not
            known, and then no speed is told.
    """

    vocabulary_size: int
    context: int
    weight_bytes: int
    cache_bytes: int

    def begin(self, version: str) -> None:
        """A pass over passages of this target version follows; what was learned in others is to be forgotten."""

    def guess(self, passages: Sequence[Passage]) -> list[Guesses]:
        """Proposes for every passage, in order; one that learns may learn from those before."""


class OnnxProposer:
    """A bundle, run as a board runs it, one token at a time.

    Args:
        remembers: with the board's memory of verified text, which is empty before each pass and then hears every
            passage as it is judged, token by token.
    """

    def __init__(self, draft: OnnxDraft, *, remembers: bool = False) -> None:
        self._draft, self._remembers = draft, remembers
        self._memory: Memory | None = None
        self._version = ""
        manifest = draft.manifest
        self.vocabulary_size = manifest.architecture.vocabulary_size
        self.context = manifest.architecture.context
        self.weight_bytes, self.cache_bytes = weight_bytes(manifest), cache_bytes(manifest)

    def begin(self, version: str) -> None:
        """See `Draft`."""
        self._version = version
        self._memory = Memory(self.vocabulary_size) if self._remembers else None

    def guess(self, passages: Sequence[Passage]) -> list[Guesses]:
        """See `Draft`."""
        found = []
        for passage in passages:
            proposals = list(propose_each(self._draft.context(self._memory), passage, self._version))
            candidates = [proposal.tokens + proposal.siblings.get(0, []) for proposal in proposals]
            found.append(Guesses(candidates, [proposal.confidences[0] for proposal in proposals]))
        return found


def propose_each(context: DraftContext, passage: Passage, version: str = "") -> Iterator[Proposal]:
    """One token and its siblings for each judged position, given the true ids before it."""
    recall = context.recall
    if recall:
        recall.learn(passage.ids[: passage.start])
    for position in passage.positions:
        yield context.propose(passage.ids[:position], 1, passage.sampling, siblings=SIBLINGS, sibling_confidence=1.0)
        if recall:
            recall.learn([passage.ids[position]], version)
    if recall:
        recall.end()


class TorchProposer:
    """A draft in PyTorch, on whatever device it is.

    Args:
        model: a transformers causal language model, in eval mode.
        weight_bytes, cache_bytes: see `Draft`.
    """

    def __init__(self, model: Any, weight_bytes: int = 0, cache_bytes: int = 0) -> None:
        self._model = model
        self.vocabulary_size = model.config.vocab_size
        self.context = model.config.max_position_embeddings
        self.weight_bytes, self.cache_bytes = weight_bytes, cache_bytes

    def begin(self, version: str) -> None:
        """A frozen draft learns nothing."""

    def guess(self, passages: Sequence[Passage]) -> list[Guesses]:
        """See `Draft`."""
        return [
            _ranked(logits, passage)
            for passage, logits in zip(passages, judged_logits(self._model, passages), strict=True)
        ]


class Writer:
    """A target: what it would say at every position of a text, and what it says when it writes on.

    Args:
        model: a transformers causal language model, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._chooser = Chooser(model.config.vocab_size)
        ends = model.generation_config.eos_token_id
        self._ends = set(() if ends is None else [ends] if isinstance(ends, int) else ends)
        self.vocabulary_size: int = model.config.vocab_size
        self.context: int = model.config.max_position_embeddings

    def choices(self, passages: Sequence[Passage]) -> list[list[int]]:
        """The target's token for every judged position, given the text before it."""
        chosen = []
        for passage, logits in zip(passages, judged_logits(self._model, passages), strict=True):
            tokens: list[int] = []
            for rows, positions in _pieces(logits, passage.positions):
                warping = Warping.of([(passage.sampling, positions)], rows.device)
                tokens += [int(token) for token in choose(rows, warping)[0].tolist()]
            chosen.append(tokens)
        return chosen

    def write(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], count: int) -> list[list[int]]:
        """Up to `count` tokens behind each prompt, the token that ends a text included.

        Args:
            prompts: of one length.
            samplings: one for each.
        """
        texts: list[list[int]] = []
        for first in range(0, len(prompts), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            texts += self._write_some(prompts[some], samplings[some], count)
        return texts

    @torch.inference_mode()
    def _write_some(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], count: int) -> list[list[int]]:
        new: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        step, cache = torch.tensor(prompts, device=self._model.device), None
        for index in range(count):
            output = self._model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            tokens = self._next(output.logits[:, -1].float(), len(prompts[0]) + index, samplings)
            for row, token in enumerate(tokens):
                if not ended[row]:
                    new[row].append(token)
                    ended[row] = token in self._ends
            if all(ended):
                break
            # Rows that have ended go on unheard: the others' forwards stay of one shape.
            step = torch.tensor(tokens, device=self._model.device)[:, None]
        return new

    def _next(self, logits: torch.Tensor, position: int, samplings: Sequence[Sampling]) -> list[int]:
        """Each row's token at `position`; logits (rows, V) float32."""
        if logits.device.type == "cpu":
            rows = zip(logits.numpy(), samplings, strict=True)
            return [self._chooser.rank(row, sampling, position).ids[0] for row, sampling in rows]
        return draw(logits, position, samplings)


def draw(logits: torch.Tensor, position: int, samplings: Sequence[Sampling]) -> list[int]:
    """Each row's token at `position`, chosen on the device; logits (rows, V) float32, a sampling for each row."""
    if any(sampling.temperature for sampling in samplings):
        logits = coupled_scores(logits, Warping.of([(each, [position]) for each in samplings], logits.device))
    return [int(token) for token in logits.argmax(-1).tolist()]


def judged_logits(model: Any, passages: Sequence[Passage]) -> Iterator[torch.Tensor]:
    """For each passage the logits of its judged positions, (positions, V) float32 on the model's device."""
    longest = max(len(passage.ids) for passage in passages)
    rows = max(1, LOGITS_AT_ONCE // (longest * int(model.config.vocab_size)))
    for first in range(0, len(passages), rows):
        some = passages[first : first + rows]
        # The last id predicts nothing that is judged. What pads a short text stands behind it, and nobody looks ahead.
        width = max(len(passage.ids) for passage in some) - 1
        ids = torch.tensor([(passage.ids[:-1] + [0] * width)[:width] for passage in some], device=model.device)
        with torch.inference_mode():  # as a decorator it would end at the generator's first yield
            logits = model(input_ids=ids, use_cache=False).logits
        for row, passage in zip(logits, some, strict=True):
            yield row[passage.start - 1 : len(passage.ids) - 1].float()


def _ranked(logits: torch.Tensor, passage: Passage) -> Guesses:
    """What a draft with these `logits` (positions, V) proposes."""
    candidates: list[list[int]] = []
    confidences: list[float] = []
    temperature = passage.sampling.temperature or 1.0
    for rows, positions in _pieces(logits, passage.positions):
        scores = coupled_scores(rows, Warping.of([(passage.sampling, positions)], rows.device))
        best = scores.topk(min(1 + SIBLINGS, rows.shape[-1]), dim=-1).indices
        candidates += best.tolist()
        confidences += (rows / temperature).softmax(-1).gather(-1, best[:, :1])[:, 0].tolist()
    return Guesses(candidates, confidences)


def _pieces(logits: torch.Tensor, positions: list[int]) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Rows and their positions, so many at once as memory should hold."""
    rows = max(1, SCORES_AT_ONCE // logits.shape[-1])
    for first in range(0, len(positions), rows):
        yield logits[first : first + rows], positions[first : first + rows]
