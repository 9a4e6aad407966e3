"""The bundle store with the shipped bundle: installed completely or not at all, even if the installing process dies."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import re
import resource
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundles.archive import StoreError, fetch
from edge_runtime.bundles.self_test import BundleUnfit, run_self_test
from edge_runtime.bundles.signatures import SIGNATURE, BundleUntrusted, read_public_keys
from edge_runtime.bundles.store import BundleStore, configured_bundle, current_bundle
from edge_runtime.protocol.bundle import MANIFEST_NAME, Manifest, read_bundle, record_file, write_manifest
from edge_runtime.protocol.errors import BundleCorrupt, BundleError, BundleMissing, InputError
from edge_runtime.settings.table import DraftSettings
from export.bundle.sign import generate_key_pair, sign_bundle
from export.cli.main import main as export


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_runtime.cli", "bundle", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def start(store: Path, source: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edge_runtime.cli", "bundle", "install", str(source), "--store", str(store)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_manifest(bundle: Path) -> Manifest:
    return msgspec.json.decode((bundle / MANIFEST_NAME).read_bytes(), type=Manifest)


def change(bundle: Path, **fields: object) -> Path:
    """Writes the manifest of `bundle` anew, with the hashes that its files have now and with other `fields`."""
    manifest = read_manifest(bundle)
    files = {name: record_file(bundle / name) for name in manifest.files}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files, **fields))
    return bundle


def spoil(path: Path) -> None:
    """Another byte in the middle of the file, its length the same."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.fixture
def shipped(family: Path) -> Path:
    return family / "bundle"


@pytest.fixture
def another(shipped: Path, tmp_path: Path) -> Path:
    """The shipped bundle under another name."""
    return change(shutil.copytree(shipped, tmp_path / "another"), name="another")


@pytest.fixture
def unfit(shipped: Path, tmp_path: Path) -> Path:
    """A bundle whose hashes are right and whose graph is nonsense."""
    bundle = shutil.copytree(shipped, tmp_path / "unfit")
    (bundle / "model.onnx").write_bytes(b"nonsense")
    return change(bundle, name="unfit")


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "store")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`maker.key`, `maker.pub`, `other.key`, `other.pub`."""
    folder = tmp_path_factory.mktemp("keys")
    generate_key_pair(folder / "maker.key")
    generate_key_pair(folder / "other.key")
    return folder


def assert_whole(store: BundleStore) -> None:
    """Everything that shows in the store is a whole bundle, or a link to one."""
    for path in store.path.iterdir():
        if not path.name.startswith("."):
            read_bundle(path)


def assert_clean(store: BundleStore) -> None:
    assert {path.name for path in store.path.glob(".*")} <= {".lock"}
    assert_whole(store)


def test_a_new_bundle_takes_the_place_of_the_old_one_which_stays(
    store: BundleStore, shipped: Path, another: Path
) -> None:
    with pytest.raises(BundleMissing, match="has no current bundle"):
        current_bundle(store)
    assert store.entries() == []
    first = store.install(shipped)
    assert first.self_test.tokens == run_self_test(shipped).tokens
    assert current_bundle(store).path == store.path / first.name
    second = store.install(another)
    assert (store.link("current"), store.link("previous")) == (second.name, first.name)
    assert [(entry.name, entry.state, entry.problem) for entry in store.entries()] == [
        (second.name, "current", ""),
        (first.name, "previous", ""),
    ]
    assert store.use("previous") == first.name
    assert (store.link("current"), store.link("previous")) == (first.name, second.name)
    with pytest.raises(InputError, match="is the current bundle"):
        store.remove("current")
    assert store.remove("another") == second.name
    assert (store.names(), store.link("previous")) == ([first.name], None)
    assert_clean(store)
    assert stat.S_IMODE((store.path / first.name).stat().st_mode) == 0o755
    assert stat.S_IMODE((store.path / first.name / "model.onnx").stat().st_mode) == 0o644


def test_old_bundles_make_room(store: BundleStore, another: Path) -> None:
    names = [store.install(change(another, name=f"draft-{number}")).name for number in range(3)]
    assert store.names() == [names[2], names[1]]
    waiting = store.install(change(another, name="draft-3"), use=False, keep=2)
    assert set(store.names()) == {names[1], names[2], waiting.name}
    assert store.link("current") == names[2]
    with pytest.raises(InputError, match="--keep 0"):
        store.install(another, keep=0)


def test_installing_again_repairs(store: BundleStore, shipped: Path) -> None:
    name = store.install(shipped).name
    spoil(store.path / name / "model.onnx.data")
    with pytest.raises(BundleCorrupt, match=r"no bundle in .* is usable"):
        current_bundle(store)
    assert store.install(shipped).name == name
    assert current_bundle(store).path == store.path / name
    assert_clean(store)


def test_names_may_be_short_but_not_doubtful(store: BundleStore, another: Path) -> None:
    names = [store.install(change(another, acceptance={"x": share}), keep=5).name for share in (0.1, 0.2)]
    assert store.find(names[0].split("@")[1]) == names[0]
    for name in ("another", "nothing", "", "..", "previous/"):
        with pytest.raises(BundleMissing, match=names[0]):
            store.find(name)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a@b", "x" * 100])
def test_a_bundles_name_must_be_fit_for_a_directory(store: BundleStore, another: Path, name: str) -> None:
    with pytest.raises(BundleCorrupt, match=r"is named .*; nothing was installed"):
        store.install(change(another, name=name))
    assert_clean(store)


def test_what_does_not_work_is_not_installed(store: BundleStore, shipped: Path, another: Path, unfit: Path) -> None:
    good = store.install(shipped).name
    with pytest.raises(BundleUnfit, match=r"failed its self-test: .*does not load.*; nothing was installed"):
        store.install(unfit)
    spoil(another / "model.onnx.data")
    with pytest.raises(BundleCorrupt, match=rf"{another}/model.onnx.data is not the file .*; nothing was installed"):
        store.install(another)
    (another / "model.onnx").unlink()
    with pytest.raises(BundleMissing, match=r"lacks model\.onnx"):
        store.install(another)
    with pytest.raises(BundleMissing, match="nothing at"):
        store.install(another / "gone")
    tokenizer = json.loads((shipped / "tokenizer.json").read_text())
    (unfit / "model.onnx").write_bytes((shipped / "model.onnx").read_bytes())
    tokenizer["added_tokens"][0]["content"] = "<|another|>"
    (unfit / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BundleUnfit, match="its tokenizer is not the one that its manifest describes"):
        store.install(change(unfit))
    assert store.names() == [good]
    assert_clean(store)


def test_the_previous_bundle_is_used_where_the_current_one_fails(
    store: BundleStore, shipped: Path, another: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = store.install(shipped).name, store.install(another).name
    # As after an upgrade of the system: the bundle is what it was, and no longer works.
    graph = store.path / second / "model.onnx"
    original = graph.read_bytes()
    graph.write_bytes(b"nonsense")
    change(store.path / second)
    with caplog.at_level(logging.WARNING):
        assert current_bundle(store).path == store.path / first
    (message,) = caplog.messages
    assert message.startswith(f"the current bundle {second}: ")
    assert f"falling back to the previous one, {first}" in message
    assert configured_bundle(DraftSettings(store=store.path)).path == store.path / first
    with pytest.raises(BundleUnfit):
        store.use(second)
    graph.write_bytes(original)
    change(store.path / second)
    assert current_bundle(store).path == store.path / second
    shutil.rmtree(store.path / second)
    assert current_bundle(store).path == store.path / first


def test_a_self_test_that_is_killed_or_hangs_takes_nobody_along(store: BundleStore, shipped: Path) -> None:
    installing = start(store.path, shipped)
    child = None
    while child is None and installing.poll() is None:
        for process in psutil.Process(installing.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "edge_runtime.bundles.self_test" in process.cmdline():
                    child = process
    assert child is not None
    child.kill()
    _, errors = installing.communicate(timeout=60)
    assert installing.returncode == 3
    assert "crashed its self-test: SIGKILL, perhaps out of memory" in errors
    assert store.names() == []
    assert_clean(store)
    with pytest.raises(BundleUnfit, match=r"within 0\.01 s"):
        run_self_test(shipped, timeout=0.01)


# Signatures


def test_with_a_key_only_what_it_signed_is_installed_and_used(
    tmp_path: Path, another: Path, keys: Path, shipped: Path
) -> None:
    store = BundleStore(tmp_path / "store", keys / "maker.pub")
    with pytest.raises(BundleUntrusted, match=rf"{another} is not signed: it has no {SIGNATURE}"):
        store.install(another)
    sign_bundle(another, keys / "other.key")
    with pytest.raises(BundleUntrusted, match="by a configured key"):
        store.install(another)
    sign_bundle(another, keys / "maker.key")
    name = store.install(another).name
    assert [entry.signature for entry in store.entries()] == ["valid"]
    assert [entry.signature for entry in BundleStore(store.path).entries()] == ["unchecked"]
    assert current_bundle(store).path.name == name
    draft = DraftSettings(bundle=another, public_key_file=keys / "maker.pub")
    assert configured_bundle(draft).manifest.name == "another"
    with pytest.raises(BundleUntrusted):
        configured_bundle(msgspec.structs.replace(draft, bundle=shipped))
    # Whoever changes a file must change its hash in the manifest, and that is signed.
    change(another, acceptance={})
    with pytest.raises(BundleUntrusted, match="the bundle was modified"):
        store.install(another)
    with pytest.raises(BundleUntrusted):
        configured_bundle(draft)
    spoil(store.path / name / SIGNATURE)
    assert [(entry.signature, entry.problem) for entry in store.entries()] == [
        ("wrong", "not signed by a configured key")
    ]
    with pytest.raises(BundleError, match="not the signature of this manifest"):
        current_bundle(store)
    sign_bundle(change(another, acceptance={}), keys / "maker.key")
    assert store.install(another)
    assert_whole(store)


def test_an_unsigned_bundle_already_installed_is_refused_once_a_key_is_configured(
    store: BundleStore, shipped: Path, keys: Path
) -> None:
    store.install(shipped)
    with pytest.raises(BundleError, match="is not signed"):
        current_bundle(BundleStore(store.path, keys / "maker.pub"))


def test_a_file_of_keys_may_hold_the_next_one_too(tmp_path: Path, another: Path, keys: Path) -> None:
    both = tmp_path / "both.pub"
    both.write_bytes((keys / "maker.pub").read_bytes() + (keys / "other.pub").read_bytes())
    assert len(read_public_keys(both)) == 2
    sign_bundle(another, keys / "other.key")
    BundleStore(tmp_path / "store", both).check(another)


def test_keys_that_are_none_are_refused(tmp_path: Path, another: Path, keys: Path) -> None:
    public = generate_private_key(65537, 1024).public_key()
    rsa = tmp_path / "rsa.pub"
    rsa.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for path in (keys / "maker.key", rsa, tmp_path / "gone", another / MANIFEST_NAME):
        with pytest.raises(InputError):
            read_public_keys(path)
    for path in (keys / "maker.pub", tmp_path / "gone", another / MANIFEST_NAME):
        with pytest.raises(InputError):
            sign_bundle(another, path)
    with pytest.raises(InputError, match="exists"):
        generate_key_pair(keys / "maker.key")
    assert stat.S_IMODE((keys / "maker.key").stat().st_mode) == 0o600
    spoil(another / "tokenizer.json")
    with pytest.raises(BundleCorrupt):
        sign_bundle(another, keys / "maker.key")


# Interruptions


def test_killed_at_any_moment_nothing_half_installed_is_visible(
    store: BundleStore, shipped: Path, another: Path
) -> None:
    begun = time.monotonic()
    first = store.install(shipped).name
    # Python's own start comes on top of what an installation takes here.
    longest = 1.5 * (time.monotonic() - begun) + 0.3
    delays = random.Random(0)
    outcomes = set()
    for number in range(10):
        source = change(another, acceptance={"x": number})
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


def test_two_installations_at_once_take_turns(store: BundleStore, shipped: Path, another: Path) -> None:
    processes = [start(store.path, source) for source in (shipped, another)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    links = {store.link("current"), store.link("previous")}
    assert links == set(store.names())
    assert len(links) == 2
    assert_clean(store)


# Full disks


def no_large_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))


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


def test_a_file_larger_than_the_system_allows_is_a_typed_error(store: BundleStore, shipped: Path) -> None:
    result = run("install", str(shipped), "--store", str(store.path), preexec_fn=no_large_files)
    assert result.returncode == 3
    assert f"cannot write to the bundle store {store.path}: File too large" in result.stderr
    assert_clean(store)


def test_what_cannot_fit_is_not_begun(store: BundleStore, another: Path) -> None:
    with (another / "model.onnx.data").open("r+b") as file:
        file.truncate(shutil.disk_usage(another).free + (1 << 30))
    size = (another / "model.onnx.data").stat().st_size
    manifest = read_manifest(another)
    large = msgspec.structs.replace(manifest.files["model.onnx.data"], bytes=size)
    write_manifest(another, msgspec.structs.replace(manifest, files=manifest.files | {"model.onnx.data": large}))
    with pytest.raises(StoreError, match=r"no space for model\.onnx\.data: it takes .* MB"):
        store.install(another)
    assert_clean(store)


def test_a_store_that_is_a_file_is_a_typed_error(tmp_path: Path, shipped: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StoreError, match="cannot write to the bundle store"):
            BundleStore(path).install(shipped)
    with pytest.raises(StoreError, match="cannot read the bundle store"):
        BundleStore(tmp_path / "file").entries()


# Archives


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


@settings(deadline=None)
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


@settings(deadline=None)
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


# The command


def test_the_command_says_what_it_did(store: BundleStore, shipped: Path, another: Path, keys: Path) -> None:
    place = ("--store", str(store.path))
    assert "in use, loads in" in run("install", str(shipped), *place).stdout
    installed = run("install", str(another), *place, "--no-use")
    assert re.match(r"another@\w{16}: installed, loads in .* ms per token\n$", installed.stdout)
    table = run("list", *place).stdout.splitlines()
    assert len(table) == 3
    assert re.search(r"^bundle@\w{16} +current .* fused int8 +anchor/0/\w+ +none", "\n".join(table), re.MULTILINE)
    listed = json.loads(run("list", *place, "--json").stdout)
    assert {(entry["name"].split("@")[0], entry["state"]) for entry in listed} == {
        ("bundle", "current"),
        ("another", ""),
    }
    assert run("use", "another", *place).stdout.endswith(": in use\n")
    assert run("verify", *place).stdout.count(": no errors, loads in") == 2
    refused = run("verify", str(shipped), *place, "--key", str(keys / "maker.pub"))
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "is not signed" in refused.stderr
    assert run("remove", "another", *place).returncode == 2
    assert run("remove", "bundle", *place).stdout.endswith(": removed\n")
    assert run("use", "previous", *place).returncode == 3


def test_the_configuration_names_store_and_key(tmp_path: Path, another: Path, keys: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[draft]\nstore = "here"\npublic_key_file = "{keys / "maker.pub"}"\n')
    assert "is not signed" in run("install", str(another), "--config", str(config)).stderr
    sign_bundle(another, keys / "maker.key")
    assert run("install", str(another), "--config", str(config)).returncode == 0
    (entry,) = json.loads(run("list", "--json", "--config", str(config)).stdout)
    assert (entry["signature"], entry["state"]) == ("valid", "current")
    assert (tmp_path / "here" / "current").is_symlink()


def test_keys_and_signatures_by_command(another: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public, secret = tmp_path / "me.pub", tmp_path / "me.key"
    assert export(["keygen", "--output", str(tmp_path / "me")]) == 0
    assert capsys.readouterr().out.startswith(f"{secret}: keep it secret; {public}: for boards")
    assert export(["sign", str(another), "--key", str(secret)]) == 0
    assert capsys.readouterr().out == f"{another / SIGNATURE}: signed\n"
    assert run("verify", f"{another}/", "--key", str(public)).returncode == 0
    assert export(["keygen", "--output", str(tmp_path / "me")]) == 2
    assert "choose another name" in capsys.readouterr().err
    # The keys and the signature are what everybody's tools take for them.
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    files = ["-in", str(another / MANIFEST_NAME), "-sigfile", str(another / SIGNATURE)]
    assert subprocess.run([*check, *files], capture_output=True, check=False).returncode == 0
