"""A Gymnasium environment of simulated rounds, in which a policy learns to correct the plans of the analytic planner.

An episode is a sequence of recorded texts with a board, a link and a verifier drawn at random around the shipped
presets. A step is the plan of one drafted round. Every episode is first run with the analytic planner alone. Its cost
at every position of every text is the baseline of the reward, so that easy texts and cheap scenarios give no reward:

    reward = (baseline cost of the tokens of this step - cost of this step) / baseline cost per token

The rewards of an episode add up to the saved cost, in tokens at the baseline cost. If a round that was sent early is
dropped, the reward credited for it is subtracted in the next step.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any, NamedTuple

import gymnasium
import msgspec
import numpy as np

from edge_runtime.planning.board_profile import shipped_profiles
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.learned import CORRECTIONS, LOG_LIMIT, OBSERVATIONS, CorrectedPlanner, Correction, Floats
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Conditions, Outcome
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.simulation import (
    BURSTY_BAD,
    BURSTY_GOOD,
    LINK_PRESETS,
    VERIFIERS,
    Link,
    LinkParameters,
    LinkPhase,
    RecordedText,
    ScheduledLink,
    SimulatedVerifier,
    Simulator,
    SteadyLink,
    VerifierCost,
    World,
    read_texts,
)

EXAMPLE_FAMILY_PATH = Path(__file__).parents[1] / "example_family"
# Returns the index of a correction for (len(OBSERVATIONS),) observations, the completed tokens, and the cost so far.
CorrectionCallback = Callable[[Floats, int, float], int]
# The first texts of each kind are held out for the evaluation of policies.
HELD_OUT_TEXTS = 8
MAX_TEXTS = 8
# Recorded texts are joined into longer ones: number of texts, and range of the factor on the prompt length. Chosen.
JOINED_TEXT_COUNTS = (1, 1, 1, 2, 4)
PROMPT_FACTOR_RANGE = (0.3, 10.0)
# Range of the size of the draft weights, in bytes.
WEIGHT_BYTES_RANGE = (20e6, 400e6)
# Shares of episodes in which the link changes once or is bursty, and in which another target version is rolled out.
# Chosen.
LINK_CHANGE_SHARE, BURSTY_LINK_SHARE = 0.15, 0.2
ROLLOUT_SHARE = 0.15
# Share of episodes in which the bundle manifest has measured acceptance rates. Chosen.
EVALUATED_BUNDLE_SHARE = 0.5


class EpisodeScenario(NamedTuple):
    """The simulated conditions of an episode.

    Attributes:
        name: for display.
        profile_device: device model from the profile of the board, which the planner uses.
        device: device model of the simulated board.
        acceptance: acceptance rates of the bundle manifest; may be empty.
        link_phases: link parameters with the seconds for which each applies; a single one applies for ever.
        repeat: whether the phases repeat.
        verifier: cost of the verifier.
        texts: recorded texts, in order.
        seed: seed of the link, the verifier and the world.
    """

    name: str
    profile_device: DeviceModel
    device: DeviceModel
    acceptance: Mapping[str, float]
    link_phases: tuple[tuple[float, LinkParameters], ...]
    repeat: bool
    verifier: VerifierCost
    texts: list[RecordedText]
    seed: int

    def world(self) -> World:
        """Return the simulated world at its start. It is deterministic."""
        links = [SteadyLink(parameters, self.seed + index) for index, (_, parameters) in enumerate(self.link_phases)]
        link: Link = links[0]
        if len(links) > 1:
            phases = [LinkPhase(seconds, steady) for (seconds, _), steady in zip(self.link_phases, links, strict=True)]
            link = ScheduledLink(phases, repeat=self.repeat)
        verifier = SimulatedVerifier(self.verifier, self.seed + 7)
        return World(self.name, self.device, link, verifier, self.seed + 8)


class ScenarioSampler:
    """Draws random scenarios: perturbed presets of links, boards and verifiers, with texts of one kind."""

    def __init__(self, texts: list[RecordedText]) -> None:
        """
        Args:
            texts: recorded texts; every kind (target and temperature) is drawn equally often.
        """
        kinds: dict[tuple[str, float], list[RecordedText]] = {}
        for text in texts:
            kinds.setdefault((text.target, text.temperature), []).append(text)
        self._kinds = kinds
        self._profiles = shipped_profiles()
        self._acceptance = read_bundle(EXAMPLE_FAMILY_PATH / "bundle", verify=False).manifest.acceptance

    def draw(self, seed: int) -> EpisodeScenario:
        """Return the scenario of this seed."""
        random = Random(seed)
        profile = random.choice(self._profiles)
        name, link_phases, repeat = _draw_link(random)
        weights = np.exp(random.uniform(*np.log(WEIGHT_BYTES_RANGE)))
        radio = link_phases[0][1].radio
        profile_device = DeviceModel.from_profile(profile, int(weights), radio=radio)
        # A real board deviates from its profile.
        device = DeviceModel.from_profile(profile, int(weights * _lognormal_factor(random, 0.15)), radio=radio)
        cost = _draw_verifier(random)
        return EpisodeScenario(
            f"{name}, {profile.name} {weights / 1e6:.0f} MB, {cost.name}",
            profile_device=profile_device,
            device=device,
            acceptance=self._acceptance if random.random() < EVALUATED_BUNDLE_SHARE else {},
            link_phases=link_phases,
            repeat=repeat,
            verifier=cost,
            texts=self._draw_texts(random),
            seed=random.randrange(1 << 30),
        )

    def _draw_texts(self, random: Random) -> list[RecordedText]:
        (target, temperature), texts = random.choice(list(self._kinds.items()))
        count = random.randint(1, MAX_TEXTS)
        others = [kind for kind in self._kinds if kind[1] == temperature and kind[0] != target]
        chosen = random.sample(texts, min(count, len(texts)))
        if others and random.random() < ROLLOUT_SHARE:
            after = random.randint(0, len(chosen))
            later = self._kinds[random.choice(others)]
            chosen[after:] = random.sample(later, min(len(chosen) - after, len(later)))
        texts = []
        while chosen:
            count = random.choice(JOINED_TEXT_COUNTS)
            factor = np.exp(random.uniform(*np.log(PROMPT_FACTOR_RANGE)))
            texts.append(_join_texts(chosen[:count], factor))
            chosen = chosen[count:]
        return texts


def split_texts(texts: list[RecordedText]) -> tuple[list[RecordedText], list[RecordedText]]:
    """Return the training texts and the held-out texts, which are the first `HELD_OUT_TEXTS` of each kind."""
    seen: Counter[tuple[str, float]] = Counter()
    training: list[RecordedText] = []
    held_out: list[RecordedText] = []
    for text in texts:
        kind = (text.target, text.temperature)
        seen[kind] += 1
        (held_out if seen[kind] <= HELD_OUT_TEXTS else training).append(text)
    return training, held_out


class CallbackPlanner(CorrectedPlanner):
    """A planner whose corrections come from a callback, and which accumulates the cost of its rounds.

    Attributes:
        end: tokens of all texts up to the end of the current one.
    """

    def __init__(self, objective: Objective, scenario: EpisodeScenario, choose: CorrectionCallback) -> None:
        super().__init__(objective, scenario.profile_device, acceptance=scenario.acceptance)
        self.end = 0
        self._choose = choose
        self._idle_watts = scenario.device.idle_watts
        self._verifier_seconds = self._joules = self._bytes = 0.0

    def choose_correction(self, conditions: Conditions, observation: Floats) -> tuple[Correction, str]:
        action = self._choose(observation, self.end - conditions.left, self.spent(conditions.now))
        return CORRECTIONS[action], "training"

    def observe(self, outcome: Outcome) -> None:
        super().observe(outcome)
        self._verifier_seconds += outcome.forward_seconds
        self._joules += self._costs.round_joules(outcome)
        self._bytes += outcome.sent + outcome.received

    def spent(self, now: float) -> float:
        """Return the cost of the answered rounds up to `now`."""
        joules = self._joules + self._idle_watts * now
        return self._objective.cost(now, self._verifier_seconds, joules, self._bytes)


def run_episode(scenario: EpisodeScenario, objective: Objective, choose: CorrectionCallback) -> float:
    """Simulate all texts of a scenario with the corrections that `choose` returns; return their total cost."""
    planner = CallbackPlanner(objective, scenario, choose)
    simulator = Simulator(scenario.world(), planner)
    for text in scenario.texts:
        planner.end += len(text)
        simulator.run(text)
    return planner.spent(simulator.now)


class AnalyticBaseline:
    """Cost of the analytic planner in a scenario by position.

    Attributes:
        spent: cost of all texts.
        cost_per_token: mean over all texts.
        observations: one for each plan that can be corrected.
    """

    def __init__(self, scenario: EpisodeScenario, objective: Objective) -> None:
        self._done, self._spent = [0], [0.0]
        self.observations: list[Floats] = []
        self.spent = run_episode(scenario, objective, self._record_observation)
        self._record(sum(map(len, scenario.texts)), self.spent)
        self.cost_per_token = self.spent / self._done[-1]

    def cost_in_tokens(self, done: int) -> float:
        """Return the cost of the first `done` tokens, in units of the mean cost per token."""
        return float(np.interp(done, self._done, self._spent)) / self.cost_per_token

    def _record_observation(self, observation: Floats, done: int, spent: float) -> int:
        self.observations.append(observation)
        self._record(done, spent)
        return 0

    def _record(self, done: int, spent: float) -> None:
        # A round that was sent early and then dropped had assumed more completed tokens.
        while self._done and self._done[-1] >= done:
            self._done.pop()
            self._spent.pop()
        self._done.append(done)
        self._spent.append(spent)


class RoundEnvironment(gymnasium.Env[Floats, np.int64]):
    """Simulated rounds as a Gymnasium environment; see the module.

    Observations are those of `edge_runtime.planning.learned`, actions are indices of its `CORRECTIONS`. An episode ends
    with its last text. The `info` of the last step has `ratio`: cost of the episode over that of the analytic planner.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (declared so by Gymnasium)

    def __init__(self, objective: Objective | None = None, texts: list[RecordedText] | None = None) -> None:
        """
        Args:
            objective: prices; None means latency alone.
            texts: recorded texts; None means the training texts of the example family.
        """
        self._objective = objective or Objective()
        self._scenarios = ScenarioSampler(
            split_texts(read_texts(EXAMPLE_FAMILY_PATH / "acceptance.npz"))[0] if texts is None else texts
        )
        self.observation_space = gymnasium.spaces.Box(-LOG_LIMIT, LOG_LIMIT, (len(OBSERVATIONS),), np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(CORRECTIONS))
        self._episode: EpisodeThread | None = None
        self._baseline: AnalyticBaseline | None = None
        self._saved = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Start an episode in a new scenario."""
        super().reset(seed=seed)
        self.close()
        # Scenarios in which drafting never pays have nothing to correct, and are skipped.
        while True:
            scenario = self._scenarios.draw(int(self.np_random.integers(1 << 31)))
            self._episode = EpisodeThread(scenario, self._objective)
            request = self._episode.advance(None)
            if request.observation is not None:
                break
            self.close()
        self._baseline = AnalyticBaseline(scenario, self._objective)
        self._saved = self._baseline.cost_in_tokens(request.done) - request.spent / self._baseline.cost_per_token
        return request.observation, {"setting": scenario.name}

    def step(self, action: np.int64) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Continue the simulation with a correction until the next plan."""
        assert self._episode is not None and self._baseline is not None, "reset first"
        request = self._episode.advance(int(action))
        saved = self._baseline.cost_in_tokens(request.done) - request.spent / self._baseline.cost_per_token
        reward, self._saved = saved - self._saved, saved
        if request.observation is None:
            self.close()
            ratio = request.spent / self._baseline.spent
            return np.zeros(len(OBSERVATIONS), np.float32), reward, True, False, {"ratio": ratio}
        return request.observation, reward, False, False, {}

    def close(self) -> None:
        """Abandon the current episode."""
        if self._episode:
            self._episode.abandon()
            self._episode = None


class DecisionRequest(NamedTuple):
    """A correction to choose, or the end of an episode.

    Attributes:
        observation: None at the end.
        done: completed tokens.
    """

    observation: Floats | None
    done: int
    spent: float


class EpisodeAbandoned(Exception):
    """Stops the thread of an abandoned episode."""


class EpisodeThread:
    """Simulates a scenario in a thread, because the simulator calls its planner but Gymnasium is driven by step()."""

    def __init__(self, scenario: EpisodeScenario, objective: Objective) -> None:
        self._scenario, self._objective = scenario, objective
        self._requests: SimpleQueue[DecisionRequest | Exception] = SimpleQueue()
        self._actions: SimpleQueue[int | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def advance(self, action: int | None) -> DecisionRequest:
        """Start (None) or continue with an action; return the next request. Raises the exceptions of the simulation."""
        if action is None:
            self._thread.start()
        else:
            self._actions.put(action)
        request = self._requests.get()
        if isinstance(request, Exception):
            raise request
        return request

    def abandon(self) -> None:
        """Stop the thread, whether or not the episode is over."""
        self._actions.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            spent = run_episode(self._scenario, self._objective, self._request_action)
            self._requests.put(DecisionRequest(None, sum(map(len, self._scenario.texts)), spent))
        except EpisodeAbandoned:
            pass
        except Exception as error:
            # Raised in the thread that called advance().
            self._requests.put(error)

    def _request_action(self, observation: Floats, done: int, spent: float) -> int:
        self._requests.put(DecisionRequest(observation, done, spent))
        action = self._actions.get()
        if action is None:
            raise EpisodeAbandoned
        return action


def _join_texts(texts: list[RecordedText], factor: float) -> RecordedText:
    """Join texts into one, with a prompt that is `factor` times as long as the first one's."""
    first = texts[0]
    return msgspec.structs.replace(
        first,
        prompt=1 + int(factor * first.prompt),
        confidences=[confidence for text in texts for confidence in text.confidences],
        ranks=[rank for text in texts for rank in text.ranks],
        continuations=[row for text in texts for row in text.continuations],
    )


def _draw_link(random: Random) -> tuple[str, tuple[tuple[float, LinkParameters], ...], bool]:
    """Return a name, link parameters with their seconds, and whether these phases repeat."""
    kind = random.random()
    if kind < BURSTY_LINK_SHARE:
        phases = ((random.uniform(3.0, 15.0), BURSTY_GOOD), (random.uniform(1.0, 5.0), BURSTY_BAD))
        return "bursty", tuple((seconds, _perturb_link(random, link)) for seconds, link in phases), True
    first = random.choice(list(LINK_PRESETS.values()))
    if kind < BURSTY_LINK_SHARE + LINK_CHANGE_SHARE:
        second = random.choice(list(LINK_PRESETS.values()))
        after = random.uniform(1.0, 15.0)
        return (
            f"{first.name}, then {second.name}",
            ((after, _perturb_link(random, first)), (1.0, _perturb_link(random, second))),
            False,
        )
    return first.name, ((1.0, _perturb_link(random, first)),), False


def _perturb_link(random: Random, link: LinkParameters) -> LinkParameters:
    """Return `link` with perturbed delays, rates and losses."""
    delay, rate = _lognormal_factor(random, 0.3), _lognormal_factor(random, 0.3)
    return msgspec.structs.replace(
        link,
        rtt_seconds=link.rtt_seconds * delay,
        jitter_seconds=min(link.jitter_seconds * delay * _lognormal_factor(random, 0.3), link.rtt_seconds * delay),
        up_rate=link.up_rate * rate,
        down_rate=link.down_rate * rate,
        loss=link.loss * _lognormal_factor(random, 0.5),
    )


def _draw_verifier(random: Random) -> VerifierCost:
    cost = random.choice(list(VERIFIERS.values()))
    scale, slope = _lognormal_factor(random, 0.3), _lognormal_factor(random, 0.2)
    single = cost.forwards[0][1]
    forwards = tuple((nodes, scale * (single + slope * (seconds - single))) for nodes, seconds in cost.forwards)
    return msgspec.structs.replace(
        cost,
        forwards=forwards,
        queue_seconds=cost.queue_seconds * _lognormal_factor(random, 0.3),
        draft_seconds=cost.draft_seconds * scale * _lognormal_factor(random, 0.2),
    )


def _lognormal_factor(random: Random, spread: float) -> float:
    """Return a random factor whose logarithm has mean 0 and this standard deviation."""
    return float(np.exp(random.gauss(0.0, spread)))
