"""Acceptance traces on disk: they round-trip, and malformed files are refused with a message."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.plan import UNRANKED
from edge_runtime.protocol.errors import InputError
from edge_runtime.simulation.recorded_texts import RecordedText, read_texts, write_texts
from tests.conftest import TRACES
from tests.edge_runtime.simulation.worlds import make_text, texts

GOOD = [make_text(".x.1"), make_text("..")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "good.npz"
    write_texts(path, GOOD, {"by": "a test"})
    return path


@pytest.mark.slow
@given(written=st.lists(texts, min_size=1, max_size=4))
def test_texts_round_trip(written: list[RecordedText], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.npz"
    write_texts(path, written, {})
    read = read_texts(path)
    assert [text.ranks for text in read] == [text.ranks for text in written]
    for before, after in zip(written, read, strict=True):
        assert after.confidences == pytest.approx(before.confidences, abs=1e-3)
        assert [len(row) for row in after.continuations] == [len(row) for row in before.continuations]
        assert (after.target, after.prompt, after.seed) == (before.target, before.prompt, before.seed)


@pytest.mark.slow
def test_the_shipped_trace_covers_every_target_and_temperature() -> None:
    assert TRACES.stat().st_size < 1_000_000
    kinds = {(text.target, text.temperature) for text in read_texts(TRACES)}
    targets = {target for target, _ in kinds}
    assert targets >= {"target-v1", "target-v2"}
    assert kinds == {(target, temperature) for target in targets for temperature in (0.0, 0.7, 1.0)}
    count = len(read_texts(TRACES)) // len(kinds)
    assert count >= 24
    for target, temperature in kinds:
        some = read_texts(TRACES, target=target, temperature=temperature)
        assert len(some) == count
        # The target may end a text before its limit.
        assert max(len(text) for text in some) == 128
        assert 0.3 < sum(text.acceptance for text in some) / len(some) < 0.95


def test_missing_texts_and_files_are_named(file: Path) -> None:
    with pytest.raises(InputError, match="no text of target-v9"):
        read_texts(file, target="target-v9")
    with pytest.raises(InputError, match="draft-export record"):
        read_texts(file.with_name("absent.npz"))
    with pytest.raises(InputError, match="not an acceptance trace"):
        read_texts(file.parent)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(content: bytes) -> None:
    path = Path(__file__).parent / "unused"
    with pytest.raises(InputError):
        read_texts(_Bytes(content, path))  # type: ignore[arg-type]


@pytest.mark.slow
@given(st.data())
def test_a_damaged_file_is_refused_or_still_valid(file: Path, data: st.DataObject) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content) - 1)))
    try:
        read = read_texts(_Bytes(bytes(content[:cut]), file))  # type: ignore[arg-type]
    except InputError:
        return
    # The checksums of the archive cover the arrays, but not every byte around them.
    assert all(rank <= 7 or rank == UNRANKED for text in read for rank in text.ranks)


class _Bytes(io.BytesIO):
    """File content in place of the path that `numpy.load` takes; prints as that path."""

    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(content)
        self._path = path

    def __str__(self) -> str:
        return str(self._path)


def _changed(file: Path, output: Path, **changes: Any) -> Path:
    with np.load(file) as arrays:
        columns = {name: arrays[name] for name in arrays.files if name not in changes}
    columns |= {name: value for name, value in changes.items() if value is not None}
    np.savez(output, **columns)
    return output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": np.int32(2)}, "format"),
        ({"format": np.array(["x"])}, "format"),
        ({"rank": None}, "lacks"),
        ({"rank": np.full(6, 9, np.uint8)}, "behind"),
        ({"rank": np.array([0, 9, 0, 1, 0, 0], np.uint8)}, "a rank"),
        ({"rank": np.zeros(5, np.uint8)}, "positions"),
        ({"rank": np.zeros(6)}, "rank not of integers"),
        ({"confidence": np.full(6, 1.5, np.float16)}, "confidence is not within"),
        ({"confidence": np.full(6, np.nan, np.float16)}, "confidence is not within"),
        ({"behind": np.zeros((2, 3), np.float16)}, "behind"),
        ({"length": np.array([6, 0])}, "length is not within"),
        ({"length": np.array([3, 4])}, "positions"),
        ({"length": np.array([6])}, "length is not one number"),
        ({"temperature": np.array([np.inf, 0.0])}, "temperature is not within"),
        ({"target": np.array([1, 2])}, "target"),
        ({"target": np.array([], "U1")}, "target"),
        ({"target": np.array("one")}, "target"),
    ],
)
def test_wrong_arrays_are_named(file: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_texts(_changed(file, tmp_path / "changed.npz", **changes))


def test_pickles_are_not_opened(file: Path, tmp_path: Path) -> None:
    path = _changed(file, tmp_path / "pickled.npz", target=np.array([object(), None], dtype=object))
    with pytest.raises(InputError, match="not an acceptance trace"):
        read_texts(path)


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("format.npy", b"\x93NUMPY\x01\x00\xff\xff")
    with pytest.raises(InputError):
        read_texts(path)
