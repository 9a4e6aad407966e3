"""The learned planner: the analytic planner, whose drafted rounds a small policy network may correct.

A policy network of a few thousand weights maps the features of the planning problem (`OBSERVATIONS`) to one of the
`CORRECTIONS` of the analytic plan, the first of which is no correction. `draft-export policy` trains it with
reinforcement learning in the simulator of this project and ships it as `learned.onnx`, with a `learned.json` that
states the objective and the range of each feature in training. The analytic plan stands if the model is missing or
altered, if the objective is another one, if there is an energy budget, or if a feature lies outside its range in
training.
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

from edge_runtime.planning.acceptance_model import PRIOR_COST_ERROR, AcceptanceModel
from edge_runtime.planning.acceptance_table import MAX_DRAFT_LENGTH, MAX_SIBLINGS, AcceptanceTable
from edge_runtime.planning.analytic import FLIGHT_QUANTILE, AnalyticPlanner, CostComparison, drafting_plan
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.energy_budget import EnergyBudget
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Conditions, Outcome, Plan
from edge_runtime.protocol.errors import InputError

log = logging.getLogger("edge_runtime.planning")

Floats = npt.NDArray[np.float32]

MODEL_PATH = Path(__file__).with_name("learned.onnx")
FORMAT_VERSION = 1
# Features that the policy observes before every drafted round, by the names in `learned.json`. "a to b" is the
# logarithm of the ratio a / b; all others are shares or small numbers.
OBSERVATIONS = (
    "drafted to streamed",  # costs of the rest of the text
    "better to streamed",  # drafted, once the link has returned to its better regime
    "hoped to streamed",  # optimistic bound of the cost of streaming
    "first to each",  # a streaming round of one token, to every further token
    "draft cost to streamed",  # per token
    "prefill to draft cost",
    "step to forward",  # draft step and verifier forward
    "link to forward",
    "own to forward",  # every further token of the verifier's own
    "wide to forward",  # a forward over nine nodes
    "pace to one",  # measured to modeled drafting time
    "quick link to link",  # quantile that drafting ahead counts on, to the current link time
    "link to usual",  # current link time to its long-run mean
    "leaving",  # probability that the link's regime has changed since it was measured
    "acceptance",
    "four survive",  # S(4)
    "ten survive",  # S(10)
    "doubt",  # error of the acceptance estimate, 1 at first
    "own known",  # whether the verifier's own tokens have been measured
    "own doubt",  # error of their cost, 1 at first
    "bias to one",  # calibration factor of the cost of drafted rounds
    "length",  # of the best drafted round
    "survival",  # its stop threshold
    "siblings",
    "ahead",
    "in flight",
    "left to hundred",  # remaining tokens
    "unread to hundred",  # one more than the tokens that the draft still has to prefill
    "ready",
    "temperature",
    "lately accepted",  # share of judged tokens accepted, moving average
    "lately to told",  # measured to predicted seconds per token, moving average
)
# Bound of the logarithms' magnitude.
LOG_LIMIT = 5.0
# Weight of the past in both moving averages (chosen).
HISTORY_WEIGHT = 0.75
# A correction is applied only if its score exceeds that of no correction by this margin (chosen): a smaller lead is as
# likely to cost as to save.
SCORE_MARGIN = 2.0
# A feature may exceed its range in training by this share of the range, plus an absolute slack (chosen).
RANGE_MARGIN = 0.1
RANGE_SLACK = 0.02


class Correction(msgspec.Struct, frozen=True):
    """A change of a drafted round.

    Attributes:
        name: as in `learned.json`.
        longer: factor of the draft length; also the exponent of the stop threshold.
        ahead: factor of the tokens drafted ahead; if above 1, at least two are, with two rounds in flight.
        wider: send the maximum number of siblings, and with more confident tokens as well.
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
    """The analytic planner with a correction of each drafted round, chosen by a subclass."""

    # Moving averages over rounds, and the predicted cost per token of the latest plan.
    _recent_acceptance = 0.5
    _recent_cost_log_ratio = 0.0
    _predicted_cost = 0.0

    def observe(self, outcome: Outcome) -> None:
        """Learn from a round."""
        super().observe(outcome)
        if outcome.drafted:
            judged = min(outcome.accepted + 1, outcome.drafted)
            self._recent_acceptance += (1.0 - HISTORY_WEIGHT) * (outcome.accepted / judged - self._recent_acceptance)
        if not (outcome.repeated or outcome.early):
            seconds = outcome.draft_seconds + outcome.exchange_seconds
            log_ratio = _log_ratio(seconds, self._predicted_cost * outcome.tokens)
            self._recent_cost_log_ratio += (1.0 - HISTORY_WEIGHT) * (log_ratio - self._recent_cost_log_ratio)

    def choose_correction(self, conditions: Conditions, observation: Floats) -> tuple[Correction, str]:
        """Return the correction of the analytic plan, and who chose it, for the plan's reason.

        Args:
            observation: (len(OBSERVATIONS),) float32.
        """
        raise NotImplementedError

    def _decide(
        self, conditions: Conditions, comparison: CostComparison, table: AcceptanceTable, acceptance: AcceptanceModel
    ) -> Plan:
        plan = super()._decide(conditions, comparison, table, acceptance)
        source = "analytic"
        if plan.draft:
            features = self._observation(conditions, comparison, table, acceptance.cost_error)
            correction, source = self.choose_correction(conditions, np.array(features, np.float32))
            if correction is not CORRECTIONS[0]:
                plan = _corrected_plan(correction, conditions, comparison.round.plan)
        if plan.draft:
            self._predicted_cost = comparison.round.cost
        else:
            self._predicted_cost = (comparison.first + (plan.continuation - 1) * comparison.further) / plan.continuation
        return msgspec.structs.replace(plan, reason=f"{plan.reason} ({source})")

    def _observation(
        self, conditions: Conditions, comparison: CostComparison, table: AcceptanceTable, cost_error: float
    ) -> list[float]:
        """Return the features in the order of `OBSERVATIONS`."""
        costs, best, left = self._costs, comparison.round, comparison.left
        forward, link, step = costs.forward.at(1.0), costs.link.now.value, costs.step_seconds(conditions.position)
        streamed = comparison.streamed
        return [
            _log_ratio(comparison.drafted, streamed),
            _log_ratio(comparison.drafted_better_link, streamed),
            _log_ratio(comparison.optimistic_further, comparison.further),
            _log_ratio(comparison.first, comparison.further),
            _log_ratio(best.cost, streamed / left),
            _log_ratio(comparison.prefill, best.cost),
            _log_ratio(step, forward),
            _log_ratio(link, forward),
            _log_ratio(costs.own_token_seconds(table.tokens_per_forward), forward),
            _log_ratio(costs.forward.at(9.0), forward),
            _log_ratio(costs.slowdown.value, 1.0),
            _log_ratio(costs.link_quantile(FLIGHT_QUANTILE), link),
            _log_ratio(link, costs.link.long_run),
            comparison.link_change,
            table.acceptance,
            float(table.survival[4, -1]),
            float(table.survival[10, -1]),
            cost_error / PRIOR_COST_ERROR,
            float(costs.own_forward.known),
            1.0 / math.sqrt(1.0 + costs.own_forward.weight),
            _log_ratio(comparison.calibration, 1.0),
            best.plan.draft / MAX_DRAFT_LENGTH,
            best.plan.min_survival,
            best.plan.siblings / MAX_SIBLINGS,
            best.plan.draft_ahead / MAX_DRAFT_LENGTH,
            best.plan.in_flight - 1.0,
            _log_ratio(left, 100.0),
            _log_ratio(1 + conditions.unread, 100.0),
            conditions.ready / MAX_DRAFT_LENGTH,
            conditions.temperature,
            self._recent_acceptance,
            self._recent_cost_log_ratio,
        ]


def _corrected_plan(correction: Correction, conditions: Conditions, plan: Plan) -> Plan:
    ahead, in_flight = round(correction.ahead * plan.draft_ahead), plan.in_flight
    if correction.ahead > 1.0:
        ahead, in_flight = max(ahead, 2), 2
    longer = correction.longer
    length = plan.draft * longer
    plan = msgspec.structs.replace(
        plan,
        draft=min(max(math.ceil(length) if longer > 1.0 else int(length), 1), MAX_DRAFT_LENGTH),
        min_survival=plan.min_survival**longer,
        draft_ahead=ahead,
        in_flight=in_flight if ahead else 1,
    )
    if correction.wider:
        confidence = min(1.0, max(plan.sibling_confidence, 0.8) + 0.1)
        plan = msgspec.structs.replace(plan, siblings=MAX_SIBLINGS, sibling_confidence=confidence)
    reason = f"drafting {plan.draft} tokens, {plan.siblings} siblings, {plan.draft_ahead} ahead: {correction.name}"
    return drafting_plan(conditions, plan, f"{reason} than computed")


class PolicyMetadata(msgspec.Struct, frozen=True):
    """Contents of the JSON file next to a policy's model.

    Attributes:
        format: FORMAT_VERSION.
        sha256: of the model, hexadecimal.
        objective: that the policy was trained for.
        observations, corrections: names, in order.
        low, high: extreme quantiles of each feature in training.
        trained: steps, seed, settings, texts, versions and results, for information.
    """

    format: int
    sha256: str
    objective: Objective
    observations: tuple[str, ...]
    corrections: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    trained: dict[str, Any]


class CorrectionPolicy:
    """A trained policy network with the range of features that it was trained on."""

    def __init__(self, path: Path = MODEL_PATH) -> None:
        """Load a policy.

        Args:
            path: the model; the file with the suffix `.json` instead describes its training.

        Raises:
            InputError: a file is missing or invalid, the two do not belong together, or are of another release.
        """
        description = path.with_suffix(".json")
        try:
            model = path.read_bytes()
            self.metadata = msgspec.json.decode(description.read_bytes(), type=PolicyMetadata)
        except OSError as error:
            raise InputError(f"no learned policy at {path} ({error}): train one with `draft-export policy`") from None
        except msgspec.MsgspecError as error:
            raise InputError(f"{description} does not describe a policy's training ({error})") from None
        metadata, width = self.metadata, len(OBSERVATIONS)
        if hashlib.sha256(model).hexdigest() != metadata.sha256:
            raise InputError(f"{path} is not the model that {description} describes: its hash differs")
        names = tuple(correction.name for correction in CORRECTIONS)
        if (metadata.format, metadata.observations, metadata.corrections) != (FORMAT_VERSION, OBSERVATIONS, names):
            raise InputError(f"{path} was trained for another release: train one with `draft-export policy`")
        low, high = np.array(metadata.low, np.float32), np.array(metadata.high, np.float32)
        if low.shape != (width,) or high.shape != (width,):
            raise InputError(f"{description} does not have {width} ranges: train one with `draft-export policy`")
        margin = RANGE_MARGIN * (high - low) + RANGE_SLACK
        self._low, self._high = low - margin, high + margin
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __deepcopy__(self, memo: dict[int, Any]) -> CorrectionPolicy:
        """Return the same object: it is immutable, so copies of planners share it."""
        return self

    def out_of_range(self, observation: Floats) -> str:
        """Return the name of a feature outside its range in training; empty if all are within."""
        within = (observation >= self._low) & (observation <= self._high)
        return "" if within.all() else OBSERVATIONS[int(within.argmin())]

    def scores(self, observation: Floats) -> Floats:
        """Return (len(CORRECTIONS),) scores, higher is better, for an observation of (len(OBSERVATIONS),) features."""
        (scores,) = self._session.run(None, {"observation": observation[None]})
        result: Floats = scores[0]
        return result

    def choose(self, observation: Floats) -> int:
        """Return the index of the best correction; 0, no correction, unless it leads by `SCORE_MARGIN`."""
        scores = self.scores(observation)
        best = int(scores.argmax())
        return best if scores[best] > scores[0] + SCORE_MARGIN else 0


class LearnedPlanner(CorrectedPlanner):
    """The analytic planner, corrected by the trained policy within the range of its training."""

    def __init__(
        self,
        objective: Objective,
        device: DeviceModel,
        *,
        acceptance: Mapping[str, float] | None = None,
        budget: EnergyBudget | None = None,
        model: Path = MODEL_PATH,
    ) -> None:
        """
        Args:
            objective, device, acceptance, budget: as for `AnalyticPlanner`.
        """
        super().__init__(objective, device, acceptance=acceptance, budget=budget)
        self._policy: CorrectionPolicy | None = None
        try:
            policy = CorrectionPolicy(model)
        except InputError as error:
            self._fallback = "analytic: no learned policy"
            log.warning("falling back to the analytic planner: %s", error)
            return
        if budget is not None:
            self._fallback = "analytic: energy is budgeted"
        elif policy.metadata.objective != objective:
            self._fallback = "analytic: the policy was trained for another objective"
        else:
            self._policy = policy

    def choose_correction(self, conditions: Conditions, observation: Floats) -> tuple[Correction, str]:
        """Return the policy's correction, or none if the policy does not apply."""
        if self._policy is None:
            return CORRECTIONS[0], self._fallback
        feature = self._policy.out_of_range(observation)
        if feature:
            return CORRECTIONS[0], f"analytic: {feature!r} is outside the trained range"
        return CORRECTIONS[self._policy.choose(observation)], "learned"


def _log_ratio(value: float, unit: float) -> float:
    """Return log(value / unit), clipped to +-LOG_LIMIT."""
    if value <= 0.0 or unit <= 0.0:
        return 0.0 if value == unit else -LOG_LIMIT if value <= 0.0 else LOG_LIMIT
    return min(max(math.log(value) - math.log(unit), -LOG_LIMIT), LOG_LIMIT)
