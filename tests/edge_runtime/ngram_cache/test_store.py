"""The store of the n-gram cache under damage, kills, concurrent processes, a full disk and erasure."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.cli.main import main
from edge_runtime.ngram_cache.lookup import PRIOR_WEIGHTS, NgramCache
from edge_runtime.ngram_cache.store import NgramRecord, NgramStore, erase_stores

RECORDS = [NgramRecord(f"v{index % 2}", list(range(index, index + 9)), list(PRIOR_WEIGHTS)) for index in range(20)]
APPENDING = """
import sys
from pathlib import Path
from edge_runtime.ngram_cache.store import NgramRecord, NgramStore
store = NgramStore(Path(sys.argv[1]), "abc", int(sys.argv[3]))
store.read()
print("on", flush=True)
for index in range(int(sys.argv[2])):
    store.append(NgramRecord("v", [index] * 50, [0.5]))
sys.exit(store.failures)
"""
FULL = """
import resource, signal, sys
from pathlib import Path
from edge_runtime.ngram_cache.store import NgramRecord, NgramStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = NgramStore(Path(sys.argv[1]), "abc")
store.append(NgramRecord("v", [1] * 50, [0.5]))
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
for _ in range(3):
    store.append(NgramRecord("v", [2] * 50, [0.5]))
sys.exit(store.failures)
"""


def filled(directory: Path) -> NgramStore:
    store = NgramStore(directory, "abc")
    for record in RECORDS:
        assert not store.append(record)
    return store


def test_texts_are_read_back_and_readable_by_their_owner_only(tmp_path: Path) -> None:
    store = filled(tmp_path / "a" / "memory")
    assert NgramStore(tmp_path / "a" / "memory", "abc").read() == RECORDS
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700
    assert NgramStore(tmp_path / "a" / "memory", "def").read() == []
    assert store.failures == store.damaged == 0


def test_the_file_is_bounded_and_drops_the_oldest_texts(tmp_path: Path) -> None:
    store = NgramStore(tmp_path, "abc", 4000)
    for index in range(500):
        store.append(NgramRecord("v", [index] * 20, [0.5]))
        assert store.path.stat().st_size <= 4200
    numbers = [record.ids[0] for record in NgramStore(tmp_path, "abc", 4000).read()]
    assert numbers == list(range(numbers[0], 500))
    assert len(numbers) > 10
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"abc.jsonl", ".lock"}


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_damage_loses_only_the_damaged_lines(tmp_path: Path, data: st.DataObject) -> None:
    erase_stores(tmp_path)
    store = filled(tmp_path)
    content = bytearray(store.path.read_bytes())
    first = content.index(b"\n") + 1
    start = data.draw(st.integers(first, len(content) - 1))
    junk = data.draw(st.binary(max_size=30))
    if data.draw(st.booleans()):
        content[start:] = junk
    else:
        content[start : start + len(junk)] = junk
    store.path.write_bytes(content)
    before = content[:start].count(b"\n") - 1
    again = NgramStore(tmp_path, "abc")
    read = again.read()
    assert read[:before] == RECORDS[:before]
    # Damaged ids that are outside the vocabulary are not loaded.
    assert NgramCache(300, NgramStore(tmp_path, "abc")).tokens >= before * 10
    new = NgramRecord("v9", [7, 8, 9], list(PRIOR_WEIGHTS))
    again.append(new)
    assert NgramStore(tmp_path, "abc").read()[-1] == new
    assert again.failures == 0


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\x89PNG\r\n", b'{"flexspec_memory":1,"vocabulary":"other","born":"x"}\n', b"[" * 10000]
)
def test_a_foreign_file_is_moved_aside_and_counted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "abc.jsonl").write_bytes(content)
    store = NgramStore(tmp_path, "abc")
    assert store.read() == []
    assert store.damaged == 1
    assert (tmp_path / "abc.damaged").read_bytes() == content
    store.append(RECORDS[0])
    assert NgramStore(tmp_path, "abc").read() == RECORDS[:1]


@pytest.mark.slow
def test_a_killed_process_leaves_complete_texts(tmp_path: Path) -> None:
    for delay in (0.01, 0.03, 0.08):
        command = [sys.executable, "-c", APPENDING, str(tmp_path), "1000000", "20000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        # With the default size limit: the process may have been killed just before halving the file, and the next
        # append would then halve it.
        store = NgramStore(tmp_path, "abc")
        records = store.read()
        assert all(record.ids == [record.ids[0]] * 50 for record in records)
        assert store.damaged <= 1
        assert store.failures == 0
        store.append(NgramRecord("v", [5], [0.5]))
        assert NgramStore(tmp_path, "abc").read() == [*records, NgramRecord("v", [5], [0.5])]
        erase_stores(tmp_path)


@pytest.mark.slow
def test_several_processes_append_to_one_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", APPENDING, str(tmp_path), "40", "3000"]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    store = NgramStore(tmp_path, "abc")
    records = store.read()
    assert store.damaged == 0
    assert all(record.ids == [record.ids[0]] * 50 for record in records)
    assert 39 in {record.ids[0] for record in records}


def test_a_full_disk_loses_only_new_texts(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], stderr=subprocess.DEVNULL).returncode == 3
    store = NgramStore(tmp_path, "abc")
    assert [record.ids for record in store.read()] == [[1] * 50]
    assert store.damaged == 0


def test_an_unusable_directory_is_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = NgramCache(300, NgramStore(tmp_path / "file", "abc"))
    cache.add("v", [1, 2, 3])
    assert cache.tokens == 4
    assert cache.failures == 2


def test_erasure_also_clears_the_caches_of_running_processes(tmp_path: Path) -> None:
    cache = NgramCache(300, NgramStore(tmp_path, "abc"))
    cache.add("v", list(range(200)))
    assert NgramCache(300, NgramStore(tmp_path, "abc")).tokens == cache.tokens == 201
    (tmp_path / "old.damaged").write_text("")
    assert erase_stores(tmp_path) == 2
    cache.add("v", [1, 2, 3])
    assert NgramCache(300, NgramStore(tmp_path, "abc")).tokens == cache.tokens == 4


def test_the_command_shows_amounts_and_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ngram-cache", "show", str(tmp_path / "none")]) == 0
    filled(tmp_path / "memory")
    assert main(["ngram-cache", "show", str(tmp_path / "memory")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "abc.jsonl: 20 texts, " in shown[0]
    assert shown[0].endswith(" bytes, 0 unreadable")
    assert shown[1:] == ["  v0: 90 tokens", "  v1: 90 tokens"]
    assert main(["ngram-cache", "erase", str(tmp_path / "memory")]) == 0
    assert "1 files erased" in capsys.readouterr().out
    assert NgramStore(tmp_path / "memory", "abc").read() == []
    assert main(["ngram-cache", "erase", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none").exists()


def test_records_with_invalid_ids_or_weights_are_skipped(tmp_path: Path) -> None:
    store = NgramStore(tmp_path, "abc")
    store.append(NgramRecord("v", [1, 2, 299], list(PRIOR_WEIGHTS)))
    with store.path.open("a") as file:
        for ids, weights in (([300], PRIOR_WEIGHTS), ([-1], PRIOR_WEIGHTS), ([1 << 40], PRIOR_WEIGHTS), ([1], [1.0])):
            file.write(json.dumps({"version": "v", "ids": ids, "weights": list(weights)}) + "\n")
        file.write('{"version": "v", "ids": [1], "weights": [NaN]}\n')
    assert NgramCache(300, NgramStore(tmp_path, "abc")).tokens == 4
