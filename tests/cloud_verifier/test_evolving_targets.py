"""Targets that evolve while sessions are open: every text is one version's own, from its first token to its last."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from cloud_verifier.api.server import VerifierServer
from cloud_verifier.engine.rollout import RetirementPolicy
from cloud_verifier.engine.sessions import RoundReply
from cloud_verifier.engine.sessions import Session as Pinned
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import load_model
from cloud_verifier.registry.registry import Registry
from edge_runtime.common.http_server import ListenOptions
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import JSON, ErrorCode, ModelList, OpenReply, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.protocol_client import PROMPT, ProtocolClient, Session, opening
from tests.cloud_verifier.target_versions import registry_service, serve_registry
from tests.models import save_target

WARM = Sampling(temperature=0.8, seed=11, ignore_eos=True)
LENGTH = 40

ReferenceText = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def reference_text(models: Path) -> ReferenceText:
    """What each version writes by itself behind PROMPT, by its name or exact version."""
    texts = {}
    for seed in range(3):
        model, _, end_ids = load_model(models / f"v{seed}", "cpu", "float32")
        texts[f"v{seed}"] = generate_reference(model, PROMPT, WARM, LENGTH, end_ids)
    assert len({tuple(text) for text in texts.values()}) == 3
    return lambda version: texts[version.partition("@")[0]]


@pytest.fixture
def url(registry: Registry) -> Iterator[str]:
    with serve_registry(registry, policy=RetirementPolicy(linger_seconds=0.2, grace_seconds=3600)) as url:
        wait(url, lambda listed: {"v0", "v1"} <= {model.id for model in listed.data})
        yield url


def models_of(url: str) -> ModelList:
    with ProtocolClient(url) as client:
        return client.decode_reply(client.http.get("/v1/models"), ModelList)


def wait(url: str, holds: Callable[[ModelList], object]) -> ModelList:
    end = time.monotonic() + 60
    while True:
        response = httpx.get(f"{url}/readyz")
        if response.status_code == 200 and holds(models_of(url)):
            return models_of(url)
        assert time.monotonic() < end
        time.sleep(0.05)


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(3000):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise TimeoutError


def leads(url: str, version: str) -> None:
    """Waits until `latest` leads to the version of this name."""
    wait(url, lambda listed: listed.data[0].version.startswith(f"{version}@"))


def finish(session: Session, **changes: object) -> list[int]:
    """Plays on to LENGTH new tokens, drafting nonsense now and then; returns them."""
    while len(session.ids) < len(PROMPT) + LENGTH:
        left = len(PROMPT) + LENGTH - len(session.ids)
        session.run_round(**{"draft": [len(session.ids) % 300][: left - 1], "n": min(left, 3)} | changes)
        if len(session.ids) > len(PROMPT) + LENGTH:
            raise AssertionError("more than was asked for")
        left = len(PROMPT) + LENGTH - len(session.ids)
        if left == 1:
            session.run_round(n=1)
    return session.ids[len(PROMPT) :]


def test_a_session_stays_with_its_version_whatever_happens_to_others(
    url: str, registry: Registry, models: Path, reference_text: ReferenceText
) -> None:
    with ProtocolClient(url) as client:
        old = client.open(sampling=WARM, n=5)
        assert old.reply.version.startswith("v0@")
        registry.promote("latest", "v1")
        leads(url, "v1")
        new = client.open(sampling=WARM, n=5)
        old.run_round(n=4)
        registry.retire("v0")
        registry.add(str(models / "v2"))
        registry.promote("latest", "v2")
        leads(url, "v2")
        newest = client.open(sampling=WARM, n=5)
        assert [finish(session) for session in (old, new, newest)] == [reference_text(v) for v in ("v0", "v1", "v2")]


def test_a_lost_session_goes_on_with_its_version_until_that_is_gone(
    url: str, registry: Registry, reference_text: ReferenceText
) -> None:
    with ProtocolClient(url) as client:
        session = client.open(sampling=WARM, n=5)
        version, text = session.reply.version, list(session.ids)
        registry.promote("latest", "v1")
        leads(url, "v1")
        client.http.delete(f"/v1/sessions/{session.id}")
        again = client.open(text, WARM, model=version, n=5)
        registry.retire("v0")
        text = list(again.ids)
        wait(url, lambda listed: "v0" not in {model.id for model in listed.data})
        client.http.delete(f"/v1/sessions/{again.id}")
        once_more = client.open(text, WARM, model=version)
        assert once_more.reply.version == version
        assert finish(once_more) == reference_text("v0")
        refusal = client.expect_error(client.post("/v1/sessions", opening(model="v0")), 404, ErrorCode.UNKNOWN_MODEL)
        assert "latest" in refusal.detail["available"]
        client.http.delete(f"/v1/sessions/{once_more.id}")
        end = time.monotonic() + 30
        while (response := client.post("/v1/sessions", opening(model=version))).status_code == 200:
            # Whoever comes back keeps it here; so nobody does for a while.
            client.http.delete(f"/v1/sessions/{client.decode_reply(response, OpenReply).session}")
            assert time.monotonic() < end
            time.sleep(2.5)
        client.expect_error(response, 404, ErrorCode.UNKNOWN_MODEL)


async def test_a_version_that_is_unloaded_leaves_nothing_behind(registry: Registry) -> None:
    """Even the first one, and though a draft was compared with it."""
    service = registry_service(registry, policy=RetirementPolicy(linger_seconds=0, grace_seconds=3600))
    server = VerifierServer(service, ListenOptions(port=0))
    await server.start()
    try:
        versions = service.scheduler.versions
        async with httpx.AsyncClient(base_url=server.url, headers={"content-type": JSON}) as client:
            await until(lambda: len(versions) == 2)
            version = service.rollout.default_target.version
            identity = versions[version].expected_identity("anchor/1/")
            asked = messages.encode(opening(sampling=WARM, n=5, identity=identity), JSON)
            opened = await client.post("/v1/sessions", content=asked)
            assert opened.json()["version"] == version
            target, model = weakref.ref(versions[version]), weakref.ref(versions[version].runner.model)
            registry.promote("latest", "v1")
            registry.retire("v0")
            await client.delete(f"/v1/sessions/{opened.json()['session']}")
            await until(lambda: version not in versions)
            assert (await client.post("/v1/sessions", content=messages.encode(opening(), JSON))).status_code == 200
            # Loading goes on.
            registry.add(str(registry.path_of(registry.read().find_exact(version))))
            await until(lambda: version in versions)
        gc.collect()
        assert (target(), model()) == (None, None)
    finally:
        await server.stop()


async def test_a_version_of_another_shape_takes_its_pool_along_and_whoever_comes_too_late_is_told(
    registry: Registry, tmp_path: Path
) -> None:
    wide = save_target(tmp_path / "wide", num_key_value_heads=4)
    registry.add(str(wide))
    model, _, end_ids = load_model(wide, "cpu", "float32")
    text = generate_reference(model, PROMPT, WARM, LENGTH, end_ids)
    service = registry_service(registry, policy=RetirementPolicy(linger_seconds=0, grace_seconds=3600))
    server = VerifierServer(service, ListenOptions(port=0))
    await server.start()

    def loaded() -> list[str]:
        return [version for version in service.scheduler.versions if version.startswith("wide@")]

    try:
        async with httpx.AsyncClient(base_url=server.url, headers={"content-type": JSON}) as client:

            async def write() -> tuple[str, list[int]]:
                asked = messages.encode(opening(sampling=WARM, n=LENGTH, model="wide"), JSON)
                told = (await client.post("/v1/sessions", content=asked)).json()
                return told["session"], told["first"]["tokens"]

            for _ in range(2):
                await until(loaded)
                target = service.scheduler.versions[loaded()[0]]
                written = [await write() for _ in range(3)]
                assert [tokens for _, tokens in written] == [text] * 3
                registry.retire("wide")
                for session, _ in written:
                    await client.delete(f"/v1/sessions/{session}")
                await until(lambda: not loaded())
                late = RoundReply(RoundRequest(messages.PROTOCOL_VERSION, 0, len(PROMPT)))
                service.scheduler.submit(Pinned(list(PROMPT), WARM, target, late), late)
                with pytest.raises(VerifierRefused) as caught:
                    await late.result()
                assert caught.value.code == ErrorCode.SESSION_LOST
                registry.add(str(wide))
    finally:
        await server.stop()


def test_a_repeated_opening_gets_its_session_though_the_alias_has_moved(
    url: str, registry: Registry, reference_text: ReferenceText
) -> None:
    with ProtocolClient(url) as client:
        request = opening(sampling=WARM, n=5)
        first = client.decode_reply(client.post("/v1/sessions", request), OpenReply)
        registry.promote("latest", "v1")
        leads(url, "v1")
        second = client.decode_reply(client.post("/v1/sessions", request), OpenReply)
        assert second == first
        assert finish(Session(client, second, request)) == reference_text("v0")


def test_a_canary_gets_its_share_and_all_others_what_they_ask_for(url: str, registry: Registry) -> None:
    registry.canary("latest", "v1", 30)
    time.sleep(1.5)
    with ProtocolClient(url) as client:

        def version(model: str = "") -> str:
            session = client.open(model=model)
            client.http.delete(f"/v1/sessions/{session.id}")
            return session.reply.version.partition("@")[0]

        counts = Counter(version() for _ in range(150))
        assert 20 < counts["v1"] < 70  # 45 expected, four standard deviations
        assert counts["v0"] + counts["v1"] == 150
        exact = {model.id: model.version for model in models_of(url).data}
        assert {version(exact["v0"]) for _ in range(20)} == {version("v0")} == {"v0"}
        registry.rollback("latest")
        time.sleep(1.5)
        assert {version() for _ in range(40)} == {"v0"}


def test_the_list_of_models_names_aliases_and_versions(url: str, registry: Registry, models: Path) -> None:
    registry.promote("stable", "v1")
    listed = wait(url, lambda listed: len(listed.data) == 4)
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
    """Nobody is dropped, and no text mixes two versions."""
    over = threading.Event()

    def board(number: int) -> Counter[str]:
        told: Counter[str] = Counter()
        with ProtocolClient(url) as client:
            while not over.is_set():
                session = client.open(sampling=WARM, n=1 + number % 3)
                assert finish(session) == reference_text(session.reply.version), session.reply.version
                told[session.reply.version.partition("@")[0]] += 1
                client.http.delete(f"/v1/sessions/{session.id}")
        return told

    with ThreadPoolExecutor(6) as pool:
        boards = [pool.submit(board, number) for number in range(6)]
        try:
            registry.add(str(models / "v2"))
            for round_ in range(10):
                name = f"v{(round_ + 1) % 3}"
                registry.promote("latest", name)
                registry.canary("latest", f"v{round_ % 3}", 20)
                leads(url, name)
                if round_ == 4:
                    registry.rollback("latest")
        finally:
            over.set()
        told = sum((one.result() for one in boards), Counter())
    assert set(told) == {"v0", "v1", "v2"}
    assert told.total() > 10


@pytest.mark.slow
def test_versions_of_one_base_and_a_foreign_one_share_an_engine_and_a_draft_beside_it(
    family: Path, tmp_path: Path
) -> None:
    """Rounds of all of them go on at once; and the draft keeps out of the text whose vocabulary is not its own."""
    registry = Registry(tmp_path / "registry")
    registry.add_draft(family / "bundle")
    paths = {name: family / name for name in ("target-v1", "target-v2", "target-v3", "target-v4")}
    paths["foreign"] = save_target(tmp_path / "foreign")
    for path in paths.values():
        registry.add(str(path), unshared=True)
    assert [entry.admitted for entry in registry.read().targets] == ["shared"] * 4 + ["unshared"]

    def written(name: str) -> list[int]:
        model, _, end_ids = load_model(paths[name], "cpu", "float32")
        return generate_reference(model, PROMPT, WARM, LENGTH, end_ids)

    with serve_registry(registry, draft=family / "bundle") as url:
        wait(url, lambda listed: paths.keys() <= {model.id for model in listed.data})

        def spoken(name: str) -> list[int]:
            with ProtocolClient(url) as client:
                return client.open(sampling=WARM, model=name, n=LENGTH).ids[len(PROMPT) :]

        expected = {name: written(name) for name in paths}
        with ThreadPoolExecutor(10) as pool:
            texts = {name: [pool.submit(spoken, name) for _ in range(2)] for name in paths}
            assert {name: [one.result() for one in both] for name, both in texts.items()} == {
                name: [text] * 2 for name, text in expected.items()
            }
        # With few rounds at once, it is drafted for.
        assert {name: spoken(name) for name in paths} == expected
