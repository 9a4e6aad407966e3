"""Rollouts under open sessions: every text comes from one version, from its first token to its last."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloud_verifier.engine.rollout import RetirementPolicy
from cloud_verifier.engine.sessions import RoundReply, Session
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from cloud_verifier.registry.registry import Registry
from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import JSON, ErrorCode, ModelList, OpenReply, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from tests.cloud_verifier.protocol_client import (
    PROMPT,
    TIMEOUT_SECONDS,
    ClientSession,
    ProtocolClient,
    listening,
    opening,
)
from tests.cloud_verifier.target_versions import registry_service, serve_registry
from tests.conftest import serving
from tests.models import save_target

SAMPLING = Sampling(temperature=0.8, seed=11, ignore_eos=True)
LENGTH = 40

ReferenceText = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def reference_text(models: Path) -> ReferenceText:
    """The reference text of each version after PROMPT, by its name or exact version."""
    texts = {}
    for seed in range(3):
        model, _, end_ids = load_model(models / f"v{seed}", "cpu", "float32")
        texts[f"v{seed}"] = generate_reference(model, PROMPT, SAMPLING, LENGTH, end_ids)
    assert len({tuple(text) for text in texts.values()}) == 3
    return lambda version: texts[version.partition("@")[0]]


@pytest.fixture
def url(registry: Registry) -> Iterator[str]:
    with serve_registry(registry, policy=RetirementPolicy(linger_seconds=0.2, grace_seconds=3600)) as url:
        wait_for_models(url, lambda listed: {"v0", "v1"} <= {model.id for model in listed.data})
        yield url


def list_models(url: str) -> ModelList:
    with ProtocolClient(url) as client:
        return client.decode_reply(client.http.get("/v1/models"), ModelList)


def wait_for_models(url: str, condition: Callable[[ModelList], object]) -> ModelList:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        response = httpx.get(f"{url}/readyz")
        if response.status_code == 200 and condition(list_models(url)):
            return list_models(url)
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():  # noqa: ASYNC110 - the condition becomes true in another thread
            await asyncio.sleep(0.02)


def wait_for_latest(url: str, version: str) -> None:
    """Wait until `latest` leads to the version of this name."""
    wait_for_models(url, lambda listed: listed.data[0].version.startswith(f"{version}@"))


def finish(session: ClientSession, **changes: object) -> list[int]:
    """Continue to LENGTH new tokens, with drafts that are mostly wrong; returns the new tokens."""
    while len(session.ids) < len(PROMPT) + LENGTH:
        left = len(PROMPT) + LENGTH - len(session.ids)
        session.run_round(**{"draft": [len(session.ids) % 300][: left - 1], "n": min(left, 3)} | changes)
        if len(session.ids) > len(PROMPT) + LENGTH:
            raise AssertionError("more tokens than requested")
        left = len(PROMPT) + LENGTH - len(session.ids)
        if left == 1:
            session.run_round(n=1)
    return session.ids[len(PROMPT) :]


@pytest.mark.slow
def test_a_session_stays_on_its_version(
    url: str, registry: Registry, models: Path, reference_text: ReferenceText
) -> None:
    with ProtocolClient(url) as client:
        old = client.open(sampling=SAMPLING, n=5)
        assert old.reply.version.startswith("v0@")
        registry.promote("latest", "v1")
        wait_for_latest(url, "v1")
        new = client.open(sampling=SAMPLING, n=5)
        old.run_round(n=4)
        registry.retire("v0")
        registry.add(str(models / "v2"))
        registry.promote("latest", "v2")
        wait_for_latest(url, "v2")
        newest = client.open(sampling=SAMPLING, n=5)
        assert [finish(session) for session in (old, new, newest)] == [reference_text(v) for v in ("v0", "v1", "v2")]


@pytest.mark.slow
def test_a_lost_session_continues_on_its_version_until_that_is_unloaded(
    url: str, registry: Registry, reference_text: ReferenceText
) -> None:
    with ProtocolClient(url) as client:
        session = client.open(sampling=SAMPLING, n=5)
        version, text = session.reply.version, list(session.ids)
        registry.promote("latest", "v1")
        wait_for_latest(url, "v1")
        client.http.delete(f"/v1/sessions/{session.id}")
        again = client.open(text, SAMPLING, model=version, n=5)
        registry.retire("v0")
        text = list(again.ids)
        wait_for_models(url, lambda listed: "v0" not in {model.id for model in listed.data})
        client.http.delete(f"/v1/sessions/{again.id}")
        once_more = client.open(text, SAMPLING, model=version)
        assert once_more.reply.version == version
        assert finish(once_more) == reference_text("v0")
        refusal = client.expect_error(client.post("/v1/sessions", opening(model="v0")), 404, ErrorCode.UNKNOWN_MODEL)
        assert "latest" in refusal.detail["available"]
        client.http.delete(f"/v1/sessions/{once_more.id}")
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while (response := client.post("/v1/sessions", opening(model=version))).status_code == 200:
            # Reopening keeps the version loaded, so pause for longer than it lingers.
            client.http.delete(f"/v1/sessions/{client.decode_reply(response, OpenReply).session}")
            assert time.monotonic() < deadline
            time.sleep(0.5)
        client.expect_error(response, 404, ErrorCode.UNKNOWN_MODEL)


@pytest.mark.slow
async def test_an_unloaded_version_is_garbage_collected(registry: Registry) -> None:
    """Even the initial one, after a draft was compared with it."""
    service = registry_service(registry, policy=RetirementPolicy(linger_seconds=0, grace_seconds=3600))
    async with listening(service) as server:
        versions = service.scheduler.versions
        async with httpx.AsyncClient(base_url=server.url, headers={"content-type": JSON}) as client:
            await wait_until(lambda: len(versions) == 2)
            version = service.rollout.default_target.version
            identity = versions[version].expected_identity("anchor/1/")
            request = messages.encode(opening(sampling=SAMPLING, n=5, identity=identity), JSON)
            opened = await client.post("/v1/sessions", content=request)
            assert opened.json()["version"] == version
            target, model = weakref.ref(versions[version]), weakref.ref(versions[version].runner.model)
            registry.promote("latest", "v1")
            registry.retire("v0")
            await client.delete(f"/v1/sessions/{opened.json()['session']}")
            await wait_until(lambda: version not in versions)
            assert (await client.post("/v1/sessions", content=messages.encode(opening(), JSON))).status_code == 200
            # Versions can still be loaded.
            registry.add(str(registry.path_of(registry.read().find_exact(version))))
            await wait_until(lambda: version in versions)
            await wait_until(lambda: (target(), model()) == (None, None))


@pytest.mark.slow
async def test_a_version_of_another_cache_shape_is_unloaded_with_its_pool(registry: Registry, tmp_path: Path) -> None:
    wide = save_target(tmp_path / "wide", num_key_value_heads=4)
    registry.add(str(wide))
    model, _, end_ids = load_model(wide, "cpu", "float32")
    text = generate_reference(model, PROMPT, SAMPLING, LENGTH, end_ids)
    service = registry_service(registry, policy=RetirementPolicy(linger_seconds=0, grace_seconds=3600))

    def loaded() -> list[str]:
        return [version for version in service.scheduler.versions if version.startswith("wide@")]

    async with (
        listening(service) as server,
        httpx.AsyncClient(base_url=server.url, headers={"content-type": JSON}) as client,
    ):

        async def generate() -> tuple[str, list[int]]:
            request = messages.encode(opening(sampling=SAMPLING, n=LENGTH, model="wide"), JSON)
            reply = (await client.post("/v1/sessions", content=request)).json()
            return reply["session"], reply["first"]["tokens"]

        for _ in range(2):
            await wait_until(loaded)
            target = service.scheduler.versions[loaded()[0]]
            generated = [await generate() for _ in range(3)]
            assert [tokens for _, tokens in generated] == [text] * 3
            registry.retire("wide")
            for session, _ in generated:
                await client.delete(f"/v1/sessions/{session}")
            await wait_until(lambda: not loaded())
            late = RoundReply(RoundRequest(messages.PROTOCOL_VERSION, 0, len(PROMPT)))
            service.scheduler.submit(Session(list(PROMPT), SAMPLING, target, late), late)
            with pytest.raises(VerifierRefused) as caught:
                await late.result()
            assert caught.value.code == ErrorCode.SESSION_LOST
            registry.add(str(wide))


@pytest.mark.slow
def test_a_repeated_opening_gets_its_session_after_the_alias_has_moved(
    url: str, registry: Registry, reference_text: ReferenceText
) -> None:
    with ProtocolClient(url) as client:
        request = opening(sampling=SAMPLING, n=5)
        first = client.decode_reply(client.post("/v1/sessions", request), OpenReply)
        registry.promote("latest", "v1")
        wait_for_latest(url, "v1")
        second = client.decode_reply(client.post("/v1/sessions", request), OpenReply)
        assert second == first
        assert finish(ClientSession(client, second, request)) == reference_text("v0")


@pytest.mark.slow
def test_a_canary_gets_its_share_of_sessions(url: str, registry: Registry) -> None:
    registry.canary("latest", "v1", 30)
    with ProtocolClient(url) as client:

        def version(model: str = "") -> str:
            session = client.open(model=model)
            client.http.delete(f"/v1/sessions/{session.id}")
            return session.reply.version.partition("@")[0]

        while version() != "v1":
            time.sleep(0.02)
        counts = Counter(version() for _ in range(150))
        assert 20 < counts["v1"] < 70  # 45 expected, four standard deviations
        assert counts["v0"] + counts["v1"] == 150
        exact = {model.id: model.version for model in list_models(url).data}
        assert {version(exact["v0"]) for _ in range(20)} == {version("v0")} == {"v0"}
        registry.rollback("latest")
        # With the canary, 40 sessions in a row on v0 would have a probability of less than 1e-6.
        while {version() for _ in range(40)} != {"v0"}:
            time.sleep(0.1)


@pytest.mark.slow
def test_the_list_of_models_has_aliases_and_versions(url: str, registry: Registry, models: Path) -> None:
    registry.promote("stable", "v1")
    listed = wait_for_models(url, lambda listed: len(listed.data) == 4)
    assert [(model.id, model.version.partition("@")[0]) for model in listed.data] == [
        ("latest", "v0"),
        ("stable", "v1"),
        ("v1", "v1"),
        ("v0", "v0"),
    ]


@pytest.mark.slow
def test_versions_are_promoted_ten_times_under_many_sessions(
    url: str, registry: Registry, models: Path, reference_text: ReferenceText
) -> None:
    """No session is lost, and no text mixes two versions."""
    done = threading.Event()
    opened: list[str] = []

    def board(number: int) -> None:
        with ProtocolClient(url) as client:
            while not done.is_set():
                session = client.open(sampling=SAMPLING, n=1 + number % 3)
                opened.append(session.reply.version.partition("@")[0])
                assert finish(session) == reference_text(session.reply.version), session.reply.version
                client.http.delete(f"/v1/sessions/{session.id}")

    with ThreadPoolExecutor(6) as pool:
        boards = [pool.submit(board, number) for number in range(6)]
        try:
            registry.add(str(models / "v2"))
            for round_ in range(10):
                name = f"v{(round_ + 1) % 3}"
                registry.promote("latest", name)
                registry.canary("latest", f"v{round_ % 3}", 20)
                wait_for_latest(url, name)
                before = opened.count(name)
                # A board that fails ends.
                while opened.count(name) == before and not any(board.done() for board in boards):
                    time.sleep(0.01)
                if round_ == 4:
                    registry.rollback("latest")
        finally:
            done.set()
        for finished in boards:
            finished.result()
    assert set(opened) == {"v0", "v1", "v2"}


@pytest.mark.slow
def test_adapters_of_one_base_and_an_unrelated_version_share_a_scheduler_and_a_draft(
    family: Path, tmp_path: Path
) -> None:
    """All of them are served at once, and the draft is not used for the version with another vocabulary."""
    registry = Registry(tmp_path / "registry")
    registry.add_draft(family / "bundle")
    paths = {name: family / name for name in ("target-v1", "target-v2", "target-v3", "target-v4")}
    paths["foreign"] = save_target(tmp_path / "foreign")
    for path in paths.values():
        registry.add(str(path), unshared=True)
    assert [entry.admitted for entry in registry.read().targets] == ["shared"] * 4 + ["unshared"]

    def reference(name: str) -> list[int]:
        model, _, end_ids = load_model(paths[name], "cpu", "float32")
        return generate_reference(model, PROMPT, SAMPLING, LENGTH, end_ids)

    with serve_registry(registry, draft=family / "bundle") as url:
        wait_for_models(url, lambda listed: paths.keys() <= {model.id for model in listed.data})

        def served_text(name: str) -> list[int]:
            with ProtocolClient(url) as client:
                return client.open(sampling=SAMPLING, model=name, n=LENGTH).ids[len(PROMPT) :]

        expected = {name: reference(name) for name in paths}
        with ThreadPoolExecutor(10) as pool:
            texts = {name: [pool.submit(served_text, name) for _ in range(2)] for name in paths}
            assert {name: [text.result() for text in both] for name, both in texts.items()} == {
                name: [text] * 2 for name, text in expected.items()
            }
        # With few concurrent rounds the draft is used.
        assert {name: served_text(name) for name in paths} == expected


@pytest.mark.slow
async def test_a_deployed_draft_serves_a_version_with_more_special_tokens(family: Path, tmp_path: Path) -> None:
    """The version also writes the added tokens, which the draft can neither propose nor embed."""
    tokenizer = AutoTokenizer.from_pretrained(family / "target-v1")
    model = AutoModelForCausalLM.from_pretrained(family / "target-v1")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|answer|>"]})
    rows, prompt = model.config.vocab_size, tokenizer.encode("def main(")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    frequent = max(plain := generate_reference(model, prompt, SAMPLING, LENGTH, frozenset()), key=plain.count)
    with torch.no_grad():
        # As the head is the embedding, the new tokens are about as likely as a frequent one.
        model.model.embed_tokens.weight[rows:] = 1.05 * model.model.embed_tokens.weight[frequent]
    model.save_pretrained(tmp_path / "version")
    tokenizer.save_pretrained(tmp_path / "version")
    expected = generate_reference(model, prompt, SAMPLING, LENGTH, frozenset())
    assert max(expected) >= rows
    target = Target(tmp_path / "version", device="cpu", dtype=torch.float32)
    draft = OnnxDraft.load(family / "bundle")
    async with serving(target) as server, VerifierClient(server.url) as client:
        for plan in (Plan(4), Plan(3, siblings=2, draft_ahead=2, in_flight=2), Plan(0, continuation=8, shadow=True)):
            generation = Generation(draft, client, prompt, SAMPLING, max_new_tokens=LENGTH, planner=FixedPlanner(plan))
            async for _ in generation:
                pass
            assert generation.ids[len(prompt) :] == expected
            assert generation.statistics.accepted or plan.shadow
