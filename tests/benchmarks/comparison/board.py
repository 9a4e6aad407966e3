"""The process on the board: `python -m tests.benchmarks.comparison.board BUNDLE`.

Reads `Prepare` and `AnswerCommand` from its standard input, and answers each with an `AnswerReport`. The draft model
takes the time of the board that `Prepare` names (`pacing`). What a system has learned, and its connections, are kept
for each combination of link, verifier, board and system, as a service that runs for days would keep them.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import httpx
import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.board_profile import cache_bytes, find_profile, weight_bytes
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.factory import DEFAULT_POLICY, make_planner
from edge_runtime.planning.objective import parse_objective
from edge_runtime.planning.plan import FixedPlanner, Outcome, Plan, Planner
from edge_runtime.protocol.bundle import Manifest, read_bundle, read_head_ids
from edge_runtime.protocol.sampling import Sampling, common_prefix_length
from edge_runtime.verifier.client import VerifierClient
from tests.benchmarks.comparison.distributions import (
    Probabilities,
    ProbabilityOpening,
    ProbabilityReply,
    ProbabilityRound,
    decode_distribution,
    draw,
    encode_distribution,
    residual,
    warp,
)
from tests.benchmarks.comparison.isolation import SampleIsolation
from tests.benchmarks.comparison.pacing import DraftPace
from tests.benchmarks.plan_parts import PLAN_PARTS, ChangedPlanner
from tests.emulator.control import claim_standard_output

# Longest draft that is tried when the best fixed length is looked for, and tokens of the text that is generated for
# that. Chosen: no length beyond it pays on these links with an acceptance rate below 0.9.
MAX_FIXED_DRAFT, TRIAL_TOKENS = 8, 48

# Longer than any pause of a machine that is busy with other things. Chosen.
DEADLINE_SECONDS = 120.0

HeadIds = npt.NDArray[np.int32]

Kind = Literal["planner", "fixed", "streaming", "traditional", "dssd", "draft"]


class System(msgspec.Struct, frozen=True):
    """One of the systems that are compared.

    Attributes:
        name: in tables.
        kind: `planner`: this project; `fixed`: rounds of K draft tokens, ids only; `streaming`: the cloud alone;
            `traditional` and `dssd`: see `distributions`; `draft`: the draft model alone, without a cloud.
        cloud: which process in the cloud answers: `plain`, `speculating` or `probabilities`; empty for none.
        objective: of the planner.
        continuation: tokens of the target's own in a round of `streaming`; 0 for the whole text.
        draft_ahead: draft the next round's tokens while one is in flight.
        exact: claims the text that transformers generates for this prompt, sampling and seed.
        off: a part that is switched off, of PLAN_PARTS, or `HTTP/2`.
    """

    name: str
    kind: Kind
    cloud: str = ""
    objective: str = ""
    continuation: int = 0
    draft_ahead: bool = False
    exact: bool = True
    off: str = ""


class Prepare(msgspec.Struct, tag=True):
    """Command: get ready for an answer of a system: connect, and the first time, learn from a text.

    Attributes:
        place: link, verifier and board, as a key.
        up_rate: of the link, in bits per second.
    """

    system: System
    place: str
    url: str
    board: str
    radio: str
    up_rate: float
    prompt: list[int]
    temperature: float


class AnswerCommand(msgspec.Struct, tag=True):
    """Command: generate an answer with the system that was prepared last."""

    prompt: list[int]
    temperature: float
    seed: int
    tokens: int


class Costs(msgspec.Struct):
    """What the rounds of an answer took; times in seconds.

    Attributes:
        draft_seconds: in which the board drafted, ahead included.
        exchange_seconds: in which a round was in flight.
        verifier_seconds: of the target's forwards and of drafting beside it.
        forwards: of the target, prefill excluded.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    exchange_seconds: float = 0.0
    verifier_seconds: float = 0.0
    forwards: int = 0


class AnswerReport(msgspec.Struct):
    """An answer.

    Attributes:
        ids: its tokens.
        arrivals: seconds from the start at which each token was there.
        draft_length: the fixed K; 0 if there is none.
        late_seconds: by which the draft's steps took longer than the board's.
    """

    ids: list[int] = []
    arrivals: list[float] = []
    costs: Costs = msgspec.field(default_factory=Costs)
    draft_length: int = 0
    late_seconds: float = 0.0


class RoundTrial(NamedTuple):
    """A round from which the best draft length is derived."""

    drafted: int
    accepted: int
    draft_seconds: float
    exchange_seconds: float
    sent: int


def choose_draft_length(rounds: list[RoundTrial], up_rate: float) -> int:
    """Return the K with the least time for each token, by rounds that were drafted with MAX_FIXED_DRAFT.

    Drafting takes time by the token, bytes take time at the link's rate, and the rest of an exchange does not depend on
    K. Tokens of a round: 1 + S(1) + .. + S(K), with S(k) the share of rounds in which k tokens or more were accepted.
    """
    drafted = sum(each.drafted for each in rounds)
    step = sum(each.draft_seconds for each in rounds) / drafted
    upload = 8 * sum(each.sent for each in rounds) / drafted / up_rate
    fixed = statistics.median(each.exchange_seconds - upload * each.drafted for each in rounds)
    costs, tokens = [], 1.0
    for length in range(1, MAX_FIXED_DRAFT + 1):
        long_enough = [each for each in rounds if each.drafted >= length]
        tokens += sum(each.accepted >= length for each in long_enough) / max(1, len(long_enough))
        costs.append((fixed + length * (step + upload)) / tokens)
    return 1 + int(np.argmin(costs))


def make_device(manifest: Manifest, board: str, radio: str) -> DeviceModel:
    """Return the modeled speed and power draw of a board with the draft of a bundle."""
    weights, cached = weight_bytes(manifest), cache_bytes(manifest)
    return DeviceModel.from_profile(find_profile(board), weights, radio=radio, cache_bytes=cached)


class Contestant(Protocol):
    """A system with its connections and what it has learned."""

    draft_length: int

    async def connect(self) -> None: ...

    async def answer(self, command: AnswerCommand) -> AnswerReport: ...

    def trials(self) -> list[RoundTrial]:
        """The rounds of the last answer."""


class RecordingPlanner(ChangedPlanner):
    """Also records the outcomes."""

    def __init__(self, planner: Planner, changes: Mapping[str, Any]) -> None:
        super().__init__(planner, changes)
        self.outcomes: list[Outcome] = []

    def observe(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        super().observe(outcome)


class IdsContestant:
    """Everything that sends ids alone: this project's decoding loop with a planner or a fixed plan."""

    def __init__(self, draft: OnnxDraft, command: Prepare, device: DeviceModel) -> None:
        self.draft_length = 0
        self._draft, self._system = draft, command.system
        self._client = VerifierClient(command.url, deadline=DEADLINE_SECONDS, http2=command.system.off != "HTTP/2")
        planner: Planner = FixedPlanner(Plan(0, continuation=command.system.continuation or 1 << 12))
        if command.system.kind == "planner":
            objective = parse_objective(command.system.objective)
            planner = make_planner(DEFAULT_POLICY, objective, device, acceptance=draft.manifest.acceptance)
        self._planner = RecordingPlanner(planner, PLAN_PARTS.get(command.system.off, {}))

    async def connect(self) -> None:
        await self._client.models()

    async def answer(self, command: AnswerCommand) -> AnswerReport:
        if self._system.kind == "fixed":
            length = self.draft_length or MAX_FIXED_DRAFT
            self._planner.planner = FixedPlanner(Plan(length, draft_ahead=length if self._system.draft_ahead else 0))
        self._planner.outcomes.clear()
        sampling = Sampling(command.temperature, seed=command.seed, ignore_eos=True)
        generation = Generation(
            self._draft,
            self._client,
            command.prompt,
            sampling,
            max_new_tokens=command.tokens,
            planner=self._planner,
        )
        started, arrivals = time.perf_counter(), []
        async for piece in generation:
            arrivals += [time.perf_counter() - started] * (len(piece.accepted) + len(piece.own))
        outcomes = self._planner.outcomes
        costs = Costs(
            rounds=len(outcomes),
            drafted=sum(each.drafted for each in outcomes),
            accepted=sum(each.accepted for each in outcomes),
            draft_seconds=sum(each.draft_seconds + each.ahead_seconds for each in outcomes),
            exchange_seconds=sum(each.exchange_seconds for each in outcomes),
            verifier_seconds=sum(each.forward_seconds for each in outcomes),
            forwards=sum(1 + each.further_forwards for each in outcomes),
        )
        return AnswerReport(generation.ids[len(command.prompt) :], arrivals, costs, self.draft_length)

    def trials(self) -> list[RoundTrial]:
        return [
            RoundTrial(each.drafted, each.accepted, each.draft_seconds, each.exchange_seconds, each.sent)
            for each in self._planner.outcomes
        ]


class PacedDraft(NamedTuple):
    """The draft model, and what makes it as slow as a board's.

    Attributes:
        head_ids: see `bundle.read_head_ids`.
    """

    model: OnnxDraft
    head_ids: HeadIds | None
    pace: DraftPace


class TextDraft:
    """The draft model on one text, by distributions.

    Attributes:
        ids: the text; what the KV cache holds of it is not prefilled again.
    """

    def __init__(self, draft: PacedDraft, temperature: float) -> None:
        self.ids: list[int] = []
        self._runner = draft.pace.make_runner(draft.model.session, draft.model.manifest.architecture)
        self._size, self._head_ids = draft.model.manifest.architecture.vocabulary_size, draft.head_ids
        self._temperature = temperature
        # What the KV cache holds.
        self._read: list[int] = []

    def propose(self, count: int, random: np.random.Generator) -> tuple[list[int], list[Probabilities]]:
        """Draw `count` tokens after the text; returns them, and the (V,) distribution that each was drawn from."""
        tokens: list[int] = []
        distributions: list[Probabilities] = []
        known = min(common_prefix_length(self._read, self.ids), len(self.ids) - 1)
        self._runner.truncate(known)
        unread = self.ids[known:]
        for _ in range(count):
            distribution = warp(self._runner.append(unread), self._temperature)
            if self._head_ids is not None:
                covered, distribution = distribution, np.zeros(self._size, np.float32)
                distribution[self._head_ids] = covered
            tokens.append(draw(distribution, random))
            distributions.append(distribution)
            unread = tokens[-1:]
        self._read = self.ids + tokens[:-1] if count else self.ids[:known]
        return tokens, distributions


class ProbabilitiesContestant:
    """Traditional speculative decoding and DSSD, over one kept-alive HTTP/1.1 connection.

    HTTP/1.1, because the flow control of HTTP/2 would cost the large bodies of these systems round trips.
    """

    def __init__(self, draft: PacedDraft, command: Prepare) -> None:
        self.draft_length = 0
        self._draft, self._traditional = draft, command.system.kind == "traditional"
        headers = {"accept-encoding": "identity", "user-agent": "b", "accept": "*/*"}
        self._client = httpx.AsyncClient(base_url=command.url, headers=headers, timeout=120)
        self._trials: list[RoundTrial] = []
        # Of the sample: further turns of a conversation go on with its KV cache.
        self._text: TextDraft | None = None

    async def connect(self) -> None:
        self._text = None
        await self._client.delete("/sessions/0")

    async def answer(self, command: AnswerCommand) -> AnswerReport:
        self._trials = []
        report, started = AnswerReport(draft_length=self.draft_length), time.perf_counter()
        random = np.random.default_rng([command.seed, 0])
        text = self._text = self._text or TextDraft(self._draft, command.temperature)
        text.ids = list(command.prompt)
        costs, session = report.costs, 0
        # The token that the board drew after a rejection, and that the cloud does not know yet.
        unsent: list[int] = []
        while (left := command.tokens - len(report.ids)) > 0:
            began = time.perf_counter()
            # As `planning.round_rules.limit_draft`.
            count = min(self.draft_length or MAX_FIXED_DRAFT, left - 1)
            tokens, distributions = await asyncio.to_thread(text.propose, count, random)
            if self._traditional:
                carried = [encode_distribution(each) for each in distributions]
            else:
                chosen = [each[token] for each, token in zip(distributions, tokens, strict=True)]
                carried = [np.array(chosen, "<f2").tobytes()]
            request = ProbabilityRound(session, costs.rounds, unsent + tokens, carried, self._traditional)
            if not session:
                request.opening = ProbabilityOpening(command.prompt, command.temperature, command.seed)
            sent_at, body = time.perf_counter(), msgspec.msgpack.encode(request)
            response = await self._client.post("/rounds", content=body)
            reply = msgspec.msgpack.decode(response.raise_for_status().content, type=ProbabilityReply)
            answered = time.perf_counter()
            session, unsent, token = reply.session, [], reply.token
            if token < 0:
                target = decode_distribution(reply.distribution, len(distributions[0]))
                token = draw(residual(target, distributions[reply.accepted]), random)
                unsent = [token]
            verified = [*tokens[: reply.accepted], token]
            report.ids += verified
            text.ids += verified
            report.arrivals += [time.perf_counter() - started] * len(verified)
            costs.rounds += 1
            costs.forwards += 1
            costs.drafted += len(tokens)
            costs.accepted += reply.accepted
            costs.draft_seconds += sent_at - began
            costs.exchange_seconds += answered - sent_at
            costs.verifier_seconds += reply.forward_100us / 1e4
            if tokens:
                trial = RoundTrial(len(tokens), reply.accepted, sent_at - began, answered - sent_at, len(body))
                self._trials.append(trial)
        await self._client.delete(f"/sessions/{session}")
        return report

    def trials(self) -> list[RoundTrial]:
        return self._trials


class DraftContestant:
    """The draft model alone."""

    draft_length = 0

    def __init__(self, draft: OnnxDraft) -> None:
        self._draft = draft

    async def connect(self) -> None:
        pass

    async def answer(self, command: AnswerCommand) -> AnswerReport:
        report, started = AnswerReport(), time.perf_counter()
        sampling, context = Sampling(command.temperature, seed=command.seed), self._draft.new_context()
        context.reuse_prefix(command.prompt)
        for _ in range(command.tokens):
            proposal = await asyncio.to_thread(context.propose, command.prompt + report.ids, 1, sampling)
            report.ids += proposal.tokens
            report.arrivals.append(time.perf_counter() - started)
        context.close()
        report.costs.draft_seconds = report.arrivals[-1]
        return report

    def trials(self) -> list[RoundTrial]:
        return []


class Board:
    """Executes the commands."""

    def __init__(self, bundle: Path) -> None:
        self._pace = DraftPace()
        self._pace.install()
        self._isolation = SampleIsolation()
        self._isolation.install()
        opened = read_bundle(bundle)
        model = OnnxDraft(opened, threads=1)
        self._draft = PacedDraft(model, read_head_ids(opened), self._pace)
        self._contestants: dict[tuple[str, str], Contestant] = {}
        self._current: Contestant = DraftContestant(self._draft.model)

    async def execute(self, command: Prepare | AnswerCommand) -> AnswerReport:
        if isinstance(command, Prepare):
            await self._prepare(command)
            return AnswerReport()
        before = self._pace.counts.late_seconds
        report = await self._current.answer(command)
        report.late_seconds = self._pace.counts.late_seconds - before
        return report

    async def _prepare(self, command: Prepare) -> None:
        device = make_device(self._draft.model.manifest, command.board, command.radio) if command.board else None
        self._pace.device = device
        key = command.place, command.system.name
        known = key in self._contestants
        if not known:
            self._contestants[key] = self._enter(command, device or DeviceModel())
        self._current = self._contestants[key]
        await self._current.connect()
        kind = command.system.kind
        if not known and kind in ("planner", "fixed", "traditional", "dssd"):
            await self._current.answer(AnswerCommand(command.prompt, command.temperature, 1 << 20, TRIAL_TOKENS))
            if kind != "planner":
                # A last round without room for a draft tells nothing.
                trials = [trial for trial in self._current.trials() if trial.drafted]
                self._current.draft_length = choose_draft_length(trials, command.up_rate)
            await self._current.connect()
        self._isolation.sample += 1

    def _enter(self, command: Prepare, device: DeviceModel) -> Contestant:
        if command.system.kind == "draft":
            return DraftContestant(self._draft.model)
        if command.system.kind in ("traditional", "dssd"):
            return ProbabilitiesContestant(self._draft, command)
        return IdsContestant(self._draft.model, command, device)


def main() -> None:
    board = Board(Path(sys.argv[1]))
    replies = claim_standard_output()
    with asyncio.Runner() as runner:
        for line in sys.stdin.buffer:
            report = runner.run(board.execute(msgspec.json.decode(line, type=Prepare | AnswerCommand)))
            replies.write(msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
