"""The systems that the benchmark `systems` compares: wire formats, acceptance, pacing, lengths, links."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from cloud_verifier.model.kv_cache import CachedSequence
from cloud_verifier.model.prefix_cache import CacheScope, PrefixCache
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from edge_runtime.common.http_server import HttpServer, ListenOptions
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.draft.onnx_runner import make_runner
from edge_runtime.draft.prefix_cache import DraftPrefixCache
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.protocol.sampling import Sampling
from tests.benchmarks import systems
from tests.benchmarks.comparison import links, texts
from tests.benchmarks.comparison.board import (
    MAX_FIXED_DRAFT,
    AnswerCommand,
    PacedDraft,
    Prepare,
    ProbabilitiesContestant,
    RoundTrial,
    System,
    choose_draft_length,
)
from tests.benchmarks.comparison.cloud import ProbabilityVerifier, make_app
from tests.benchmarks.comparison.distributions import (
    ProbabilityReply,
    ProbabilityRound,
    decode_distribution,
    draw,
    encode_distribution,
    judge,
    residual,
    warp,
)
from tests.benchmarks.comparison.isolation import SampleIsolation
from tests.benchmarks.comparison.pacing import DraftPace, PaceCounts
from tests.emulator.relay import payload_size
from tests.toy_family import FAMILY

SIZE = 49152
PROMPT = [5, 6, 7, 8, 9]
TOKENS = 24


def make_logits(spread: float, seed: int = 0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal(SIZE)).astype(np.float32)


@pytest.mark.parametrize(
    ("spread", "temperature", "smallest", "largest"),
    [
        (1.0, 0.0, 4, 8),  # One id and its probability.
        (0.1, 1.0, 1 + 2 * SIZE, 1 + 2 * SIZE),  # No id has probability 0, so that a mask costs more than it saves.
        (6.0, 0.7, 100, SIZE),
    ],
)
def test_a_distribution_survives_the_wire(spread: float, temperature: float, smallest: int, largest: int) -> None:
    probabilities = warp(make_logits(spread), temperature)
    encoded = encode_distribution(probabilities)
    assert smallest <= len(encoded) <= largest
    assert np.array_equal(decode_distribution(encoded, SIZE), probabilities)
    assert probabilities.sum() == pytest.approx(1, abs=0.02)


def test_a_round_of_traditional_decoding_carries_every_distribution() -> None:
    carried = [encode_distribution(warp(make_logits(0.1, seed), 1.0)) for seed in range(4)]
    body = msgspec.msgpack.encode(ProbabilityRound(1, 2, [3, 4, 5, 6], carried))
    assert 4 * 2 * SIZE < len(body) < 4 * 2 * SIZE + 50
    scalars = np.array([0.5] * 4, "<f2").tobytes()
    assert len(msgspec.msgpack.encode(ProbabilityRound(1, 2, [3, 4, 5, 6], [scalars], False))) < 25
    assert len(msgspec.msgpack.encode(ProbabilityReply(1, 2, 40_000, 300))) < 12


def test_tokens_are_distributed_as_the_targets_own() -> None:
    random = np.random.default_rng(1)
    target = np.array([0.5, 0.2, 0.2, 0.1, 0.0], np.float32)
    draft = np.array([0.1, 0.6, 0.1, 0.1, 0.1], np.float32)
    count, counts = 20_000, np.zeros(5)
    for _ in range(count):
        token = draw(draft, random)
        judgement = judge([token], draft[[token]], [target, target], random)
        counts[token if judgement.accepted else draw(residual(target, draft), random)] += 1
    deviations = np.abs(counts / count - target)
    assert (deviations <= 4 * np.sqrt(target * (1 - target) / count)).all()


def test_the_residual_of_equal_distributions_is_the_target() -> None:
    target = np.array([0.25, 0.75], np.float32)
    assert np.array_equal(residual(target, target), target)
    assert np.array_equal(residual(target, np.array([0.5, 0.5], np.float32)), [0, 0.25])


@pytest.mark.parametrize("kind", ["traditional", "dssd"])
async def test_greedy_texts_of_both_formats_are_those_of_transformers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    reused: list[int] = []
    open_ = PrefixCache.open

    def open_recorded(cache: PrefixCache, scope: CacheScope, ids: list[int], sequence: CachedSequence) -> int | None:
        length = open_(cache, scope, ids, sequence)
        reused.append(length or 0)
        return length

    monkeypatch.setattr(PrefixCache, "open", open_recorded)
    model, _, end_ids = load_model(FAMILY / "target-v1", "cpu", torch.float32)
    expected = generate_reference(model, PROMPT, Sampling(ignore_eos=True), TOKENS, end_ids)
    app = make_app(ProbabilityVerifier(Target(FAMILY / "target-v1", device="cpu", dtype=torch.float32)))
    server = HttpServer(app, ListenOptions(port=0))
    await server.start()
    try:
        prepare = Prepare(System("a system", kind), "here", server.url, "", "", 1e6, PROMPT, 0.0)  # type: ignore[arg-type]
        draft = PacedDraft(OnnxDraft.load(FAMILY / "bundle", threads=1), None, DraftPace())
        contestant = ProbabilitiesContestant(draft, prepare)
        await contestant.connect()
        report = await contestant.answer(AnswerCommand(PROMPT, 0.0, 0, TOKENS))
        assert report.ids == expected
        costs = report.costs
        assert costs.accepted + costs.forwards == TOKENS == len(report.arrivals)
        assert 0 < costs.accepted <= costs.drafted
        # The next turn begins with the KV caches of the first.
        prompt = PROMPT + expected + PROMPT
        second = await contestant.answer(AnswerCommand(prompt, 0.0, 0, TOKENS))
        assert second.ids == generate_reference(model, prompt, Sampling(ignore_eos=True), TOKENS, end_ids)
        assert sum(reused) == len(PROMPT + expected) - 1
        await contestant.connect()
        sampled = await contestant.answer(AnswerCommand(PROMPT, 1.0, 0, TOKENS))
        assert len(sampled.ids) == TOKENS
        assert sampled.costs.rounds < TOKENS
    finally:
        await server.stop()


def test_a_sample_begins_with_nothing_that_another_left(monkeypatch: pytest.MonkeyPatch) -> None:
    isolation = SampleIsolation()
    for cache_class, name in ((PrefixCache, "open"), (DraftPrefixCache, "take"), (DraftPrefixCache, "keep")):
        monkeypatch.setattr(cache_class, name, getattr(cache_class, name))
    isolation.install()

    draft = OnnxDraft.load(FAMILY / "bundle", threads=1)
    context = draft.new_context()
    context.prefill(PROMPT)
    context.close()
    assert draft.prefix_cache.take(PROMPT) is not None
    draft.prefix_cache.keep(make_runner(draft.session, draft.manifest.architecture), PROMPT)

    target = Target(FAMILY / "target-v1", device="cpu", dtype=torch.float32)
    pool = target.runner.shape.make_pool(64)
    prefixes, scope = PrefixCache(pool), CacheScope("", target)

    def open_text() -> int | None:
        sequence = CachedSequence()
        target.prepare_cache(sequence, len(PROMPT))
        reused = prefixes.open(scope, list(PROMPT), sequence)
        unread = PROMPT[reused or 0 :]
        target.run(pool, [target.prefill_segment(sequence, unread)])
        pool.keep(sequence, list(range(len(unread))))
        prefixes.close(sequence)
        return reused

    assert open_text() == 0
    assert open_text() == len(PROMPT) - 1
    isolation.sample += 1
    assert draft.prefix_cache.take(PROMPT) is None
    assert open_text() == 0


def test_a_conversation_has_a_question_and_what_follows_it() -> None:
    assert texts.make_turns("questions", 9) == [texts.QUESTIONS[1]]
    assert texts.make_turns("conversations", 1) == [texts.QUESTIONS[1], *texts.FURTHER_TURNS]
    documents = {texts.make_turns("documents", repetition)[0] for repetition in range(len(texts.QUESTIONS))}
    assert len(documents) == len(texts.QUESTIONS)
    assert min(map(len, documents)) > texts.DOCUMENT_CHARACTERS


def test_the_best_draft_length_follows_delay_and_bytes() -> None:
    def trials(exchange: float, sent: int) -> list[RoundTrial]:
        return [RoundTrial(8, accepted, 8 * 0.005, exchange, sent) for accepted in (8, 8, 6, 3)]

    assert choose_draft_length(trials(1.0, 50), up_rate=1e6) == MAX_FIXED_DRAFT
    assert choose_draft_length(trials(0.001, 50), up_rate=1e6) < MAX_FIXED_DRAFT
    # 100 KB for each token at 1 Mbit/s: 0.8 s.
    assert choose_draft_length(trials(6.5, 800_000), up_rate=1e6) == 1


def test_a_forward_takes_at_least_the_modeled_time() -> None:
    counts, started = PaceCounts(), time.perf_counter()
    counts.sleep_rest(started, 0.02)
    assert time.perf_counter() - started >= 0.02
    counts.sleep_rest(started, 0.01)
    assert counts.forwards == 2
    assert counts.late_seconds >= 0.01


def test_a_draft_runs_at_the_speed_of_a_board() -> None:
    draft, pace = OnnxDraft.load(FAMILY / "bundle", threads=1), DraftPace()
    runner = pace.make_runner(draft.session, draft.manifest.architecture)
    runner.append(PROMPT)
    assert pace.counts.forwards == 0
    pace.device = DeviceModel(step_seconds=0.05, prefill_seconds=0.03)
    started = time.perf_counter()
    runner.append([10])
    runner.append([11, 12])
    assert time.perf_counter() - started >= 0.05 + 0.06
    assert pace.counts.forwards == 2
    assert runner.length == len(PROMPT) + 3
    runner.copy_prefix(4).append([13])
    assert pace.counts.forwards == 3


def test_a_recorded_link_is_read_by_path(tmp_path: Path) -> None:
    (tmp_path / "train.up").write_text("0\n500\n1000\n")
    (tmp_path / "train.down").write_text("100\n200\n300\n1000\n")
    [conditions] = links.link_conditions(str(tmp_path / "train"))
    assert (conditions.up_trace, conditions.down_trace) == ([0, 500, 1000], [100, 200, 300, 1000])
    assert links.mean_rate(conditions.up_trace) == 3 * 1500 * 8
    # 0.1, 0.2, 0.3 and 1.0 s, and 1.1 s of the repetition.
    assert links.mean_rate(conditions.down_trace, (0.0, 1.15)) == pytest.approx(5 * 1500 * 8 / 1.15)


def test_every_place_has_all_systems_and_goals_about_scenarios_that_exist() -> None:
    keys = set(systems.CASES)
    for place in systems.PLACES:
        assert {f"{place.title}, {system.name}" for system in systems.SYSTEMS} <= keys
    goals = [goal for goals in systems.BENCHMARK.ratio_goals.values() for goal in goals]
    assert {key for goal in goals for key in (goal.scenario, *goal.baselines)} <= keys
    quick = {scenario.table for scenario, _ in systems.CASES.values() if scenario.quick}
    assert len(quick) == 1 + systems.QUICK_PLACES


def test_the_relay_counts_what_tcp_carries() -> None:
    ip = bytes([0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6]) + bytes(10)
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 0, 0, 8 << 4, 0x18, 0, 0, 0) + bytes(12)
    assert payload_size(ip + tcp + b"hello") == 5
    assert payload_size(ip + tcp) == 0
    udp = bytes([0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17]) + bytes(30)
    assert payload_size(udp) == payload_size(b"") == 0
