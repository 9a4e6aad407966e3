"""The general tier: rollback, the bound on its memory, sessions that are lost, failures, and adapters."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cloud_verifier.engine import scheduler as scheduler_module
from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.engine.sessions import Session
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.general_tier import GeneralCachePool, GeneralRunner
from cloud_verifier.model.generation_state import GenerationModel, GenerationState
from cloud_verifier.model.kv_cache import CachedSequence, KVCacheFull
from cloud_verifier.model.limits import VerifierLimits
from cloud_verifier.model.pretrained import load_pretrained
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.errors import TargetError, VerifierRefused
from edge_runtime.protocol.messages import PROTOCOL_VERSION, ErrorCode, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier import VerifierClient, VerifierSession
from tests.cloud_verifier.engine.recording_target import RecordingTarget, running_scheduler, submit_opening
from tests.cloud_verifier.model.architectures import XLSTM, save_architecture
from tests.cloud_verifier.model.test_conformance import TargetText, assert_text_equal
from tests.conftest import serving
from tests.models import VOCABULARY_SIZE

ENDLESS = Sampling(ignore_eos=True)
PROMPT = [17, 30, 205, 9, 77, 150, 3, 41, 99, 12, 8, 60]
# One model that verifies drafts token by token, one that restores snapshots, and one that crops its cache.
TOKEN_BY_TOKEN, SNAPSHOTS, CROPPING = "mamba2", "gemma3n_text", "bloom"
MODELS = [TOKEN_BY_TOKEN, SNAPSHOTS, CROPPING]


class LoadedModel:
    """A target on the general tier and its model for references."""

    def __init__(self, path: Path) -> None:
        self.target = Target(path, device="cpu", dtype=torch.float32)
        self.model = load_pretrained(path, "cpu", torch.float32)

    @property
    def runner(self) -> GeneralRunner:
        assert isinstance(self.target.runner, GeneralRunner)
        return self.target.runner

    def text(self, prompt: list[int], sampling: Sampling = ENDLESS, count: int = 24) -> TargetText:
        return TargetText(prompt, sampling, generate_reference(self.model, prompt, sampling, count, frozenset()))


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return LoadedModel(save_architecture(tmp_path_factory.mktemp("models") / "model", request.param))


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return LoadedModel(save_architecture(tmp_path_factory.mktemp("models") / "model", TOKEN_BY_TOKEN))


def pool_of(scheduler: Scheduler) -> GeneralCachePool:
    (pool,) = scheduler._caches.pools
    assert isinstance(pool, GeneralCachePool)
    return pool


@pytest.mark.slow
def test_how_the_models_verify_drafts(tmp_path: Path) -> None:
    """The tests of this module cover what they say."""
    runners = {name: LoadedModel(save_architecture(tmp_path / name, name)).runner for name in MODELS}
    assert [runners[name].chunk_limit > 0 for name in MODELS] == [False, True, True]
    crops = {}
    for name in MODELS:
        state = GenerationState(GenerationModel(runners[name].model, 64))
        with torch.inference_mode():
            state.feed(PROMPT)
        crops[name] = state.can_crop
    assert crops == {TOKEN_BY_TOKEN: False, SNAPSHOTS: False, CROPPING: True}


@pytest.mark.slow
@pytest.mark.parametrize("draft_is_right", [True, False])
def test_rejected_rows_leave_no_trace(loaded: LoadedModel, draft_is_right: bool) -> None:
    pool, sequence = loaded.runner.shape.make_pool(1000), CachedSequence()
    continuation = loaded.text(PROMPT).continuation
    loaded.runner.run(pool, [Segment.from_tokens(sequence, PROMPT[:-1])])
    pool.keep(sequence, list(range(len(PROMPT) - 1)))
    ids = list(PROMPT)
    while len(ids) < len(PROMPT) + 15:
        right = continuation[len(ids) - len(PROMPT) :][:4]
        draft = right if draft_is_right else [right[0], right[1], (right[2] + 1) % VOCABULARY_SIZE, right[3]]
        tree = TokenTree(ids[-1], len(ids), draft, {})
        (sampled,) = loaded.runner.run(pool, [Segment.from_tree(sequence, tree, ENDLESS)])
        assert sampled is not None
        verification = tree.verify(sampled.__getitem__, frozenset())
        assert verification.accepted == (4 if draft_is_right else 2)
        pool.keep(sequence, verification.rows)
        ids += draft[: verification.accepted] + verification.tokens
        assert ids[len(PROMPT) :] == continuation[: len(ids) - len(PROMPT)]
    pool.release(sequence)
    assert pool.used_bytes == 0


@pytest.mark.slow
async def test_an_end_of_text_token_in_a_draft_ends_the_text(loaded: LoadedModel) -> None:
    text = loaded.text(PROMPT)
    end = text.continuation[2]
    target = RecordingTarget(loaded.target)
    target.end_ids = frozenset([end])
    expected = text.continuation[: text.continuation.index(end) + 1]
    async with running_scheduler(target) as scheduler:
        draft = text.continuation[:6]
        session, reply = submit_opening(scheduler, target, PROMPT, Sampling(), draft=draft)
        frame = await reply.result()
        assert draft[: frame.accepted] + frame.tokens == expected
        assert frame.finish == "stop"
        scheduler.release(session)


@pytest.mark.slow
async def test_caches_beyond_the_bound_are_dropped_and_computed_again(loaded: LoadedModel) -> None:
    texts = [loaded.text([(7 * i + 13 * k + 3) % VOCABULARY_SIZE for i in range(30)]) for k in range(5)]
    async with running_scheduler(loaded.target, window=0.0) as scheduler:
        pool = pool_of(scheduler)
        with torch.inference_mode():
            state = GenerationState(GenerationModel(loaded.runner.model, 64))
            state.feed(texts[0].prompt + texts[0].continuation)
        # Room for two texts of five, whatever each text does.
        pool.capacity_bytes = 2 * state.nbytes + 1
        await asyncio.gather(*(assert_text_equal(scheduler, loaded.target, text, k) for k, text in enumerate(texts)))
        assert 0 <= pool.used_bytes <= pool.capacity_bytes


async def test_a_text_that_exceeds_the_bound_alone_is_refused(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "CACHE_WAIT_SECONDS", 0.05)
    async with running_scheduler(loaded.target) as scheduler:
        pool_of(scheduler).capacity_bytes = 10
        session, reply = submit_opening(scheduler, loaded.target, PROMPT)
        with pytest.raises(VerifierRefused) as refusal:
            await reply.result()
        assert refusal.value.code == ErrorCode.OVERLOADED
        assert session.closed
        assert pool_of(scheduler).used_bytes == 0


def test_the_pool_is_bounded_by_the_tokens_that_it_is_made_for(loaded: LoadedModel) -> None:
    shape = loaded.runner.shape
    small, large = (shape.make_pool(tokens).capacity_bytes for tokens in (100, 1100))
    assert large - small == 1000 * shape.bytes_per_token
    assert small >= shape.fixed_bytes
    with pytest.raises(KVCacheFull):
        loaded.runner.run(
            GeneralCachePool(shape, 1), [Segment.from_tree(CachedSequence(), TokenTree(5, 1, [], {}), ENDLESS)]
        )


@pytest.mark.slow
async def test_a_session_that_was_lost_continues_with_the_same_text(loaded: LoadedModel) -> None:
    text = loaded.text(PROMPT)
    async with running_scheduler(loaded.target) as scheduler:
        ids, done = list(PROMPT), 0
        while done < 12:
            session, reply = submit_opening(scheduler, loaded.target, ids, ENDLESS, n=3)
            ids += (await reply.result()).tokens
            done = len(ids) - len(PROMPT)
            session.closed = True
            scheduler.release(session)
        assert ids[len(PROMPT) :] == text.continuation[:done]


@pytest.mark.slow
async def test_a_failing_round_does_not_harm_others_in_its_batch(loaded: LoadedModel) -> None:
    target = RecordingTarget(loaded.target)
    runner = loaded.runner
    text = loaded.text(PROMPT)
    original = runner._run_segment

    def run_segment(pool: GeneralCachePool, segment: Segment) -> Any:
        sampled = original(pool, segment)
        if 13 in segment.ids:
            raise RuntimeError("injected failure after the forward")
        return sampled

    runner._run_segment = run_segment  # type: ignore[method-assign]
    try:
        async with running_scheduler(target) as scheduler:
            target.may_run.clear()
            rounds = [submit_opening(scheduler, target, PROMPT, ENDLESS, draft=text.continuation[:k]) for k in range(3)]
            _, failing = submit_opening(scheduler, target, [13, 14])
            rounds += [submit_opening(scheduler, target, PROMPT, ENDLESS, draft=text.continuation[:4])]
            target.may_run.set()
            with pytest.raises(VerifierRefused, match="the round failed"):
                await failing.result()
            for session, reply in rounds:
                frame = await reply.result()
                got = reply.request.draft[: frame.accepted] + frame.tokens
                assert got == text.continuation[: len(got)]
                await continue_text(scheduler, session, text, len(got))
    finally:
        del runner._run_segment


async def continue_text(scheduler: Scheduler, session: Session, text: TargetText, done: int) -> None:
    reply = session.begin_round(RoundRequest(PROTOCOL_VERSION, 1, len(text.prompt) + done, n=4))
    scheduler.submit(session, reply)
    frame = await reply.result()
    assert frame.tokens == text.continuation[done : done + 4]


async def test_the_prompt_is_prefilled_before_the_round_is_timed(recurrent: LoadedModel) -> None:
    """The prefill of a prompt that is read at once is not counted as a forward of verification."""
    prompt = [(7 * i + 3) % VOCABULARY_SIZE for i in range(400)]
    async with running_scheduler(recurrent.target) as scheduler:
        _, reply = submit_opening(scheduler, recurrent.target, prompt, ENDLESS)
        frame = await reply.result()
        assert frame.prefill_100us > frame.forward_100us


def test_exact_verifies_token_by_token(tmp_path: Path) -> None:
    path = save_architecture(tmp_path / "model", CROPPING)
    assert GeneralRunner(load_pretrained(path, "cpu", torch.float32), 512, exact=True).chunk_limit == 0


def test_the_log_says_that_a_model_is_slower(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cloud_verifier"):
        Target(save_architecture(tmp_path / "model", TOKEN_BY_TOKEN), device="cpu", dtype=torch.float32)
    assert "runs on the general tier, one session per forward: slower" in caplog.text


def test_an_adapter_is_merged_into_its_base(recurrent: LoadedModel, tmp_path: Path) -> None:
    base = recurrent.target._path
    torch.manual_seed(1)
    options: dict[str, Any] = {"r": 4, "init_lora_weights": False, "target_modules": ["in_proj"]}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(tmp_path / "tuned")
    tuned = Target(tmp_path / "tuned", device="cpu", dtype=torch.float32, share_with=[recurrent.target])
    assert tuned.runner is not recurrent.runner
    assert tuned.adapter_slot == 0
    shared = dict(recurrent.runner.model.named_parameters())
    changed = {name for name, value in tuned.runner.model.named_parameters() if value is not shared[name]}
    assert changed == {name for name in shared if name.endswith("in_proj.weight")}
    reference, _, _ = load_model(tmp_path / "tuned", "cpu", "float32")
    pool, sequence = tuned.runner.shape.make_pool(100), CachedSequence()
    (sampled,) = tuned.run(pool, [tuned.tree_segment(sequence, TokenTree(5, 1, [], {}))])
    assert sampled is not None
    assert sampled[0].token == generate_reference(reference, [5], Sampling(), 1, frozenset())[0]


def test_weights_with_nan_are_refused(tmp_path: Path) -> None:
    path = save_architecture(tmp_path / "model", TOKEN_BY_TOKEN)
    model = load_pretrained(path, "cpu", torch.float32)
    model.backbone.norm_f.weight.data[3] = torch.nan
    model.save_pretrained(path)
    with pytest.raises(TargetError, match="nan or infinite"):
        Target(path, device="cpu", dtype=torch.float32)


@pytest.mark.slow
async def test_a_lost_session_of_a_model_that_remembers_its_prompt(tmp_path: Path) -> None:
    """Doge reads a prompt differently from the tokens that follow: over HTTP, the board says where the prompt ended."""
    loaded = LoadedModel(save_architecture(tmp_path / "model", "doge"))
    assert loaded.target.replays_prompt
    texts = [loaded.text(prompt, Sampling(0.8, seed=2, ignore_eos=True)) for prompt in (PROMPT, PROMPT[:5])]
    # Each of the two evicts the other.
    async with (
        serving(loaded.target, VerifierLimits(max_sessions=1)) as server,
        VerifierClient(server.url) as client,
    ):
        sessions = [VerifierSession(client, text.prompt, text.sampling) for text in texts]
        for _ in range(4):
            for session, text in zip(sessions, texts, strict=True):
                done = len(session.ids) - len(text.prompt)
                async for _ in session.run_round(text.continuation[done : done + 2], n=2):
                    pass
                assert session.ids == (text.prompt + text.continuation)[: len(session.ids)]
    assert [session.recoveries for session in sessions] == [3, 3]


@pytest.mark.slow
async def test_prompts_that_transformers_cannot_read_at_once_are_read_in_parts(tmp_path: Path) -> None:
    """The text of a short prompt, and of the same prompt with its first tokens as one long prompt."""
    loaded = LoadedModel(save_architecture(tmp_path / "model", "xlstm", **XLSTM))
    short = loaded.text(PROMPT, count=44)
    long = TargetText(short.prompt + short.continuation[:20], short.sampling, short.continuation[20:])
    async with running_scheduler(loaded.target) as scheduler:
        for text in (short, long):
            await assert_text_equal(scheduler, loaded.target, text, seed=1)
