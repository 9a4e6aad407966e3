"""The learned planner: the analytic one decides whether to draft, and a small network how, where it knows its way.

From the figures with which the analytic planner finds the best drafted round, a policy of a few thousand weights
chooses one of `CORRECTIONS` to it, of which the first is none at all. `draft-export policy` trains it with
reinforcement learning on this project's own simulator, and ships it as `learned.onnx` with a `learned.json` that says
what it was trained for and which values it has seen. Where the model is missing or altered, the objective is another,
energy is budgeted, or an observation lies outside of what was seen, the analytic plan stands.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime

from edge_runtime.planning.acceptance_model import DOUBT, Survival
from edge_runtime.planning.acceptance_table import LONGEST, MOST_SIBLINGS, Table
from edge_runtime.planning.analytic import QUICK, AnalyticPlanner, Choice
from edge_runtime.planning.device_model import Device
from edge_runtime.planning.energy_budget import Budget
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Conditions, Outcome, Plan
from edge_runtime.protocol.errors import InputError

log = logging.getLogger("edge_runtime.planning")

Floats = npt.NDArray[np.float32]

MODEL = Path(__file__).with_name("learned.onnx")
FORMAT = 1
# What is observed before every drafted round; `to` is the logarithm of a ratio, all else a share or a small number.
OBSERVATIONS = (
    "drafted to streamed",  # costs of the rest of the text
    "better to streamed",  # the same once the link is on its better side
    "hoped to streamed",  # the least that streaming could turn out to cost
    "first to each",  # a streaming round of one token, to every further one
    "draft cost to streamed",  # per token
    "prefill to draft cost",
    "step to forward",  # seconds of the draft and of the verifier
    "link to forward",
    "own to forward",  # every further token of the verifier's own
    "wide to forward",  # a forward over nine nodes
    "pace to one",  # how much slower the board is than its profile
    "quick link to link",
    "link to usual",
    "leaving",  # the chance that the link has changed since it was last seen
    "acceptance",
    "four survive",  # chance that the first four guesses are all accepted
    "ten survive",
    "doubt",  # of the draft's worth, 1 at first
    "own known",
    "own doubt",  # of the cost of the verifier's own tokens, 1 at first
    "bias to one",  # what drafted rounds cost more than was told
    "length",  # of the draft that was found best
    "survival",
    "siblings",
    "ahead",
    "in flight",
    "left to hundred",  # tokens to go
    "unread to hundred",  # and tokens that the draft has yet to read, one more than there are
    "ready",
    "temperature",
    "lately accepted",  # share, over the last few judged drafts
    "lately to told",  # seconds per token of the last few rounds to what was told
)
# Largest magnitude of a logarithm that is observed.
FAR = 5.0
# Share kept of what the last rounds came to.
LATELY = 0.75
# A correction's score must be ahead of that of none by so much: by a little, it is as likely to cost as to save.
SURE = 2.0
# An observation may lie outside of what was seen by so large a share of its width, and by so much in any case.
MARGIN = 0.1
SLACK = 0.02


class Correction(msgspec.Struct, frozen=True):
    """One change of a drafted round.

    Attributes:
        name: for people.
        longer: factor of the draft's length; its threshold of survival moves with it.
        ahead: factor of the tokens drafted ahead; above 1 at least two are, with two rounds in flight.
        wider: name as many siblings as there are, beside surer tokens too.
    """

    name: str
    longer: float = 1.0
    ahead: float = 1.0
    wider: bool = False


CORRECTIONS = (
    Correction("as computed"),
    Correction("shorter", longer=0.7),
    Correction("longer", longer=1.5),
    Correction("more ahead", ahead=1.7),
    Correction("more siblings", wider=True),
    Correction("more ahead, more siblings", ahead=1.7, wider=True),
    Correction("longer, more siblings", longer=1.5, wider=True),
)


class CorrectedPlanner(AnalyticPlanner):
    """The analytic planner with corrections that a subclass chooses before every round."""

    def __init__(
        self,
        objective: Objective,
        device: Device,
        *,
        acceptance: Mapping[str, float] | None = None,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(objective, device, acceptance=acceptance, budget=budget)
        self._lately_accepted = 0.5
        self._lately_told = 0.0
        self._promised = 0.0

    def observe(self, outcome: Outcome) -> None:
        """Learns from a round."""
        super().observe(outcome)
        if outcome.drafted:
            judged = min(outcome.accepted + 1, outcome.drafted)
            self._lately_accepted += (1.0 - LATELY) * (outcome.accepted / judged - self._lately_accepted)
        if not (outcome.repeated or outcome.early):
            surprise = _log(outcome.draft_seconds + outcome.exchange_seconds, self._promised * outcome.tokens)
            self._lately_told += (1.0 - LATELY) * (surprise - self._lately_told)

    def correction(self, conditions: Conditions, observation: Floats) -> tuple[Correction, str]:
        """The correction to the analytic plan, and who chose it.

        Args:
            conditions: of the round.
            observation: (len(OBSERVATIONS),) float32.
        """
        raise NotImplementedError

    def _decide(self, conditions: Conditions, choice: Choice, table: Table, survival: Survival) -> Plan:
        plan = super()._decide(conditions, choice, table, survival)
        chosen = "analytic"
        if plan.draft:
            observation = np.array(self._observation(conditions, choice, table, survival.doubt), np.float32)
            correction, chosen = self.correction(conditions, observation)
            if correction is not CORRECTIONS[0]:
                plan = self._corrected(correction, conditions, choice, table)
        own = plan.own
        self._promised = choice.draft.cost if plan.draft else (choice.first + (own - 1) * choice.each) / own
        return msgspec.structs.replace(plan, reason=f"{plan.reason} ({chosen})")

    def _observation(self, conditions: Conditions, choice: Choice, table: Table, doubt: float) -> list[float]:
        """In the order of `OBSERVATIONS`."""
        costs, draft, left = self._costs, choice.draft, choice.left
        forward, link, step = costs.forward.at(1.0), costs.link.now.value, costs.step_seconds(conditions.position)
        each = choice.streamed / left
        return [
            _log(choice.drafted, choice.streamed),
            _log(choice.better, choice.streamed),
            _log(choice.hoped, choice.each),
            _log(choice.first, choice.each),
            _log(draft.cost, each),
            _log(choice.prefill, draft.cost),
            _log(step, forward),
            _log(link, forward),
            _log(costs.own_seconds(table.speculated), forward),
            _log(costs.forward.at(9.0), forward),
            _log(costs.pace.value, 1.0),
            _log(costs.link_quantile(QUICK), link),
            _log(link, costs.link.usual),
            choice.leaving,
            table.acceptance,
            float(table.intact[4, -1]),
            float(table.intact[10, -1]),
            doubt / DOUBT,
            float(costs.own.known),
            1.0 / math.sqrt(1.0 + costs.own.weight),
            _log(choice.bias, 1.0),
            draft.length / LONGEST,
            draft.survival,
            draft.siblings / MOST_SIBLINGS,
            draft.ahead / LONGEST,
            draft.in_flight - 1.0,
            _log(left, 100.0),
            _log(1 + conditions.unread, 100.0),
            conditions.ready / LONGEST,
            conditions.temperature,
            self._lately_accepted,
            self._lately_told,
        ]

    def _corrected(self, correction: Correction, conditions: Conditions, choice: Choice, table: Table) -> Plan:
        draft = choice.draft
        ahead, in_flight = round(correction.ahead * draft.ahead), draft.in_flight
        if correction.ahead > 1.0:
            ahead, in_flight = max(ahead, 2), 2
        longer = correction.longer
        length = draft.length * longer
        draft = msgspec.structs.replace(
            draft,
            length=min(max(math.ceil(length) if longer > 1.0 else int(length), 1), LONGEST),
            survival=draft.survival**longer,
            ahead=ahead,
            in_flight=in_flight if ahead else 1,
        )
        if correction.wider:
            surer = min(1.0, max(draft.sibling_confidence, 0.8) + 0.1)
            draft = msgspec.structs.replace(draft, siblings=MOST_SIBLINGS, sibling_confidence=surer)
        told = f"{draft.length} tokens, {draft.siblings} siblings, {draft.ahead} ahead: {correction.name} than computed"
        return self._plan(conditions, draft, table, told)


class Training(msgspec.Struct, frozen=True):
    """What the file beside the model says.

    Attributes:
        format: FORMAT.
        sha256: of the model, in hexadecimal digits.
        objective: what it was trained for.
        observations, corrections: names, in order.
        low, high: quantiles of each observation in training, nearly the least and the most.
        trained: steps, seed, worlds, texts, versions and results; for people.
    """

    format: int
    sha256: str
    objective: Objective
    observations: tuple[str, ...]
    corrections: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    trained: dict[str, Any]


class Policy:
    """The shipped network and the range of observations that it has seen.

    Attributes:
        training: what it was trained for and on.
    """

    def __init__(self, path: Path = MODEL) -> None:
        """
        Args:
            path: the model; `.json` in place of its suffix tells of its training.

        Raises:
            InputError: no model there, not the one that its training made, or of another release.
        """
        try:
            model = path.read_bytes()
            self.training = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=Training)
        except OSError as error:
            raise InputError(f"no learned policy at {path} ({error}): train one with `draft-export policy`") from None
        except msgspec.MsgspecError as error:
            raise InputError(f"{path.with_suffix('.json')} does not tell of a policy's training ({error})") from None
        training, width = self.training, len(OBSERVATIONS)
        if hashlib.sha256(model).hexdigest() != training.sha256:
            raise InputError(f"{path} is not the model that {path.with_suffix('.json')} tells of: its hash differs")
        names = tuple(correction.name for correction in CORRECTIONS)
        if (training.format, training.observations, training.corrections) != (FORMAT, OBSERVATIONS, names):
            raise InputError(f"{path} was trained for another release: train one with `draft-export policy`")
        low, high = np.array(training.low, np.float32), np.array(training.high, np.float32)
        if low.shape != (width,) or high.shape != (width,):
            raise InputError(f"{path.with_suffix('.json')} has not {width} ranges: train again")
        margin = MARGIN * (high - low) + SLACK
        self._low, self._high = low - margin, high + margin
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Policy:
        """Nothing in it ever changes, so that copies of planners share it."""
        return self

    def strange(self, observation: Floats) -> str:
        """Name of an observation that lies outside of what was seen; empty if all are within."""
        within = (observation >= self._low) & (observation <= self._high)
        return "" if within.all() else OBSERVATIONS[int(within.argmin())]

    def scores(self, observation: Floats) -> Floats:
        """(len(CORRECTIONS),) scores, the higher the better, for (len(OBSERVATIONS),) observations."""
        (scores,) = self._session.run(None, {"observation": observation[None]})
        result: Floats = scores[0]
        return result

    def choice(self, observation: Floats) -> int:
        """Index of the best correction; 0, which is none, where it is not `SURE`."""
        scores = self.scores(observation)
        best = int(scores.argmax())
        return best if scores[best] > scores[0] + SURE else 0


class LearnedPlanner(CorrectedPlanner):
    """The analytic planner, corrected by the policy where that knows its way."""

    def __init__(
        self,
        objective: Objective,
        device: Device,
        *,
        acceptance: Mapping[str, float] | None = None,
        budget: Budget | None = None,
        model: Path = MODEL,
    ) -> None:
        """
        Args:
            objective, device, acceptance, budget: as of `AnalyticPlanner`.
            model: the policy.
        """
        super().__init__(objective, device, acceptance=acceptance, budget=budget)
        self._policy: Policy | None = None
        try:
            policy = Policy(model)
        except InputError as error:
            self._why = "analytic: no learned policy"
            log.warning("the analytic planner decides alone: %s", error)
            return
        if budget is not None:
            self._why = "analytic: energy is budgeted"
        elif policy.training.objective != objective:
            self._why = "analytic: the policy was trained for another objective"
        else:
            self._policy = policy

    def correction(self, conditions: Conditions, observation: Floats) -> tuple[Correction, str]:
        """The policy's, or none."""
        if self._policy is None:
            return CORRECTIONS[0], self._why
        strange = self._policy.strange(observation)
        if strange:
            return CORRECTIONS[0], f"analytic: {strange!r} is outside of what was learned"
        return CORRECTIONS[self._policy.choice(observation)], "learned"


def _log(value: float, unit: float) -> float:
    """Logarithm of value / unit, within `FAR`."""
    if value <= 0.0 or unit <= 0.0:
        return 0.0 if value == unit else -FAR if value <= 0.0 else FAR
    return min(max(math.log(value) - math.log(unit), -FAR), FAR)
