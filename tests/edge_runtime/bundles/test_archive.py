"""Archives of bundles: compressed, hostile and damaged ones."""

from __future__ import annotations

import contextlib
import gzip
import io
import shutil
import tarfile
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundles import archive
from edge_runtime.bundles.archive import fetch
from edge_runtime.bundles.signatures import SIGNATURE, BundleUntrusted, read_public_keys
from edge_runtime.bundles.store import BundleStore, current_bundle
from edge_runtime.protocol.bundle import MANIFEST_NAME, Manifest, read_bundle
from edge_runtime.protocol.errors import BundleCorrupt, BundleError
from export.bundle.sign import generate_key_pair, sign_bundle
from tests.edge_runtime.bundles.bundle_files import assert_clean, change, read_manifest, run


@pytest.fixture(scope="module")
def small(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle of a few hundred bytes, which no runtime would load."""
    bundle = shutil.copytree(family / "bundle", tmp_path_factory.mktemp("small") / "small")
    for name in read_manifest(bundle).files:
        (bundle / name).write_text(f"in place of {name}")
    return change(bundle, name="small")


def pack(bundle: Path, mode: str = "w", folder: str = "") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for path in sorted(bundle.iterdir()):
            tar.add(path, folder + path.name)
    return content.getvalue()


def unpack(content: bytes) -> Manifest:
    """Fetches the bundle from an archive and checks its hashes; nothing outside may change. Raises BundleError."""
    with tempfile.TemporaryDirectory() as folder:
        packed, scratch = Path(folder, "bundle.tar"), Path(folder, "scratch")
        packed.write_bytes(content)
        scratch.mkdir()
        try:
            work, _ = fetch(packed, scratch)
            return read_bundle(work).manifest
        finally:
            assert {path.name for path in Path(folder).iterdir()} == {"bundle.tar", "scratch"}


@pytest.mark.parametrize(("mode", "folder"), [("w", ""), ("w:gz", "draft/"), ("w:xz", "./"), ("w:bz2", "./draft/")])
def test_archives_may_be_compressed_and_have_a_folder(small: Path, mode: str, folder: str) -> None:
    assert unpack(pack(small, mode, folder)) == read_manifest(small)


@pytest.mark.slow
def test_an_archive_of_the_shipped_bundle_is_installed(store: BundleStore, shipped: Path, tmp_path: Path) -> None:
    packed = tmp_path / "bundle.tar"
    packed.write_bytes(pack(shipped, folder="bundle/"))
    result = run("install", str(packed), "--store", str(store.path))
    assert result.returncode == 0, result.stderr
    assert current_bundle(store).manifest == read_bundle(shipped).manifest
    assert_clean(store)


def test_what_the_manifest_does_not_name_is_left_out(small: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(small, tmp_path / "bundle")
    (bundle / "extra.py").write_text("print('not signed, not checked')")
    packed = tmp_path / "bundle.tar"
    packed.write_bytes(pack(bundle))
    for source in (bundle, packed):
        scratch = tmp_path / f"scratch-of-{source.name}"
        scratch.mkdir()
        work, left_out = fetch(source, scratch)
        assert left_out == ["extra.py"]
        assert {path.name for path in work.iterdir()} == {MANIFEST_NAME, *read_manifest(small).files}


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, pax
    return info


def sparse(name: str, size: int) -> bytes:
    """GNU's old header of a file of `size` bytes without any data (tar manual, "Old GNU Format")."""
    header = bytearray(member(name).tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:398] = header[398:410] = b"%011o\0" % 0
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


HOSTILE = {
    "a path upwards": [member("../evil")],
    "a path upwards, later": [member("bundle/../../evil")],
    "a link upwards": [member("model.onnx", tarfile.SYMTYPE, "../../evil")],
    "a link inside": [member("model.onnx", tarfile.SYMTYPE, "manifest.json")],
    "a hard link": [member("model.onnx", tarfile.LNKTYPE, "/etc/passwd")],
    "a link, and a file through it": [member("out", tarfile.SYMTYPE, "/tmp"), member("out/evil")],
    "a device": [member("model.onnx", tarfile.CHRTYPE)],
    "a pipe": [member("model.onnx", tarfile.FIFOTYPE)],
    "two folders": [member("a/model.onnx"), member("b/model.onnx")],
    "a deep folder": [member("a/b/model.onnx")],
    "a file twice": [member("model.onnx"), member("model.onnx")],
    "a very long name": [member("x" * 300)],
    "no name": [member("")],
    "no file": [],
    "a sparse file by pax": [member("model.onnx", **{"GNU.sparse.major": "1", "GNU.sparse.realsize": "6000000000"})],
    "a name by pax": [member("model.onnx", path="../evil")],
    "a size by pax": [member("model.onnx", size="6000000000")],
    "a long header": [member("model.onnx", comment="x" * 9000)],
    "very many files": [member(f"file-{number}") for number in range(1001)],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_archives_are_refused(members: list[tarfile.TarInfo]) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for info in members:
            tar.addfile(info)
    with pytest.raises(BundleError):
        unpack(content.getvalue())


def test_a_sparse_file_is_refused_by_name_and_writes_nothing(small: Path) -> None:
    """99 bytes, which would become 6 GB."""
    content = gzip.compress(sparse("model\x1b[2J.onnx", 6_000_000_000) + pack(small))
    with pytest.raises(BundleCorrupt, match=r"'model\\x1b\[2J\.onnx' is a sparse file"):
        unpack(content)


def test_names_in_messages_are_escaped(small: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(member("a\x1b[2J/b\n/c"))
    with pytest.raises(BundleCorrupt) as caught:
        unpack(content.getvalue())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_memory_does_not_grow_with_the_archive(small: Path, tmp_path: Path, mode: str) -> None:
    """An extra file of 24 MB of zeros, which no manifest names, in a few kilobytes."""
    packed, scratch = tmp_path / "bundle.tar", tmp_path / "scratch"
    scratch.mkdir()
    with tarfile.open(packed, mode) as tar:
        extra = member("extra")
        extra.size = 24 << 20
        tar.addfile(extra, io.BytesIO(bytes(extra.size)))
        for path in sorted(small.iterdir()):
            tar.add(path, path.name)
    tracemalloc.start()
    try:
        fetch(packed, scratch)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert {path.name for path in scratch.rglob("*")} == {"bundle", MANIFEST_NAME, *read_manifest(small).files}


def test_an_archive_has_a_bound(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = pack(small)
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", len(content))
    assert unpack(content) == read_manifest(small)
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", len(content) // 3)
    with pytest.raises(BundleCorrupt, match=r"it unpacks to more than \d+ bytes"):
        unpack(content)


def test_a_file_is_cut_at_its_recorded_size(small: Path, tmp_path: Path) -> None:
    """Neither an archive nor a directory writes more than the manifest announces."""
    bundle = shutil.copytree(small, tmp_path / "bundle")
    with (bundle / "model.onnx").open("ab") as file:
        file.truncate(1 << 30)
    with tarfile.open(tmp_path / "bundle.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(small / MANIFEST_NAME, MANIFEST_NAME)
        large = member("model.onnx")
        large.size = 1 << 20
        tar.addfile(large, io.BytesIO(bytes(large.size)))
    for number, source in enumerate((bundle, tmp_path / "bundle.tar.gz")):
        scratch = tmp_path / f"scratch{number}"
        scratch.mkdir()
        with pytest.raises(BundleCorrupt, match=r"model\.onnx has \d+ bytes instead of \d+"):
            fetch(source, scratch)
        assert not list(scratch.rglob("model.onnx"))


def test_nothing_is_written_of_an_archive_without_the_demanded_signature(small: Path, tmp_path: Path) -> None:
    key = tmp_path / "maker.key"
    keys = read_public_keys(generate_key_pair(key))
    signed = shutil.copytree(small, tmp_path / "signed")
    sign_bundle(signed, key)
    changed = change(shutil.copytree(signed, tmp_path / "changed"), name="changed")
    for bundle, trusted in ((small, False), (changed, False), (signed, True)):
        for source in (bundle, tmp_path / f"{bundle.name}.tar"):
            if source is not bundle:
                source.write_bytes(pack(bundle))
            scratch = tmp_path / f"scratch-{source.name}"
            scratch.mkdir()
            if trusted:
                work, _ = fetch(source, scratch, keys)
                assert (work / SIGNATURE).read_bytes() == (signed / SIGNATURE).read_bytes()
            else:
                with pytest.raises(BundleUntrusted):
                    fetch(source, scratch, keys)
                assert not list(scratch.iterdir())


def test_an_absolute_path_stays_inside(small: Path) -> None:
    assert unpack(pack(small, folder="/")) == read_manifest(small)


def test_a_file_that_is_no_archive_is_refused() -> None:
    for content in (b"", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"\x1f\x8b" + bytes(100)):
        with pytest.raises(BundleCorrupt):
            unpack(content)


@pytest.mark.slow
@given(st.data(), st.sampled_from(["w", "w:gz", "w:bz2", "w:xz"]))
def test_damaged_archives_are_typed_errors(small: Path, data: st.DataObject, mode: str) -> None:
    content = bytearray(pack(small, mode))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        damage = data.draw(st.binary(min_size=1, max_size=12))
        content[position : position + len(damage)] = damage
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    # Damage to padding, times or owners is harmless, and only a signature protects the manifest itself.
    with contextlib.suppress(BundleError):
        assert unpack(bytes(content)).files.keys() == read_manifest(small).files.keys()


@pytest.mark.slow
@given(st.lists(st.tuples(st.text(max_size=20), st.sampled_from(tarfile.SUPPORTED_TYPES), st.binary(max_size=600))))
def test_any_members_are_typed_errors(members: list[tuple[str, bytes, bytes]]) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", errors="surrogatepass") as tar:
        for name, kind, data in members:
            info = member(name, kind, name)
            info.size = len(data)
            with contextlib.suppress(ValueError):
                tar.addfile(info, io.BytesIO(data))
    with pytest.raises(BundleError):
        unpack(content.getvalue())
