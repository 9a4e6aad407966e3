"""The self-test at load: the logits of the paged forward against those of transformers' own forward of the same model.

Two texts in one batch, the longer one prefilled in chunks of uneven size past its attention windows, a token tree after
it, and a rollback. An error of masks, positions, rollback or batching, and a state that a model keeps outside its keys
and values, all show in the logits.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from cloud_verifier.model.batch import Segment
from cloud_verifier.model.fast_tier import PagedAttention
from cloud_verifier.model.kv_cache import CachedSequence, KVCachePool
from cloud_verifier.model.quantization import unrounded_inputs
from cloud_verifier.model.rounding_cache import RoundingCache
from cloud_verifier.model.runner import TargetRunner
from cloud_verifier.model.sampling import GREEDY
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.errors import TargetError

log = logging.getLogger(__name__)

# By dtype: the largest difference of a logit, relative to the largest logit, that is taken for rounding.
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# The same where keys and values are rounded: one that is between two of the cache's numbers may become either.
ROUNDED_TOLERANCE = 5e-2
# A model in which rounding adds up over many layers gets a wider tolerance: this many times what two of transformers'
# own forwards differ by, at most so many times the above. On an H200 the logits of a text of a random 7B model in
# bfloat16, read at once and in two parts, differ by up to 4.7 % of the largest logit; those of its compiled layers by
# 6 %. An error of masks or positions is about as large as the logits.
SPREAD_FACTOR, MOST_WIDENING = 2.0, 4.0
# Share of the rows within that tolerance. In low precision a router may choose another expert for some rows.
EQUAL_ROWS = {torch.float32: 1.0, torch.bfloat16: 0.9, torch.float16: 0.9}
# Windows and chunks that are longer are shortened to this for the test, so that it takes well under a second for a
# small model on a CPU. A GPU passes through windows of real length (7B, 4096 tokens: half a second).
LONGEST_SPAN = {"cpu": 12, "cuda": 8192}
# Texts that use the second set of RoPE frequencies are tested if they begin at this length or before.
LONGEST_ROPE = {"cpu": 256, "cuda": 8192}
# Length of the text past the longest span, and sizes of its last chunks, of which all logits are compared.
TEXT_TOKENS = 28
LAST_CHUNKS = (1, 7, 12)
# Rows of its earlier chunks. On a GPU there are two of them, which are long enough for `chunk_attention`, and one comes
# after the other.
EARLIER_CHUNK = 320
# Length of the other text in the batch.
OTHER_TOKENS, OTHER_CHUNK = 10, 4


class SelfTest:
    """Logits that transformers' own forward gives for a few texts, to be compared with a runner's.

    Made before the model is sharded, since only the leader of a tensor-parallel group makes it.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Any, attention: PagedAttention, context: int, cache_dtype: torch.dtype | None = None
    ) -> None:
        """
        Args:
            context: longest text that is going to be served, in tokens.
            cache_dtype: of a cache that rounds keys and values; None for that of the model.
        """
        self._attention = attention
        self._tolerance = ROUNDED_TOLERANCE if cache_dtype else TOLERANCE[model.dtype]
        self._equal_rows = EQUAL_ROWS[model.dtype]
        self._longest_span = LONGEST_SPAN[model.device.type]
        length = attention.longest_span(self._longest_span) + TEXT_TOKENS
        if model.device.type == "cuda":
            # And four tokens after the prompt, see `_paged_logits`.
            length = max(length, 2 * EARLIER_CHUNK + sum(LAST_CHUNKS) + 4)
        switch = attention.rope.switch
        if switch and switch <= LONGEST_ROPE[model.device.type]:
            length = max(length, switch + TEXT_TOKENS)
        length = max(5, min(length, context - 1))
        if switch and switch < length < switch + 5:
            # The prompt and the tokens after it use the same frequencies.
            length = switch
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(model.config.vocab_size, (length + 1 + OTHER_TOKENS,), generator=generator).tolist()
        self._text, self._sibling = ids[:length], ids[length]
        self._other = ids[length + 1 :][: context - 1]
        branch = [*self._text[:-2], self._sibling, self._text[-1]]
        with attention.suspended(), attention.shortened_spans(self._longest_span), unrounded_inputs():
            # As `generate` does: a prompt, and the rest token by token.

            def expect(ids: list[int], *, steps: int = 0, rows: int | None = None) -> torch.Tensor:
                cache = RoundingCache(model, cache_dtype) if cache_dtype else None
                return _transformers_logits(model, ids, cache, steps=steps, rows=rows)

            self._expected_text = expect(self._text[:-1], steps=3, rows=3 + sum(LAST_CHUNKS))
            at_once = expect(self._text[:-1], rows=3)
            self._spread = float((self._expected_text[-3:] - at_once).abs().max())
            self._expected_branch = expect(branch, rows=2)
            self._expected_other = expect(self._other)

    @torch.inference_mode()
    def run(self, runner: TargetRunner, min_rows: int = 1) -> None:
        """Compare the logits of `runner`.

        Args:
            min_rows: let it pad forwards to this many rows, here and from now on.

        Raises:
            TargetError: they differ.
        """
        runner.min_rows = min_rows
        # `logits` uses no CUDA graph: one of this temporary pool would stay, and only the leader of a tensor-parallel
        # group has this pool.
        with self._attention.shortened_spans(self._longest_span), unrounded_inputs():
            rows = self._paged_logits(runner)
        actual, expected = (torch.stack(side) for side in zip(*rows, strict=True))
        tolerance = self._tolerance * float(expected.abs().max())
        tolerance = min(max(tolerance, SPREAD_FACTOR * self._spread), MOST_WIDENING * tolerance)
        differences = (actual - expected).abs().amax(1)
        share = float((differences <= tolerance).float().mean())
        log.info(
            "self-test: the largest difference of a logit from transformers' is %.2g, among its own %.2g",
            float(differences.max()),
            self._spread,
        )
        if share < self._equal_rows:
            raise TargetError(
                f"its logits over the paged KV cache differ by {float(differences.max()):.3g} from those of its own "
                f"forward in transformers, at {1 - share:.0%} of the tested positions"
            )

    def _paged_logits(self, runner: TargetRunner) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of actual and expected logits."""
        text, other = self._text, self._other
        pool = KVCachePool(runner.shape, len(text) + len(other) + 2)
        sequence, other_sequence = CachedSequence(), CachedSequence()
        prompt = len(text) - 4
        sequence.prompt_length, sequence.long_rope = prompt, runner.rope.is_long(prompt)
        sizes: list[int] = []
        for size in reversed(LAST_CHUNKS):
            sizes.insert(0, min(size, prompt - sum(sizes)))
        while rest := prompt - sum(sizes):
            sizes.insert(0, min(rest, runner.max_prefill_rows, EARLIER_CHUNK))
        first_compared = prompt - sum(sizes[-len(LAST_CHUNKS) :])
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for size in filter(None, sizes):
            start = sequence.length
            compared = start >= first_compared
            chunk = Segment.from_tokens(sequence, text[start : start + size], sampling=GREEDY if compared else None)
            row = start - first_compared
            expected = [self._expected_text[row : row + size]] if compared else []
            segments = [chunk]
            if compared and other_sequence.length < len(other):
                begin = other_sequence.length
                stop = begin + OTHER_CHUNK
                # Before or after the text, by turns.
                place = begin // OTHER_CHUNK % 2
                segments.insert(place, Segment.from_tokens(other_sequence, other[begin:stop], sampling=GREEDY))
                expected.insert(place, self._expected_other[begin:stop])
            for actual, correct in zip(runner.logits(pool, segments), expected, strict=True):
                rows += zip(actual.clone(), correct, strict=True)
            for segment in segments:
                pool.keep(segment.sequence, list(range(len(segment))))
        tree = TokenTree(text[-4], prompt + 1, text[-3:-1], {1: [self._sibling]})
        logits = runner.logits(pool, [Segment.from_tree(sequence, tree, GREEDY)])[0].clone()
        rows += zip(logits, [*self._expected_text[-3:], self._expected_branch[-2]], strict=True)
        pool.keep(sequence, [0, 1, 3])
        last = TokenTree(text[-1], sequence.length + 1, [], {})
        logits = runner.logits(pool, [Segment.from_tree(sequence, last, GREEDY)])[0].clone()
        rows += zip(logits, self._expected_branch[-1:], strict=True)
        return rows


def _transformers_logits(
    model: Any, ids: list[int], cache: RoundingCache | None, *, steps: int, rows: int | None
) -> torch.Tensor:
    """(rows, V) float32 logits after the last `rows` tokens, or all. The last `steps` tokens are fed one by one.

    Args:
        cache: an empty one; None for that of the model.
    """
    tokens = torch.tensor([ids], device=model.device)
    prompt = len(ids) - steps
    output = model(input_ids=tokens[:, :prompt], past_key_values=cache, use_cache=True)
    logits = [output.logits[0] if rows is None else output.logits[0, -(rows - steps) :]]
    for step in range(prompt, len(ids)):
        output = model(input_ids=tokens[:, step : step + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0])
    return torch.cat(logits).float()
