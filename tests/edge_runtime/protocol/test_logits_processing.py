"""Logits processing in numpy: test vectors and properties.

`tests/cloud_verifier/model/test_shared_sampling.py` compares it with torch's and transformers' own processors.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.protocol.logits_processing import (
    LogitChanges,
    SequenceProcessor,
    TokenMask,
    make_processor,
)
from edge_runtime.protocol.sampling import CoupledSampler, Sampling

SIZE = 50
END_IDS = [0, 3]
ids = st.integers(0, SIZE - 1)
texts = st.lists(ids, min_size=1, max_size=40)
penalties = st.sampled_from([-2.0, -0.7, 0.0, 0.3, 2.0])
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([0.6, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**64 - 1),
    ignore_eos=st.booleans(),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.1, 1.3]),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    logit_bias=st.dictionaries(ids, st.sampled_from([-100.0, -1.3, 0.7, 100.0]), max_size=4),
    min_tokens=st.sampled_from([0, 5, 100]),
    stop_ids=st.lists(ids, max_size=3),
)


def logits_row(seed: int, size: int = SIZE) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


def mask_of(allowed: list[int], size: int = SIZE) -> TokenMask:
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[allowed] = 1
    return np.packbits(bits, bitorder="little")


class Allows:
    """Constrains every position to the same tokens."""

    def __init__(self, *allowed: int) -> None:
        self._mask = mask_of(list(allowed))

    def allowed(self, generated: list[int], /) -> TokenMask:
        return self._mask


def processed(text: list[int], prompt: int, sampling: Sampling, logits: npt.NDArray[np.float32]) -> list[float]:
    changes = SequenceProcessor(sampling, prompt, END_IDS).changes_after(text)
    values: list[float] = changes.apply(logits).tolist()
    return values


def test_the_documented_vectors() -> None:
    parameters = {"logit_bias": {3: 1.25}, "repetition_penalty": 1.3, "presence_penalty": 0.4}
    sampling = Sampling(**parameters, frequency_penalty=0.3, min_tokens=4)  # type: ignore[arg-type]
    logits = (np.arange(10) * 0.5 - 2).astype(np.float32)
    values = SequenceProcessor(sampling, 2, [8]).changes_after([5, 7, 7, 9, 7]).apply(logits)
    expected = [-2, -1.5, -1, 0.75, 0, 0.38461539149284363, 1, 0.1538461446762085, -np.inf, 1.2230770587921143]
    assert values.tolist() == expected
    chosen = {
        (temperature, min_p, seed): CoupledSampler(10)
        .rank(values, Sampling(temperature, seed=seed, min_p=min_p), 5)
        .ids[0]
        for temperature, min_p, seed in [(0.0, 0.0, 0), (1.0, 0.0, 0), (1.0, 0.0, 1), (1.0, 0.6, 0), (1.0, 0.6, 1)]
    }
    assert list(chosen.values()) == [9, 7, 5, 9, 6]


@pytest.mark.slow
@given(samplings, st.lists(texts, min_size=1, max_size=6), st.integers(0, 20))
@settings(max_examples=200)
def test_following_a_text_with_rollbacks_equals_a_new_processor(
    sampling: Sampling, versions: list[list[int]], prompt: int
) -> None:
    followed = SequenceProcessor(sampling, prompt, END_IDS)
    logits = logits_row(1)
    for text in versions:
        fresh = SequenceProcessor(sampling, prompt, END_IDS).changes_after(text).apply(logits)
        assert followed.changes_after(text).apply(logits).tolist() == fresh.tolist()
        assert followed.length == len(text)


@given(samplings, texts, st.sets(ids, min_size=1), st.sets(ids, min_size=1))
def test_a_trimmed_head_is_processed_as_the_same_columns(
    sampling: Sampling, text: list[int], head: set[int], allowed: set[int]
) -> None:
    head_ids = np.array(sorted(head), np.int32)
    changes = SequenceProcessor(sampling, 2, END_IDS).changes_after(text)._replace(allowed=mask_of(sorted(allowed)))
    logits = logits_row(7)
    assert changes.apply(logits[head_ids], head_ids).tolist() == changes.apply(logits)[head_ids].tolist()


def test_the_minimum_length_gives_way_to_a_grammar_that_ends() -> None:
    sampling = Sampling(min_tokens=9, stop_ids=[7])
    for allowed, expected in (((0, 7), [0, 7]), ((0, 7, 9), [9])):
        changes = SequenceProcessor(sampling, 1, END_IDS, Allows(*allowed)).changes_after([4, 5])
        assert np.flatnonzero(changes.apply(logits_row(2)) > -np.inf).tolist() == expected


def test_more_logits_than_the_mask_or_the_text_covers() -> None:
    """Ids that a model has beyond the tokenizer's are never allowed; ids that it lacks change nothing."""
    mask = mask_of([1, 2, 31], 32)
    changes = LogitChanges(
        np.array([2, 60]), np.full(2, 5, np.float32), np.ones(2, np.float32), np.zeros(2, np.float32), mask
    )
    logits = logits_row(3, 40)
    values = changes.apply(logits)
    assert np.flatnonzero(values > -np.inf).tolist() == [1, 2, 31]
    assert values[2] == logits[2] + np.float32(5)


@pytest.mark.parametrize(
    ("sampling", "processes", "remembers"),
    [
        (Sampling(), False, False),
        (Sampling(1.0, 5, 0.5, 3, ignore_eos=True, min_p=0.5, stop_ids=[4]), False, False),
        (Sampling(logit_bias={4: 1.0}), True, False),
        (Sampling(repetition_penalty=1.1), True, False),
        (Sampling(presence_penalty=0.1), True, True),
        (Sampling(frequency_penalty=0.1), True, True),
        (Sampling(min_tokens=1), True, True),
        (Sampling(grammar="x"), True, True),
    ],
    ids=str,
)
def test_which_parameters_need_a_processor_and_the_end_of_the_prompt(
    sampling: Sampling, processes: bool, remembers: bool
) -> None:
    assert (make_processor(sampling, 3) is not None) == sampling.processes_logits == processes
    assert sampling.depends_on_prompt_end == remembers
