"""The bundle store with the shipped bundle: install, switch, fall back, remove."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import stat
from pathlib import Path

import psutil
import pytest

from edge_runtime.bundles.self_test import BundleUnfit, run_self_test
from edge_runtime.bundles.store import BundleStore, configured_bundle, current_bundle
from edge_runtime.protocol.errors import BundleCorrupt, BundleMissing, InputError
from edge_runtime.settings.table import DraftSettings
from export.bundle.sign import sign_bundle
from tests.edge_runtime.bundles.bundle_files import assert_clean, change, run, spoil, start


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_bundle_is_located_by_its_name_or_else_as_a_directory(
    store: BundleStore, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shipped.parent)
    assert store.locate(shipped.name) == Path(shipped.name)
    assert store.read(store.locate(shipped.name)).manifest.name
    installed = store.path / store.install(shipped).name
    assert store.locate(installed.name) == store.locate("current") == installed
    # A name in the store comes before a directory.
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path)
    assert store.locate("current") == installed
    assert store.locate("./current") == Path("current")
    with pytest.raises(BundleMissing, match="no bundle 'nothing'"):
        store.locate("nothing")


@pytest.mark.slow
def test_old_bundles_make_room(store: BundleStore, another: Path) -> None:
    names = [store.install(change(another, name=f"draft-{number}")).name for number in range(3)]
    assert store.names() == [names[2], names[1]]
    waiting = store.install(change(another, name="draft-3"), use=False, keep=2)
    assert set(store.names()) == {names[1], names[2], waiting.name}
    assert store.link("current") == names[2]
    with pytest.raises(InputError, match="--keep 0"):
        store.install(another, keep=0)


@pytest.mark.slow
def test_installing_again_repairs(store: BundleStore, shipped: Path) -> None:
    name = store.install(shipped).name
    spoil(store.path / name / "model.onnx.data")
    with pytest.raises(BundleCorrupt, match=r"no bundle in .* is usable"):
        current_bundle(store)
    assert store.install(shipped).name == name
    assert current_bundle(store).path == store.path / name
    assert_clean(store)


@pytest.mark.slow
def test_names_may_be_short_but_not_doubtful(store: BundleStore, another: Path) -> None:
    names = [store.install(change(another, acceptance={"x": share}), keep=5).name for share in (0.1, 0.2)]
    assert store.find(names[0].split("@")[1]) == names[0]
    for name in ("another", "nothing", "", "..", "previous/"):
        with pytest.raises(BundleMissing, match=names[0]):
            store.find(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a@b", "x" * 100])
def test_a_bundles_name_must_be_fit_for_a_directory(store: BundleStore, another: Path, name: str) -> None:
    with pytest.raises(BundleCorrupt, match=r"is named .*; nothing was installed"):
        store.install(change(another, name=name))
    assert_clean(store)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    _, errors = installing.communicate(timeout=300)
    assert installing.returncode == 3
    assert "crashed its self-test: SIGKILL, perhaps out of memory" in errors
    assert store.names() == []
    assert_clean(store)
    with pytest.raises(BundleUnfit, match=r"within 0\.01 s"):
        run_self_test(shipped, timeout=0.01)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_configuration_names_store_and_key(tmp_path: Path, another: Path, keys: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[draft]\nstore = "here"\npublic_key_file = "{keys / "maker.pub"}"\n')
    assert "is not signed" in run("install", str(another), "--config", str(config)).stderr
    sign_bundle(another, keys / "maker.key")
    assert run("install", str(another), "--config", str(config)).returncode == 0
    (entry,) = json.loads(run("list", "--json", "--config", str(config)).stdout)
    assert (entry["signature"], entry["state"]) == ("valid", "current")
    assert (tmp_path / "here" / "current").is_symlink()
