"""What a process serves while its registry changes under it, with tiny targets that are really loaded."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from cloud_verifier.engine.rollout import RetirementPolicy, Rollout
from cloud_verifier.model.target import Target
from cloud_verifier.registry.registry import Registry, RegistryError
from edge_runtime.protocol.errors import TargetError, VerifierRefused

NOW = RetirementPolicy(linger_seconds=0, grace_seconds=3600)


class Shelf:
    """Targets, loaded when `gate` is open; and the sessions on them."""

    def __init__(self) -> None:
        self.versions: dict[str, Target] = {}
        self.target: object = "there is none, and it does not load one by itself"
        self.gate = asyncio.Event()
        self.gate.set()
        self.sessions: dict[str, str] = {}
        self.loads = 0

    async def load(self, path: Path, name: str) -> Target:
        self.loads += 1
        await self.gate.wait()
        target = await asyncio.to_thread(Target, path, device="cpu", dtype=torch.float32)
        self.versions[target.version] = target
        return target

    async def unload(self, version: str) -> None:
        del self.versions[version]

    def ids_of_version(self, version: str) -> list[str]:
        return [session for session, pinned in self.sessions.items() if pinned == version]

    def remove(self, session_id: str) -> None:
        del self.sessions[session_id]


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    yield Shelf()


async def until(holds: Callable[[], object], rollout: Rollout) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await rollout.refresh()
            await asyncio.sleep(0.01)


def names(shelf: Shelf) -> set[str]:
    return {version.partition("@")[0] for version in shelf.versions}


async def test_everything_that_is_active_is_loaded_the_default_first(registry: Registry, shelf: Shelf) -> None:
    rollout = Rollout(registry, shelf, shelf)
    assert not rollout.ready
    for model in ("", "latest", "v1"):
        with pytest.raises(VerifierRefused, match="loading") as caught:
            rollout.resolve(model, "key")
        assert (caught.value.code, caught.value.status) == ("starting", 503)
    await until(lambda: rollout.ready, rollout)
    assert next(iter(shelf.versions)).startswith("v0@")
    assert rollout.resolve("", "key").name == rollout.default_target.name == "v0"
    await until(lambda: len(shelf.versions) == 2, rollout)
    assert rollout.resolve("v1", "key").name == "v1"
    assert [(one.version[:2], one.loaded) for one in rollout.list_versions()] == [("v1", True), ("v0", True)]


async def test_what_the_engine_loads_by_itself_is_not_loaded_twice(registry: Registry, shelf: Shelf) -> None:
    shelf.target = None
    rollout = Rollout(registry, shelf, shelf)
    await rollout.refresh()
    await asyncio.sleep(0)
    assert shelf.loads == 0
    shelf.target = await shelf.load(registry.default_path(registry.read()), "v0")
    await until(lambda: len(shelf.versions) == 2, rollout)
    assert shelf.loads == 2


async def test_an_alias_follows_as_soon_as_its_version_is_loaded_and_not_before(
    registry: Registry, shelf: Shelf, models: Path
) -> None:
    rollout = Rollout(registry, shelf, shelf)
    await until(lambda: len(shelf.versions) == 2, rollout)
    registry.promote("latest", "v1")
    await rollout.refresh()
    assert rollout.resolve("", "key").name == "v1"
    shelf.gate.clear()
    registry.add(str(models / "v2"))
    registry.promote("latest", "v2")
    registry.canary("latest", "v0", 100)
    await rollout.refresh()
    assert rollout.resolve("", "key").name == "v1"
    assert rollout.active_aliases["latest"].startswith("v1@")
    with pytest.raises(VerifierRefused) as caught:
        rollout.resolve("v2", "key")
    assert caught.value.code == "starting"
    # Back again at once, though another version is being loaded.
    registry.rollback("latest")
    registry.rollback("latest")
    await rollout.refresh()
    registry.promote("latest", "v0")
    await rollout.refresh()
    assert rollout.resolve("", "key").name == "v0"
    shelf.gate.set()
    await until(lambda: len(shelf.versions) == 3, rollout)
    assert rollout.resolve("", "key").name == "v0"


async def test_a_canary_that_is_not_loaded_gets_nobody(registry: Registry, shelf: Shelf, models: Path) -> None:
    rollout = Rollout(registry, shelf, shelf)
    await until(lambda: len(shelf.versions) == 2, rollout)
    shelf.gate.clear()
    registry.add(str(models / "v2"))
    registry.canary("latest", "v2", 100)
    await rollout.refresh()
    assert rollout.resolve("", "key").name == "v0"
    shelf.gate.set()
    await until(lambda: rollout.resolve("", "key").name == "v2", rollout)


async def test_what_does_not_load_leaves_everything_as_it_was(
    registry: Registry, shelf: Shelf, models: Path, tmp_path: Path
) -> None:
    rollout = Rollout(registry, shelf, shelf)
    await until(lambda: len(shelf.versions) == 2, rollout)
    copy = shutil.copytree(models / "v2", tmp_path / "v2")
    entry = registry.add(str(copy))
    registry.promote("latest", "v2")
    shutil.copy(models / "v1" / "model.safetensors", copy / "model.safetensors")
    await until(lambda: any(one.problem for one in rollout.list_versions()), rollout)
    (problem,) = (one.problem for one in rollout.list_versions() if one.problem)
    assert "files have changed since it was added" in problem
    assert rollout.resolve("", "key").name == "v0"
    assert entry.version not in shelf.versions and len(shelf.versions) == 2
    with pytest.raises(VerifierRefused, match="could not be loaded") as caught:
        rollout.resolve("v2", "key")
    assert caught.value.code == "unknown_model"
    loads = shelf.loads
    await until(lambda: shelf.loads == loads, rollout)  # no second attempt by itself
    shutil.copy(models / "v2" / "model.safetensors", copy / "model.safetensors")
    registry.add(str(copy))
    await until(lambda: rollout.resolve("", "key").name == "v2", rollout)


async def test_a_default_that_cannot_be_loaded_is_said(shelf: Shelf, models: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(RegistryError, match="no registry"):
        Rollout(registry, shelf, shelf)
    copy = shutil.copytree(models / "v2", tmp_path / "v2")
    registry.add(str(copy))
    rollout = Rollout(registry, shelf, shelf)
    shutil.rmtree(copy)
    assert rollout.failure is None
    await until(lambda: rollout.failure, rollout)
    assert isinstance(rollout.failure, TargetError) and "no target at" in str(rollout.failure)
    registry.update(lambda roster: msgspec.structs.replace(roster, default="stable"))
    await rollout.refresh()
    assert "no alias 'stable'" in str(rollout.failure)


async def test_a_retired_version_goes_when_its_last_session_has(registry: Registry, shelf: Shelf) -> None:
    rollout = Rollout(registry, shelf, shelf, NOW)
    await until(lambda: len(shelf.versions) == 2, rollout)
    version = rollout.resolve("v1", "key").version
    shelf.sessions["one"] = version
    registry.retire("v1")
    running = asyncio.create_task(rollout.run())
    await until(lambda: any(one.state == "retired" for one in rollout.list_versions()), rollout)
    for _ in range(3):
        rollout.request_refresh()
        await asyncio.sleep(0.02)
    assert version in shelf.versions
    assert rollout.resolve(version, "key").version == version  # a session that was lost goes on with it
    with pytest.raises(VerifierRefused) as caught:
        rollout.resolve("v1", "key")
    assert caught.value.code == "unknown_model"
    assert caught.value.detail["available"] == ["latest", rollout.default_target.version]
    assert [one.sessions for one in rollout.list_versions() if one.version == version] == [1]
    shelf.sessions.clear()
    async with asyncio.timeout(20):
        while version in shelf.versions:
            rollout.request_refresh()
            await asyncio.sleep(0.01)
    with pytest.raises(VerifierRefused, match="retired") as caught:
        rollout.resolve(version, "key")
    assert caught.value.code == "unknown_model"
    running.cancel()


async def test_sessions_of_a_retired_version_are_closed_when_its_grace_is_over(
    registry: Registry, shelf: Shelf
) -> None:
    rollout = Rollout(registry, shelf, shelf, RetirementPolicy(linger_seconds=60, grace_seconds=0))
    await until(lambda: len(shelf.versions) == 2, rollout)
    shelf.sessions |= {"one": rollout.resolve("v1", "key").version, "two": rollout.default_target.version}
    registry.retire("v1")
    running = asyncio.create_task(rollout.run())
    async with asyncio.timeout(20):
        while len(shelf.versions) == 2:
            rollout.request_refresh()
            await asyncio.sleep(0.01)
    assert list(shelf.sessions) == ["two"]
    assert rollout.default_target.name == "v0"
    running.cancel()


async def test_a_file_that_makes_no_sense_changes_nothing(registry: Registry, shelf: Shelf) -> None:
    rollout = Rollout(registry, shelf, shelf)
    await until(lambda: len(shelf.versions) == 2, rollout)
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
