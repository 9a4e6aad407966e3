"""A bundle is installed completely or not at all, even if the process dies or the disk fills up."""

from __future__ import annotations

import random
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_runtime.bundles.archive import StoreError
from edge_runtime.bundles.store import BundleStore, current_bundle
from tests.edge_runtime.bundles.bundle_files import assert_clean, assert_whole, change, run, start


@pytest.mark.slow
def test_killed_at_any_moment_nothing_half_installed_is_visible(
    store: BundleStore, shipped: Path, another: Path
) -> None:
    begun = time.monotonic()
    first = store.install(shipped).name
    # Python's own start comes on top of what an installation takes here.
    longest = 1.5 * (time.monotonic() - begun) + 0.3
    delays = random.Random(0)
    outcomes = set()
    for number in range(6):
        source = change(another, acceptance={"x": number / 10})
        process = start(store.path, source)
        time.sleep(delays.uniform(0.1, longest))
        process.kill()
        process.communicate()
        assert_whole(store)
        current = store.link("current")
        assert current is not None
        outcomes.add((process.returncode, current == first))
        if current != first:
            store.use(first)
    assert -9 in {code for code, _ in outcomes}
    last = store.install(change(another, acceptance={}))
    assert current_bundle(store).path.name == last.name
    assert_clean(store)


@pytest.mark.slow
def test_two_installations_at_once_take_turns(store: BundleStore, shipped: Path, another: Path) -> None:
    processes = [start(store.path, source) for source in (shipped, another)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    links = {store.link("current"), store.link("previous")}
    assert links == set(store.names())
    assert len(links) == 2
    assert_clean(store)


# Full disks


def no_large_files() -> None:
    # Less than the weights of the toy draft, more than its other files.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None] | None]]:
    """A directory on a disk that takes seven files, if we may mount one; else one for a process of small files."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=7", "none", str(path)], capture_output=True, check=False
    )
    try:
        yield path, None if mounted.returncode == 0 else no_large_files
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_is_left_as_it_was(
    small_disk: tuple[Path, Callable[[], None] | None], another: Path
) -> None:
    path, limit = small_disk
    result = run("install", str(another), "--store", str(path), preexec_fn=limit)
    assert result.returncode == 3
    assert re.search(rf"cannot write to the bundle store {path}: (No space left on|File too large)", result.stderr)
    assert "Traceback" not in result.stderr
    assert BundleStore(path).names() == []
    assert_clean(BundleStore(path))


@pytest.mark.slow
def test_a_file_larger_than_the_system_allows_is_a_typed_error(store: BundleStore, shipped: Path) -> None:
    result = run("install", str(shipped), "--store", str(store.path), preexec_fn=no_large_files)
    assert result.returncode == 3
    assert f"cannot write to the bundle store {store.path}: File too large" in result.stderr
    assert_clean(store)


def test_what_cannot_fit_is_not_begun(store: BundleStore, another: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(StoreError, match=r"no space for .*: it takes .* MB, and 1\.0 MB are free"):
        store.install(another)
    assert_clean(store)


def test_a_store_that_is_a_file_is_a_typed_error(tmp_path: Path, shipped: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StoreError, match="cannot write to the bundle store"):
            BundleStore(path).install(shipped)
    with pytest.raises(StoreError, match="cannot read the bundle store"):
        BundleStore(tmp_path / "file").entries()
