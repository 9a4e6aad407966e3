"""A Gymnasium environment in which policies learn to correct the analytic planner's plans: the simulated round.

An episode is a few recorded texts, one after the other, on a board, a link and a verifier drawn at random around the
shipped presets; a step is one drafted round's plan. Every episode is first played by the analytic planner alone, and
what that cost at every position of every text is what an action's reward is measured against, so that easy texts and
cheap worlds bring no reward by themselves:

    reward = (what the analytic planner paid for the tokens of this step - what was paid now) / its cost per token

The rewards of an episode add up to the tokens that were saved, in tokens at the analytic planner's cost. What a round
that is sent early in vain seems to bring, the next one takes back.
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
CorrectionCallback = Callable[[Floats, int, float], int]
# The first texts of each kind are left to judge policies by.
HELD_OUT_TEXTS = 48
MAX_TEXTS = 8
# Recorded texts are joined to longer ones, so many at a time, behind prompts that are so many times as long.
JOINED_TEXT_COUNTS = (1, 1, 1, 2, 4)
PROMPT_FACTOR_RANGE = (0.3, 10.0)
# Bytes of a draft's weights.
WEIGHT_BYTES_RANGE = (20e6, 400e6)
# Shares of episodes in which the link changes once in a text, or comes and goes; and in which the target is replaced
# by its other version.
LINK_CHANGE_SHARE, BURSTY_LINK_SHARE = 0.15, 0.2
ROLLOUT_SHARE = 0.15
# Share of episodes in which the bundle says how often its draft was accepted.
EVALUATED_BUNDLE_SHARE = 0.5


class Scenario(NamedTuple):
    """What an episode is played in.

    Attributes:
        name: for people.
        believed: what the board's profile says.
        device: what the board really does.
        acceptance: as in the bundle's manifest; may be empty.
        parts: conducts of the link with the seconds for which each lasts; one alone lasts for ever.
        repeat: whether they begin again.
        verifier: its figures.
        texts: what is played.
        seed: of all that is random in it.
    """

    name: str
    believed: DeviceModel
    device: DeviceModel
    acceptance: Mapping[str, float]
    parts: tuple[tuple[float, LinkParameters], ...]
    repeat: bool
    verifier: VerifierCost
    texts: list[RecordedText]
    seed: int

    def world(self) -> World:
        """The world, from its start; equal ones take equal courses."""
        links = [SteadyLink(conduct, self.seed + index) for index, (_, conduct) in enumerate(self.parts)]
        link: Link = links[0]
        if len(links) > 1:
            lengths = [seconds for seconds, _ in self.parts]
            link = ScheduledLink([LinkPhase(*part) for part in zip(lengths, links, strict=True)], repeat=self.repeat)
        verifier = SimulatedVerifier(self.verifier, self.seed + 7)
        return World(self.name, self.device, link, verifier, self.seed + 8)


class ScenarioSampler:
    """Settings at random: presets of links, boards and verifiers whose figures are moved, and texts of one kind."""

    def __init__(self, texts: list[RecordedText]) -> None:
        """
        Args:
            texts: recorded ones; every kind among them counts alike.
        """
        kinds: dict[tuple[str, float], list[RecordedText]] = {}
        for text in texts:
            kinds.setdefault((text.target, text.temperature), []).append(text)
        self._kinds = kinds
        self._profiles = shipped_profiles()
        self._acceptance = read_bundle(EXAMPLE_FAMILY_PATH / "bundle", verify=False).manifest.acceptance

    def draw(self, seed: int) -> Scenario:
        """The setting of this seed."""
        random = Random(seed)
        profile = random.choice(self._profiles)
        name, conducts, repeat = _draw_link(random)
        weights = np.exp(random.uniform(*np.log(WEIGHT_BYTES_RANGE)))
        radio = conducts[0][1].radio
        believed = DeviceModel.from_profile(profile, int(weights), radio=radio)
        # Boards do not keep to their profiles.
        device = DeviceModel.from_profile(profile, int(weights * _lognormal_factor(random, 0.15)), radio=radio)
        cost = _draw_verifier(random)
        return Scenario(
            f"{name}, {profile.name} {weights / 1e6:.0f} MB, {cost.name}",
            believed,
            device,
            self._acceptance if random.random() < EVALUATED_BUNDLE_SHARE else {},
            conducts,
            repeat,
            cost,
            self._draw_texts(random),
            random.randrange(1 << 30),
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
    """Texts to learn from, and the first `HELD_OUT_TEXTS` of each kind, to be judged on."""
    seen: Counter[tuple[str, float]] = Counter()
    learnt, held_out = [], []
    for text in texts:
        kind = (text.target, text.temperature)
        seen[kind] += 1
        (held_out if seen[kind] <= HELD_OUT_TEXTS else learnt).append(text)
    return learnt, held_out


class CallbackPlanner(CorrectedPlanner):
    """Asks which correction to make, and keeps accounts.

    Attributes:
        ends: tokens of all texts up to the end of the one that is played.
    """

    def __init__(self, objective: Objective, setting: Scenario, ask: CorrectionCallback) -> None:
        super().__init__(objective, setting.believed, acceptance=setting.acceptance)
        self.ends = 0
        self._ask = ask
        self._idle_watts = setting.device.idle_watts
        self._verifier_seconds = self._joules = self._carried = 0.0

    def choose_correction(self, conditions: Conditions, observation: Floats) -> tuple[Correction, str]:
        action = self._ask(observation, self.ends - conditions.left, self.spent(conditions.now))
        return CORRECTIONS[action], "training"

    def observe(self, outcome: Outcome) -> None:
        super().observe(outcome)
        self._verifier_seconds += outcome.forward_seconds
        self._joules += self._costs.round_joules(outcome)
        self._carried += outcome.sent + outcome.received

    def spent(self, now: float) -> float:
        """Cost by `now`, as far as rounds have been answered."""
        joules = self._joules + self._idle_watts * now
        return self._objective.cost(now, self._verifier_seconds, joules, self._carried)


def run_episode(setting: Scenario, objective: Objective, ask: CorrectionCallback) -> float:
    """Plays all texts of a setting with plans that are corrected as `ask` says; their cost.

    Args:
        setting: what is played.
        objective: prices.
        ask: the index of a correction for (len(OBSERVATIONS),) observations, the tokens that are done, and the cost
            so far.
    """
    planner = CallbackPlanner(objective, setting, ask)
    simulator = Simulator(setting.world(), planner)
    for text in setting.texts:
        planner.ends += len(text)
        simulator.run(text)
    return planner.spent(simulator.now)


class AnalyticBaseline:
    """What the analytic planner alone pays in a setting, by position.

    Attributes:
        spent: cost of all texts.
        each: cost per token.
        observations: before each plan that could be corrected.
    """

    def __init__(self, setting: Scenario, objective: Objective) -> None:
        self._done, self._spent = [0], [0.0]
        self.observations: list[Floats] = []
        self.spent = run_episode(setting, objective, self._note)
        self._take(sum(map(len, setting.texts)), self.spent)
        self.each = self.spent / self._done[-1]

    def at(self, done: int) -> float:
        """Cost of the first `done` tokens, in tokens at this planner's mean cost."""
        return float(np.interp(done, self._done, self._spent)) / self.each

    def _note(self, observation: Floats, done: int, spent: float) -> int:
        self.observations.append(observation)
        self._take(done, spent)
        return 0

    def _take(self, done: int, spent: float) -> None:
        # A round that was sent early and in vain had counted on more tokens than there were.
        while self._done and self._done[-1] >= done:
            self._done.pop()
            self._spent.pop()
        self._done.append(done)
        self._spent.append(spent)


class RoundEnvironment(gymnasium.Env[Floats, np.int64]):
    """See the module.

    Observations are those of `edge_runtime.planning.learned`, actions are indices of its `CORRECTIONS`. An episode ends
    with its last text; the `info` of its last step has `ratio`, its cost to the analytic planner's.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own declaration)

    def __init__(self, objective: Objective | None = None, texts: list[RecordedText] | None = None) -> None:
        """
        Args:
            objective: prices; None: latency alone.
            texts: recorded ones to play; None: the example family's, but for those held out.
        """
        self._objective = objective or Objective()
        self._settings = ScenarioSampler(
            split_texts(read_texts(EXAMPLE_FAMILY_PATH / "acceptance.npz"))[0] if texts is None else texts
        )
        self.observation_space = gymnasium.spaces.Box(-LOG_LIMIT, LOG_LIMIT, (len(OBSERVATIONS),), np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(CORRECTIONS))
        self._player: EpisodeThread | None = None
        self._reference: AnalyticBaseline | None = None
        self._saved = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Begins an episode in another setting."""
        super().reset(seed=seed)
        self.close()
        # Where drafting never pays, there is nothing to correct.
        while True:
            setting = self._settings.draw(int(self.np_random.integers(1 << 31)))
            self._player = EpisodeThread(setting, self._objective)
            request = self._player.go_on(None)
            if request.observation is not None:
                break
            self.close()
        self._reference = AnalyticBaseline(setting, self._objective)
        self._saved = self._reference.at(request.done) - request.spent / self._reference.each
        return request.observation, {"setting": setting.name}

    def step(self, action: np.int64) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Plays on until the next plan."""
        assert self._player is not None and self._reference is not None, "reset first"
        request = self._player.go_on(int(action))
        saved = self._reference.at(request.done) - request.spent / self._reference.each
        reward, self._saved = saved - self._saved, saved
        if request.observation is None:
            self.close()
            ratio = request.spent / self._reference.spent
            return np.zeros(len(OBSERVATIONS), np.float32), reward, True, False, {"ratio": ratio}
        return request.observation, reward, False, False, {}

    def close(self) -> None:
        """Ends an episode in its middle."""
        if self._player:
            self._player.abandon()
            self._player = None


class DecisionRequest(NamedTuple):
    """A plan that is asked for, or an episode's end.

    Attributes:
        observation: None at the end.
        done: tokens.
        spent: cost so far.
    """

    observation: Floats | None
    done: int
    spent: float


class EpisodeAbandoned(Exception):
    """Nobody wants to know how the episode ends."""


class EpisodeThread:
    """Plays a setting in a thread of its own, since a simulator calls its planner and not the other way round."""

    def __init__(self, setting: Scenario, objective: Objective) -> None:
        self._setting, self._objective = setting, objective
        self._requests: SimpleQueue[DecisionRequest | Exception] = SimpleQueue()
        self._actions: SimpleQueue[int | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._play, daemon=True)

    def go_on(self, action: int | None) -> DecisionRequest:
        """Takes the action that was asked for, None at the start, and plays until the next one is wanted."""
        if action is None:
            self._thread.start()
        else:
            self._actions.put(action)
        request = self._requests.get()
        if isinstance(request, Exception):
            raise request
        return request

    def abandon(self) -> None:
        """Ends the thread, whether the episode is over or not."""
        self._actions.put(None)
        self._thread.join()

    def _play(self) -> None:
        try:
            spent = run_episode(self._setting, self._objective, self._ask)
            self._requests.put(DecisionRequest(None, sum(map(len, self._setting.texts)), spent))
        except EpisodeAbandoned:
            pass
        except Exception as error:
            # It belongs to the thread that waits for an answer.
            self._requests.put(error)

    def _ask(self, observation: Floats, done: int, spent: float) -> int:
        self._requests.put(DecisionRequest(observation, done, spent))
        action = self._actions.get()
        if action is None:
            raise EpisodeAbandoned
        return action


def _join_texts(texts: list[RecordedText], factor: float) -> RecordedText:
    """One text out of several, behind a prompt that is `factor` times as long as the first one's."""
    first = texts[0]
    return msgspec.structs.replace(
        first,
        prompt=1 + int(factor * first.prompt),
        confidences=[confidence for text in texts for confidence in text.confidences],
        ranks=[rank for text in texts for rank in text.ranks],
        continuations=[row for text in texts for row in text.continuations],
    )


def _draw_link(random: Random) -> tuple[str, tuple[tuple[float, LinkParameters], ...], bool]:
    """A name, conducts with the seconds for which they last, and whether they begin again."""
    kind = random.random()
    if kind < BURSTY_LINK_SHARE:
        parts = ((random.uniform(3.0, 15.0), BURSTY_GOOD), (random.uniform(1.0, 5.0), BURSTY_BAD))
        return "bursty", tuple((seconds, _perturb_link(random, conduct)) for seconds, conduct in parts), True
    first = random.choice(list(LINK_PRESETS.values()))
    if kind < BURSTY_LINK_SHARE + LINK_CHANGE_SHARE:
        then = random.choice(list(LINK_PRESETS.values()))
        after = random.uniform(1.0, 15.0)
        return (
            f"{first.name}, then {then.name}",
            ((after, _perturb_link(random, first)), (1.0, _perturb_link(random, then))),
            False,
        )
    return first.name, ((1.0, _perturb_link(random, first)),), False


def _perturb_link(random: Random, conduct: LinkParameters) -> LinkParameters:
    """`conduct` with other delays, rates and losses."""
    delay, rate = _lognormal_factor(random, 0.3), _lognormal_factor(random, 0.3)
    return msgspec.structs.replace(
        conduct,
        rtt_seconds=conduct.rtt_seconds * delay,
        jitter_seconds=min(
            conduct.jitter_seconds * delay * _lognormal_factor(random, 0.3), conduct.rtt_seconds * delay
        ),
        up_rate=conduct.up_rate * rate,
        down_rate=conduct.down_rate * rate,
        loss=conduct.loss * _lognormal_factor(random, 0.5),
    )


def _draw_verifier(random: Random) -> VerifierCost:
    cost = random.choice(list(VERIFIERS.values()))
    all_, wide = _lognormal_factor(random, 0.3), _lognormal_factor(random, 0.2)
    single = cost.forwards[0][1]
    forwards = tuple((nodes, all_ * (single + wide * (seconds - single))) for nodes, seconds in cost.forwards)
    return msgspec.structs.replace(
        cost,
        forwards=forwards,
        queue_seconds=cost.queue_seconds * _lognormal_factor(random, 0.3),
        draft_seconds=cost.draft_seconds * all_ * _lognormal_factor(random, 0.2),
    )


def _lognormal_factor(random: Random, spread: float) -> float:
    """A factor whose logarithm has this standard deviation."""
    return float(np.exp(random.gauss(0.0, spread)))
