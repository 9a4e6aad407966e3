"""What the verifier drafts for itself."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_verifier.engine.own_drafts import OwnDraftPlanner
from cloud_verifier.model.speculation import OwnDraft
from edge_runtime.planning.plan import Plan, apply_stop_rule
from edge_runtime.protocol.sampling import Sampling

LONGEST = 8
FORWARD, NODE = 0.008, 0.0001
# For the draft model to read a token of a prompt.
READ_SECONDS = 0.0005
SAMPLING = Sampling(0.7)
# How sure the draft is of a token, one as often as the other.
UNSURE, SURE = 0.3, 0.97


def speed(length: int, acceptance: float, draft_seconds: float) -> float:
    """Tokens per second with drafts of a fixed length, without siblings."""
    tokens = sum(acceptance**index for index in range(length + 1))
    return tokens / (length * draft_seconds + FORWARD + NODE * (1 + length))


class SimulatedText:
    """A text on a simulated clock, in which a node of a verification takes `node` seconds.

    The draft model first reads the prompt, and later what was generated without it.

    Attributes:
        unsure, sure: how often tokens are accepted that the draft is unsure and sure of.
        sibling: how often the first sibling is the token in a rejected one's place.
        has_siblings: whether drafts have any.
    """

    def __init__(
        self, planner: OwnDraftPlanner, seed: int, draft_seconds: float, *, prompt: int = 1, node: float = NODE
    ) -> None:
        self.unsure = self.sure = self.sibling = 0.0
        self.has_siblings = True
        self._unread = prompt
        self._planner, self._random, self._draft_seconds = planner, Random(seed), draft_seconds
        self._streak, self._node = 0, node

    @property
    def acceptance(self) -> float:
        return (self.unsure + self.sure) / 2

    @acceptance.setter
    def acceptance(self, rate: float) -> None:
        self.unsure = self.sure = rate

    def generate(self, forwards: int) -> tuple[float, list[OwnDraft]]:
        """Run forwards; return tokens per second, and the drafts."""
        total, elapsed, drafts = 0, 0.0, []
        for left in range(forwards, 0, -1):
            plan = self._planner.plan(
                "v1",
                SAMPLING,
                self._streak,
                longest=LONGEST,
                siblings=self.has_siblings,
                unread=self._unread,
                left=left,
            )
            draft = self._draft(plan)
            accepted = next((i for i in range(len(draft.tokens)) if not self._hits(draft, i)), len(draft.tokens))
            tokens = [1]
            if accepted in draft.siblings and self._random.random() < self.sibling:
                tokens = [draft.siblings[accepted][0], 1]
            seconds = 0.0
            if draft.tokens:
                seconds = len(draft.tokens) * self._draft_seconds + (self._unread - 1) * READ_SECONDS
                self._streak = self._planner.learn_draft(
                    "v1",
                    SAMPLING,
                    self._streak,
                    draft,
                    seconds=seconds,
                    accepted=accepted,
                    tokens=tokens,
                )
            self._unread = 1 if draft.tokens else self._unread + 1
            verification = FORWARD + self._node * draft.nodes
            self._planner.learn_verification(draft, verification, left_out=not draft.tokens)
            total, elapsed = total + accepted + len(tokens), elapsed + seconds + verification
            drafts.append(draft)
        return total / elapsed, drafts

    def _draft(self, plan: Plan) -> OwnDraft:
        confidences: list[float] = []
        survival, stop = 1.0, False
        while len(confidences) < plan.draft and not stop:
            confidences.append(self._random.choice([UNSURE, SURE]))
            survival, stop = apply_stop_rule(plan, survival, confidences[-1])
        siblings = {
            index: [*range(2, 2 + plan.siblings)]
            for index, confidence in enumerate(confidences)
            if plan.siblings and confidence <= plan.sibling_confidence
        }
        return OwnDraft([0] * len(confidences), siblings, confidences, self._unread)

    def _hits(self, draft: OwnDraft, index: int) -> bool:
        return self._random.random() < (self.sure if draft.confidences[index] == SURE else self.unsure)


def drafted_tokens(drafts: list[OwnDraft]) -> int:
    return sum(len(draft.tokens) for draft in drafts)


@pytest.mark.parametrize("draft_seconds", [0.0003, 0.001, 0.004, 0.012])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.9])
def test_a_text_is_nearly_as_fast_as_with_the_best_length(acceptance: float, draft_seconds: float) -> None:
    text = SimulatedText(OwnDraftPlanner(), 1, draft_seconds)
    text.acceptance = acceptance
    text.generate(500)
    reached, _ = text.generate(2000)
    assert reached > 0.95 * max(speed(length, acceptance, draft_seconds) for length in range(LONGEST + 1))


def test_drafts_are_long_where_the_draft_is_sure_and_have_siblings_where_it_is_not() -> None:
    text = SimulatedText(OwnDraftPlanner(), 4, 0.0015, node=0.0006)
    text.unsure, text.sure, text.sibling = 0.3, 0.97, 0.5
    text.generate(1000)
    reached, drafts = text.generate(1000)
    # Few go on after tokens that the draft was unsure of.
    assert sum(draft.confidences[:-1].count(UNSURE) > 1 for draft in drafts) < 50
    with_siblings = [draft.confidences[index] for draft in drafts for index in draft.siblings]
    assert len(with_siblings) > 500 and with_siblings.count(UNSURE) > 0.9 * len(with_siblings)
    assert reached > 1.05 * max(speed(length, text.acceptance, 0.0015) for length in range(LONGEST + 1))


def test_drafting_begins_again_when_it_pays_again() -> None:
    planner = OwnDraftPlanner()
    hard = SimulatedText(planner, 2, 0.002)
    hard.generate(400)
    _, without = hard.generate(100)
    for seed in range(10):
        text = SimulatedText(planner, seed, 0.002)
        text.acceptance = 0.95
        _, later = text.generate(300)
    assert drafted_tokens(without) < 10 and drafted_tokens(later) > 500


def test_a_new_text_begins_with_what_others_showed() -> None:
    planner = OwnDraftPlanner()
    for seed in range(5):
        text = SimulatedText(planner, seed, 0.006)
        text.acceptance = 0.1
        text.generate(100)
    _, drafts = SimulatedText(planner, 9, 0.006).generate(5)
    assert drafted_tokens(drafts) <= 1


@pytest.mark.parametrize("prompt", [1, 300, 1000])
def test_what_the_draft_model_reads_first_keeps_no_text_from_drafting(prompt: int) -> None:
    planner = OwnDraftPlanner()
    for seed in range(20):
        text = SimulatedText(planner, seed, 0.001, prompt=prompt)
        text.acceptance = 0.9
        _, drafts = text.generate(200)
    assert drafted_tokens(drafts) > 4 * len(drafts)


def test_one_slow_step_changes_little() -> None:
    planner = OwnDraftPlanner()
    text = SimulatedText(planner, 3, 0.001)
    text.acceptance = 0.9
    text.generate(200)
    draft = OwnDraft([0], {}, [SURE], 1)
    planner.learn_verification(draft, 1.0)
    planner.learn_draft("v1", SAMPLING, 0, draft, seconds=1.0, accepted=1, tokens=[1])
    _, drafts = text.generate(20)
    assert drafted_tokens(drafts) > 3 * len(drafts)


@pytest.mark.parametrize("prompt", [1, 100])
@pytest.mark.parametrize("slow_seconds", [0.012, 0.1])
def test_a_draft_that_was_slow_once_is_tried_again(slow_seconds: float, prompt: int) -> None:
    planner = OwnDraftPlanner()
    for seed, draft_seconds in ((5, 0.001), (6, slow_seconds)):
        text = SimulatedText(planner, seed, draft_seconds)
        text.acceptance = 0.9
        text.generate(40)
    for seed in range(12):
        text = SimulatedText(planner, seed, 0.001, prompt=prompt)
        text.acceptance = 0.9
        _, drafts = text.generate(300)
    assert drafted_tokens(drafts) > 900


def test_siblings_are_tried_again_when_wide_forwards_have_become_cheap() -> None:
    planner = OwnDraftPlanner()
    wide = SimulatedText(planner, 8, 0.001, node=0.003)
    wide.acceptance, wide.sibling = 0.5, 0.5
    wide.generate(50)
    text = SimulatedText(planner, 9, 0.001, node=0.00005)
    text.acceptance, text.sibling = 0.5, 0.5
    text.generate(100)
    _, drafts = text.generate(100)
    assert sum(bool(draft.siblings) for draft in drafts) > 90


@pytest.mark.parametrize(("acceptance", "draft_seconds"), [(0.5, 0.0045), (0.3, 0.0035), (0.2, 0.004), (0.05, 0.003)])
def test_siblings_that_a_draft_does_not_have_are_not_counted_on(acceptance: float, draft_seconds: float) -> None:
    text = SimulatedText(OwnDraftPlanner(), 7, draft_seconds)
    text.acceptance, text.sibling, text.has_siblings = acceptance, 0.9, False
    text.generate(500)
    reached, drafts = text.generate(1000)
    assert not any(draft.siblings for draft in drafts)
    assert reached > 0.97 * max(speed(length, acceptance, draft_seconds) for length in range(LONGEST + 1))


def test_no_long_prompt_is_read_for_a_trial() -> None:
    planner = OwnDraftPlanner()
    for seed in range(10):
        text = SimulatedText(planner, seed, 0.02, prompt=3000)
        text.acceptance = 0.5
        reached, _ = text.generate(200)
    assert reached > 0.97 * speed(0, 0.5, 0.02)


@given(
    st.lists(
        st.tuples(
            st.integers(0, LONGEST), st.integers(0, 16), st.floats(0, 1), st.floats(0, 10), st.lists(st.integers(0, 9))
        )
    ),
    st.integers(1, 71),
    st.integers(1, 5000),
    st.integers(1, 5000),
)
def test_a_plan_is_always_possible(
    steps: list[tuple[int, int, float, float, list[int]]], longest: int, unread: int, left: int
) -> None:
    planner, streak = OwnDraftPlanner(), 0
    for drafted, accepted, confidence, seconds, siblings in steps:
        draft = OwnDraft([0] * drafted, {0: siblings} if drafted else {}, [confidence] * drafted, unread)
        planner.learn_verification(draft, seconds, left_out=not drafted)
        streak = planner.learn_draft(
            "v1",
            SAMPLING,
            streak,
            draft,
            seconds=seconds,
            accepted=min(drafted, accepted),
            tokens=siblings[-1:],
        )
        has_siblings = accepted % 2 == 0
        plan = planner.plan("v1", SAMPLING, streak, longest=longest, siblings=has_siblings, unread=unread, left=left)
        assert 0 <= plan.draft <= longest
        assert has_siblings or not plan.siblings
