"""Agreement of draft and target, compared with a calculation position by position."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.protocol.sampling import CoupledSampler, Sampling, accepted_length
from export.draft import agreement
from export.draft.agreement import JudgedText, count_rounds, measure_agreement
from tests.models import make_target

TEMPERATURES = (0.0, 1.0)
SEED = 5
# Of different lengths, so that some are padded, and judged from different positions.
TEXTS: list[JudgedText] = [
    (torch.randint(2, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist(), start)
    for length, start in ((20, 1), (33, 7), (9, 8), (33, 32), (26, 1))
]


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 6))
def test_rounds_are_those_of_speculative_decoding(accepted: list[bool], draft_tokens: int) -> None:
    target = list(range(len(accepted)))
    drafted = [token if same else -1 for token, same in zip(target, accepted, strict=True)]
    rounds = written = 0
    while written < len(target):
        # The accepted draft tokens and the target's own.
        written += accepted_length(drafted[written : written + draft_tokens], target[written:]) + 1
        rounds += 1
    assert count_rounds(accepted, draft_tokens) == rounds


@pytest.mark.parametrize("logits_at_once", [1, 64 * 33 * 2, 1 << 30], ids=["one", "two", "all"])
def test_all_figures_are_means_over_the_judged_positions(logits_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts one by one, without padding, and position by position."""
    monkeypatch.setattr(agreement, "MAX_LOGITS_AT_ONCE", logits_at_once)
    target, draft = make_target("llama"), make_target("llama", seed=0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    sampler = CoupledSampler(64)
    same: dict[float, list[bool]] = {t: [] for t in TEMPERATURES}
    rounds = dict.fromkeys(TEMPERATURES, 0)
    overlaps, divergences, losses = [], [], []
    for index, (ids, start) in enumerate(TEXTS):
        with torch.no_grad():
            p, q = (model(torch.tensor([ids])).logits[0].double() for model in (target, draft))
        for temperature in TEMPERATURES:
            sampling = Sampling(temperature=temperature, seed=SEED + index)
            own = [
                sampler.rank(p[t - 1].float().numpy(), sampling, t).ids[0]
                == sampler.rank(q[t - 1].float().numpy(), sampling, t).ids[0]
                for t in range(start, len(ids))
            ]
            same[temperature] += own
            rounds[temperature] += count_rounds(own)
        for t in range(start, len(ids)):
            ours, theirs = p[t - 1].softmax(-1).tolist(), q[t - 1].softmax(-1).tolist()
            overlaps.append(sum(map(min, ours, theirs)))
            divergences.append(sum(a * math.log(a / b) for a, b in zip(ours, theirs, strict=True)))
            losses.append(-math.log(ours[ids[t]]))
    positions = len(overlaps)
    measured = measure_agreement(target, draft, TEXTS, temperatures=TEMPERATURES, seed=SEED)
    assert measured.positions == positions == 19 + 26 + 1 + 1 + 25
    assert measured.accepted == {f"T={t:g}": pytest.approx(sum(same[t]) / positions, abs=1e-4) for t in TEMPERATURES}
    assert all(0.2 < share < 1 for share in measured.accepted.values())
    expected = {f"T={t:g}": pytest.approx(positions / rounds[t], abs=1e-3) for t in TEMPERATURES}
    assert measured.round_tokens == expected
    for value, terms in ((measured.overlap, overlaps), (measured.kl, divergences), (measured.target_loss, losses)):
        assert value == pytest.approx(sum(terms) / positions, abs=2e-4)
    assert set(measured.record()) == {"positions", "accepted", "round_tokens", "overlap", "kl", "target_loss"}


def test_a_draft_that_is_its_target_is_always_accepted() -> None:
    target = make_target("llama")
    measured = measure_agreement(target, target, TEXTS)
    assert measured.accepted == {"T=0": 1.0, "T=0.7": 1.0, "T=1": 1.0}
    assert (measured.overlap, measured.kl) == (pytest.approx(1.0), pytest.approx(0.0))
