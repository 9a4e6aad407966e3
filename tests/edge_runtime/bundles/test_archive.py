"""Archives of bundles: compressed, hostile and damaged ones."""

from __future__ import annotations

import contextlib
import io
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundles.archive import fetch
from edge_runtime.bundles.store import BundleStore, current_bundle
from edge_runtime.protocol.bundle import MANIFEST_NAME, Manifest, read_bundle
from edge_runtime.protocol.errors import BundleCorrupt, BundleError
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
        archive, scratch = Path(folder, "bundle.tar"), Path(folder, "scratch")
        archive.write_bytes(content)
        scratch.mkdir()
        try:
            work, _ = fetch(archive, scratch)
            return read_bundle(work).manifest
        finally:
            assert {path.name for path in Path(folder).iterdir()} == {"bundle.tar", "scratch"}


@pytest.mark.parametrize(("mode", "folder"), [("w", ""), ("w:gz", "draft/"), ("w:xz", "./"), ("w:bz2", "./draft/")])
def test_archives_may_be_compressed_and_have_a_folder(small: Path, mode: str, folder: str) -> None:
    assert unpack(pack(small, mode, folder)) == read_manifest(small)


@pytest.mark.slow
def test_an_archive_of_the_shipped_bundle_is_installed(store: BundleStore, shipped: Path, tmp_path: Path) -> None:
    archive = tmp_path / "bundle.tar"
    archive.write_bytes(pack(shipped, folder="bundle/"))
    result = run("install", str(archive), "--store", str(store.path))
    assert result.returncode == 0, result.stderr
    assert current_bundle(store).manifest == read_bundle(shipped).manifest
    assert_clean(store)


def test_what_the_manifest_does_not_name_is_left_out(small: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(small, tmp_path / "bundle")
    (bundle / "extra.py").write_text("print('not signed, not checked')")
    archive = tmp_path / "bundle.tar"
    archive.write_bytes(pack(bundle))
    for source in (bundle, archive):
        scratch = tmp_path / f"scratch-of-{source.name}"
        scratch.mkdir()
        work, left_out = fetch(source, scratch)
        assert left_out == ["extra.py"]
        assert {path.name for path in work.iterdir()} == {MANIFEST_NAME, *read_manifest(small).files}


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


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
