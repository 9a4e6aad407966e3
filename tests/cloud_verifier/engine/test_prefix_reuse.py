"""Reused prefixes over real HTTP: turns of a chat and parallel answers are those of transformers' generate."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cloud_verifier.cli.main import main
from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.model.pretrained import load_pretrained
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.engine.recording_target import RecordingTarget, running_scheduler, submit_opening
from tests.cloud_verifier.model.architectures import save_architecture
from tests.cloud_verifier.model.test_rope import LONGROPE, SWITCH, generate_without_cache
from tests.cloud_verifier.model.test_runner import save_lora_adapter
from tests.cloud_verifier.protocol_client import ClientSession, ProtocolClient, running
from tests.models import VOCABULARY_SIZE, save_target

SAMPLED = Sampling(0.9, top_p=0.95, seed=5, ignore_eos=True)
# By architecture: whether the next turn takes the cache of the one before it. The first ones run on the fast tier; of
# the others, Bloom's cache can be cropped, that of Gemma 3n has windows, and Mamba reads a text only as generate does.
ARCHITECTURES = {"qwen3": True, "gemma2": True, "bloom": True, "gemma3n_text": True, "mamba2": False}


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return [(37 * index + 11 * seed) % (VOCABULARY_SIZE - 1) + 1 for index in range(length)]


def close(client: ProtocolClient, session: ClientSession) -> None:
    assert client.http.delete(f"/v1/sessions/{session.id}").status_code == 204


def generate(
    client: ProtocolClient, prompt: list[int], sampling: Sampling, truth: list[int], drafts: bool
) -> ClientSession:
    """Generate the text `truth` after the prompt, if wanted with drafts of which a part is wrong."""
    session = client.open(prompt, sampling, n=1 if drafts else 4)
    while (done := len(session.ids) - len(prompt)) < len(truth):
        draft = [*truth[done : done + 3], 7] if drafts else []
        session.run_round(draft=draft, siblings={len(draft) - 1: [9, 11]} if drafts else {}, n=2)
    assert session.ids[len(prompt) :][: len(truth)] == truth
    return session


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [False, True], ids=["streamed", "drafted"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_turns_of_a_chat_equal_generate(tmp_path: Path, name: str, drafts: bool) -> None:
    path = save_architecture(tmp_path / "model", name)
    target, model = Target(path, device="cpu", dtype=torch.float32), load_pretrained(path, "cpu", torch.float32)
    prompt = make_prompt(60)
    with running(target) as url, ProtocolClient(url) as client:
        for turn in range(3):
            truth = generate_reference(model, prompt, SAMPLED, 12, frozenset())
            session = generate(client, prompt, SAMPLED, truth, drafts)
            assert (session.reply.cached > 0) == (turn > 0 and ARCHITECTURES[name])
            close(client, session)
            prompt = [*session.ids, *make_prompt(9, turn + 1)]
        # The second turn once more, with another question: its beginning is that of a longer text.
        prompt = [*prompt[:72], *make_prompt(9, 7)]
        truth = generate_reference(model, prompt, SAMPLED, 12, frozenset())
        close(client, generate(client, prompt, SAMPLED, truth, drafts))


def test_the_reply_and_the_metrics_say_how_much_was_cached(tiny: Target) -> None:
    with running(tiny) as url, ProtocolClient(url) as client:
        first = client.open(make_prompt(50), n=3)
        # A live session is as good as a closed one.
        second = client.open([*first.ids, 8, 8])
        close(client, first)
        close(client, second)
        third = client.open([*second.ids, 9])
        assert [session.reply.cached for session in (first, second, third)] == [0, 52, 55]
        lines = client.http.get("/metrics").text.splitlines()
    assert "flexspec_prefix_cache_hits_total 107.0" in lines
    assert "flexspec_prompt_tokens_total 162.0" in lines
    assert any(line.startswith("flexspec_prefix_cache_tokens") for line in lines)
    assert "flexspec_prefix_cache_evictions_total 0.0" in lines


async def test_parallel_answers_share_one_prefill(tiny: Target, tiny_path: Path) -> None:
    target, model = RecordingTarget(tiny), load_model(tiny_path, "cpu", "float32")[0]
    prompt = make_prompt(300)
    samplings = [Sampling(1.0, seed=seed, ignore_eos=True) for seed in range(6)]
    async with running_scheduler(target) as scheduler:
        target.may_run.clear()
        opened = [submit_opening(scheduler, target, prompt, sampling, n=8) for sampling in samplings]
        target.may_run.set()
        for sampling, (_, reply) in zip(samplings, opened, strict=True):
            tokens = (await reply.result()).tokens
            assert tokens == generate_reference(model, prompt, sampling, 8, frozenset())
        assert sorted(session.cached_tokens for session, _ in opened) == [0, *[299] * 5]
    # 299 rows of the prompt, and 8 of each answer.
    assert sum(map(sum, target.forwards)) == 299 + 6 * 8


async def test_a_prefill_that_fails_is_repeated_by_those_that_waited(tiny: Target, tiny_path: Path) -> None:
    target, model = RecordingTarget(tiny), load_model(tiny_path, "cpu", "float32")[0]
    prompt = make_prompt(300)
    async with running_scheduler(target) as scheduler:
        target.may_run.clear()
        (failing, failure), (_, reply) = [submit_opening(scheduler, target, prompt, SAMPLED, n=4) for _ in range(2)]
        target.fails = lambda segment: segment.sequence is failing.cache and segment.positions[0] > 0
        target.may_run.set()
        assert (await reply.result()).tokens == generate_reference(model, prompt, SAMPLED, 4, frozenset())
        with pytest.raises(Exception, match="the round failed"):
            await failure.result()


async def test_prefixes_are_not_reused_if_switched_off(tiny: Target) -> None:
    async with running_scheduler(tiny, reuse_prefixes=False) as scheduler:
        for _ in range(2):
            session, reply = submit_opening(scheduler, tiny, make_prompt(50))
            await reply.result()
            assert session.cached_tokens == 0
            scheduler.release(session)


def test_another_token_does_not_see_what_is_cached(
    tiny: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens.toml"
    tokens = {}
    for name in ("kitchen", "garage"):
        assert main(["token", "add", name, "--tokens", str(path)]) == 0
        tokens[name] = capsys.readouterr().out.strip()
    with running(tiny, authenticator=Authenticator(path)) as url:
        cached = []
        for name in ("kitchen", "garage", "kitchen"):
            with ProtocolClient(url, token=tokens[name]) as client:
                cached.append(client.open(make_prompt(50)).reply.cached)
    assert cached == [0, 0, 49]


@pytest.mark.slow
async def test_a_prefix_belongs_to_its_version(tiny_path: Path, tmp_path: Path) -> None:
    """Versions of one base share pages, but not contents; those of an unloaded version are gone."""
    base = Target(tiny_path, device="cpu", dtype=torch.float32)
    path = save_lora_adapter(tiny_path, tmp_path / "adapter", 1)
    model = load_model(path, "cpu", "float32")[0]
    prompt = make_prompt(50)
    expected = generate_reference(model, prompt, SAMPLED, 6, frozenset())

    def make(path: Path, name: str, others: list[Target]) -> Target:
        return Target(path, device="cpu", dtype=torch.float32, name=name, share_with=others)

    async with running_scheduler(base, target_factory=make) as scheduler:
        for cached in (0, 49):
            session, reply = submit_opening(scheduler, base, prompt, SAMPLED)
            await reply.result()
            assert session.cached_tokens == cached
            scheduler.release(session)
        for _ in range(2):
            adapted = await scheduler.load(path, "adapter")
            for cached in (0, 49):
                session, reply = submit_opening(scheduler, adapted, prompt, SAMPLED, n=6)
                assert (await reply.result()).tokens == expected
                assert session.cached_tokens == cached
                scheduler.release(session)
            await scheduler.unload(adapted.version)
        assert scheduler.retained_tokens == 50


@pytest.mark.slow
def test_keys_with_other_frequencies_are_not_reused(tmp_path: Path) -> None:
    """Phi-3 computes all keys of a text anew when it outgrows the first set of frequencies."""
    path = save_target(tmp_path / "phi3", "phi3", **LONGROPE)
    target, model = Target(path, device="cpu", dtype=torch.float32), load_model(path, "cpu", "float32")[0]
    prompt = make_prompt(SWITCH - 8)
    texts = {
        count: generate_without_cache(model, text, SAMPLED, 20)
        for count, text in ((0, prompt), (2, [*prompt, 5, 5]), (30, [*prompt, *make_prompt(30, 3)]))
    }
    with running(target) as url, ProtocolClient(url) as client, ThreadPoolExecutor(2) as threads:
        # Of two sessions that share pages, one outgrows the first set while the other does not.
        short, long = (client.open(prompt, SAMPLED) for _ in range(2))
        assert long.reply.cached == len(prompt) - 1
        long.run_round(n=12)
        short.run_round(n=2)
        list(threads.map(lambda session: session.run_round(n=7), (short, long)))
        for session in (short, long):
            assert session.ids[len(prompt) :] == texts[0][: len(session.ids) - len(prompt)]
        assert len(short.ids) <= SWITCH + 2 < len(long.ids)
        for count, cached in ((2, len(prompt)), (30, len(prompt))):
            text = [*prompt, 5, 5] if count == 2 else [*prompt, *make_prompt(30, 3)]
            session = client.open(text, SAMPLED, n=20)
            assert session.ids[len(text) :] == texts[count]
            assert session.reply.cached <= cached


@pytest.mark.slow
def test_keys_that_depend_on_the_end_of_the_prompt(tmp_path: Path) -> None:
    """Llama with LongRoPE keeps the keys of its prompt: after a long prompt they are not those of a short one."""
    scaling = LONGROPE["rope_scaling"] | {"factor": 8.0, "original_max_position_embeddings": SWITCH}
    path = save_target(tmp_path / "llama", original_max_position_embeddings=SWITCH, rope_scaling=scaling)
    target, model = Target(path, device="cpu", dtype=torch.float32), load_model(path, "cpu", "float32")[0]
    prompt = make_prompt(SWITCH - 10)
    with running(target) as url, ProtocolClient(url) as client:
        first = client.open(prompt, SAMPLED, n=30)
        for text, cached in (
            (prompt, len(prompt) - 1),
            # Longer than the first set: the keys of `first` have the other frequencies.
            ([*first.ids, 5, 6], 0),
            ([*first.ids, 5, 6, 7], len(first.ids) + 2),
            (prompt[:40], 39),
        ):
            truth = generate_reference(model, text, SAMPLED, 20, frozenset())
            session = client.open(text, SAMPLED, n=20)
            assert (session.ids[len(text) :], session.reply.cached) == (truth, cached)
