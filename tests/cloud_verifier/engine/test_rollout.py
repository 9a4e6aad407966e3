"""The rollout follows changes of the registry, with tiny targets that are really loaded."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from cloud_verifier.engine.rollout import RetirementPolicy, Rollout
from cloud_verifier.model.target import Target
from cloud_verifier.registry.catalog import Catalog
from cloud_verifier.registry.registry import Registry, RegistryError
from edge_runtime.protocol.errors import TargetError, VerifierRefused
from tests.cloud_verifier.model.architectures import save_architecture
from tests.cloud_verifier.protocol_client import TIMEOUT_SECONDS

UNLOAD_AT_ONCE = RetirementPolicy(linger_seconds=0, grace_seconds=3600)


class FakeHost:
    """Holds targets and sessions, as scheduler and session store do. Loading and unloading wait for their gates."""

    def __init__(self) -> None:
        self.versions: dict[str, Target] = {}
        self.target: object = "not None: the initial target counts as loaded"
        self.gate = asyncio.Event()
        self.gate.set()
        self.unload_gate = asyncio.Event()
        self.unload_gate.set()
        self.unloading = False
        self.sessions: dict[str, str] = {}
        self.loads = 0

    async def load(self, path: Path, name: str) -> Target:
        self.loads += 1
        await self.gate.wait()
        target = await asyncio.to_thread(Target, path, device="cpu", dtype=torch.float32)
        self.versions[target.version] = target
        return target

    async def unload(self, version: str) -> None:
        self.unloading = True
        await self.unload_gate.wait()
        del self.versions[version]

    def ids_of_version(self, version: str) -> list[str]:
        return [session for session, pinned in self.sessions.items() if pinned == version]

    def remove(self, session_id: str) -> None:
        del self.sessions[session_id]


@pytest.fixture
def host() -> Iterator[FakeHost]:
    yield FakeHost()


async def refresh_until(condition: Callable[[], object], rollout: Rollout) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():
            await rollout.refresh()
            await asyncio.sleep(0.01)


async def test_all_active_versions_are_loaded_the_default_first(registry: Registry, host: FakeHost) -> None:
    rollout = Rollout(registry, host, host)
    assert not rollout.ready
    for model in ("", "latest", "v1"):
        with pytest.raises(VerifierRefused, match="loading") as caught:
            rollout.resolve(model, "key")
        assert (caught.value.code, caught.value.status) == ("starting", 503)
    await refresh_until(lambda: rollout.ready, rollout)
    assert next(iter(host.versions)).startswith("v0@")
    assert rollout.resolve("", "key").name == rollout.default_target.name == "v0"
    await refresh_until(lambda: len(host.versions) == 2, rollout)
    assert rollout.resolve("v1", "key").name == "v1"
    assert [(listed.version[:2], listed.loaded) for listed in rollout.list_versions()] == [("v1", True), ("v0", True)]


async def test_a_version_on_the_general_tier_says_why(tmp_path: Path, host: FakeHost) -> None:
    registry = Registry(tmp_path / "registry")
    for name in ("bloom", "llama"):
        registry.add(str(save_architecture(tmp_path / name, name)))
    rollout = Rollout(registry, host, host)
    assert {listed.general_tier_reason for listed in rollout.list_versions()} == {""}
    await refresh_until(lambda: len(host.versions) == 2, rollout)
    reasons = {listed.version.partition("@")[0]: listed.general_tier_reason for listed in rollout.list_versions()}
    assert reasons["llama"] == ""
    assert "attention" in reasons["bloom"]


async def test_the_initial_target_is_not_loaded_twice(registry: Registry, host: FakeHost) -> None:
    host.target = None
    rollout = Rollout(registry, host, host)
    await rollout.refresh()
    await asyncio.sleep(0)
    assert host.loads == 0
    host.target = await host.load(registry.default_path(registry.read()), "v0")
    await refresh_until(lambda: len(host.versions) == 2, rollout)
    assert host.loads == 2


async def test_an_alias_moves_as_soon_as_its_version_is_loaded_and_not_before(
    registry: Registry, host: FakeHost, models: Path
) -> None:
    rollout = Rollout(registry, host, host)
    await refresh_until(lambda: len(host.versions) == 2, rollout)
    registry.promote("latest", "v1")
    await rollout.refresh()
    assert rollout.resolve("", "key").name == "v1"
    host.gate.clear()
    registry.add(str(models / "v2"))
    registry.promote("latest", "v2")
    registry.canary("latest", "v0", 100)
    await rollout.refresh()
    assert rollout.resolve("", "key").name == "v1"
    assert rollout.active_aliases["latest"].startswith("v1@")
    with pytest.raises(VerifierRefused) as caught:
        rollout.resolve("v2", "key")
    assert caught.value.code == "starting"
    # Back at once, although another version is being loaded.
    registry.rollback("latest")
    registry.rollback("latest")
    await rollout.refresh()
    registry.promote("latest", "v0")
    await rollout.refresh()
    assert rollout.resolve("", "key").name == "v0"
    host.gate.set()
    await refresh_until(lambda: len(host.versions) == 3, rollout)
    assert rollout.resolve("", "key").name == "v0"


async def test_a_canary_that_is_not_loaded_gets_no_sessions(registry: Registry, host: FakeHost, models: Path) -> None:
    rollout = Rollout(registry, host, host)
    await refresh_until(lambda: len(host.versions) == 2, rollout)
    host.gate.clear()
    registry.add(str(models / "v2"))
    registry.canary("latest", "v2", 100)
    await rollout.refresh()
    assert rollout.resolve("", "key").name == "v0"
    host.gate.set()
    await refresh_until(lambda: rollout.resolve("", "key").name == "v2", rollout)


async def test_a_version_that_does_not_load_changes_nothing(
    registry: Registry, host: FakeHost, models: Path, tmp_path: Path
) -> None:
    rollout = Rollout(registry, host, host)
    await refresh_until(lambda: len(host.versions) == 2, rollout)
    copy = shutil.copytree(models / "v2", tmp_path / "v2")
    entry = registry.add(str(copy))
    registry.promote("latest", "v2")
    shutil.copy(models / "v1" / "model.safetensors", copy / "model.safetensors")
    await refresh_until(lambda: any(listed.problem for listed in rollout.list_versions()), rollout)
    (problem,) = (listed.problem for listed in rollout.list_versions() if listed.problem)
    assert "have changed since it was added" in problem
    assert rollout.resolve("", "key").name == "v0"
    assert entry.version not in host.versions and len(host.versions) == 2
    with pytest.raises(VerifierRefused, match="could not be loaded") as caught:
        rollout.resolve("v2", "key")
    assert caught.value.code == "unknown_model"
    loads = host.loads
    await refresh_until(lambda: host.loads == loads, rollout)  # no second attempt
    shutil.copy(models / "v2" / "model.safetensors", copy / "model.safetensors")
    registry.add(str(copy))
    await refresh_until(lambda: rollout.resolve("", "key").name == "v2", rollout)


async def test_a_default_version_that_cannot_be_loaded_is_reported(
    host: FakeHost, models: Path, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(RegistryError, match="no registry"):
        Rollout(registry, host, host)
    copy = shutil.copytree(models / "v2", tmp_path / "v2")
    registry.add(str(copy))
    rollout = Rollout(registry, host, host)
    shutil.rmtree(copy)
    assert rollout.failure is None
    await refresh_until(lambda: rollout.failure, rollout)
    assert isinstance(rollout.failure, TargetError) and "no target at" in str(rollout.failure)
    registry.update(lambda catalog: msgspec.structs.replace(catalog, default="stable"))
    await rollout.refresh()
    assert "no alias 'stable'" in str(rollout.failure)


async def test_a_retired_version_is_unloaded_after_its_last_session(registry: Registry, host: FakeHost) -> None:
    rollout = Rollout(registry, host, host, UNLOAD_AT_ONCE)
    await refresh_until(lambda: len(host.versions) == 2, rollout)
    version = rollout.resolve("v1", "key").version
    host.sessions["one"] = version
    registry.retire("v1")
    running = asyncio.create_task(rollout.run())
    await refresh_until(lambda: any(listed.state == "retired" for listed in rollout.list_versions()), rollout)
    for _ in range(3):
        rollout.request_refresh()
        await asyncio.sleep(0.02)
    assert version in host.versions
    assert rollout.resolve(version, "key").version == version  # a lost session is reopened on it
    with pytest.raises(VerifierRefused) as caught:
        rollout.resolve("v1", "key")
    assert caught.value.code == "unknown_model"
    assert caught.value.detail["available"] == ["latest", rollout.default_target.version]
    assert [listed.sessions for listed in rollout.list_versions() if listed.version == version] == [1]
    host.sessions.clear()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while version in host.versions:
            rollout.request_refresh()
            await asyncio.sleep(0.01)
    with pytest.raises(VerifierRefused, match="retired") as caught:
        rollout.resolve(version, "key")
    assert caught.value.code == "unknown_model"
    running.cancel()


async def test_sessions_of_a_retired_version_are_closed_after_the_grace_period(
    registry: Registry, host: FakeHost
) -> None:
    rollout = Rollout(registry, host, host, RetirementPolicy(linger_seconds=60, grace_seconds=0))
    await refresh_until(lambda: len(host.versions) == 2, rollout)
    host.sessions |= {"one": rollout.resolve("v1", "key").version, "two": rollout.default_target.version}
    registry.retire("v1")
    running = asyncio.create_task(rollout.run())
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while len(host.versions) == 2:
            rollout.request_refresh()
            await asyncio.sleep(0.01)
    assert list(host.sessions) == ["two"]
    assert rollout.default_target.name == "v0"
    running.cancel()


async def test_an_invalid_registry_file_changes_nothing(registry: Registry, host: FakeHost) -> None:
    rollout = Rollout(registry, host, host)
    await refresh_until(lambda: len(host.versions) == 2, rollout)
    good = registry.file.read_text()
    for bad in ("[", "", good.replace("v0@", "v7@", 1)):
        registry.file.write_text(bad)
        await rollout.refresh()
        assert rollout.resolve("", "key").name == "v0"
    registry.file.unlink()
    await rollout.refresh()
    assert rollout.resolve("", "key").name == "v0"
    registry.file.write_text(good)
    registry.promote("latest", "v1")
    await rollout.refresh()
    assert rollout.resolve("", "key").name == "v1"


async def test_a_refresh_waits_for_the_one_that_is_reading(
    registry: Registry, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = Rollout(registry, host, host)
    await refresh_until(lambda: len(host.versions) == 2, rollout)
    registry.promote("latest", "v1")
    read, reading, go_on = registry.read, threading.Event(), threading.Event()

    def read_slowly() -> Catalog:
        reading.set()
        assert go_on.wait(TIMEOUT_SECONDS)
        return read()

    monkeypatch.setattr(registry, "read", read_slowly)
    first = asyncio.create_task(rollout.refresh())
    assert await asyncio.to_thread(reading.wait, TIMEOUT_SECONDS)
    second = asyncio.create_task(rollout.refresh())
    # Enough time for the second one to end, if it does not wait.
    finished, _ = await asyncio.wait([second], timeout=0.2)
    go_on.set()
    await asyncio.gather(first, second)
    assert not finished
    assert rollout.active_aliases["latest"].startswith("v1@")


async def test_a_version_that_returns_while_it_is_unloaded_is_loaded_again(
    registry: Registry, host: FakeHost, models: Path
) -> None:
    rollout = Rollout(registry, host, host, UNLOAD_AT_ONCE)
    await refresh_until(lambda: len(host.versions) == 2, rollout)
    registry.retire("v1")
    host.unload_gate.clear()
    running = asyncio.create_task(rollout.run())
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not host.unloading:
            rollout.request_refresh()
            await asyncio.sleep(0.01)
    registry.add(str(models / "v1"))
    registry.promote("latest", "v1")
    await rollout.refresh()
    # It is still there, but not for long.
    assert len(host.versions) == 2
    assert rollout.resolve("", "key").name == "v0"
    with pytest.raises(VerifierRefused, match="still loading"):
        rollout.resolve("v1", "key")
    host.unload_gate.set()
    await refresh_until(lambda: rollout.resolve("", "key").name == "v1", rollout)
    assert (host.loads, set(rollout.models())) == (3, {"latest", "v0", "v1"})
    running.cancel()
