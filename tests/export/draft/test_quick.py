"""`draft-export quick`: a bundle from nothing but a target, or from a small model with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_verifier.model.target import Target
from edge_runtime.protocol.bundle import read_bundle
from export.cli.main import main
from export.draft import chats, quick
from tests.models import save_chat_target, save_target


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "CPU_ROWS", 4)
    monkeypatch.setattr(chats, "MAX_USER_TOKENS", 8)
    for name, value in {"CHATS_AT_ONCE": 4, "CHAT_TOKENS": 80, "LENGTH": 80, "EVALUATED_CHATS": 2}.items():
        monkeypatch.setattr(quick, name, value)


def make(*arguments: object) -> int:
    return main(["quick", *map(str, arguments), "--device", "cpu"])


@pytest.mark.slow
def test_blocks_of_the_target_are_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = save_chat_target(tmp_path / "target", num_hidden_layers=3, tie_word_embeddings=True)
    assert make(target, "--minutes", "0.001", "--output", tmp_path / "bundle") == 0
    assert "of draft tokens to be accepted in chats" in capsys.readouterr().out
    manifest = read_bundle(tmp_path / "bundle").manifest
    identity = manifest.shared.identity
    assert identity.startswith("anchor/0/")
    assert Target(target, device="cpu", dtype="float32").expected_identity(identity) == identity
    assert (manifest.graph.weights, manifest.architecture.layers) == ("int8", quick.NEW_BLOCKS)
    # Neither the draft nor its chats are left.
    assert {path.name for path in tmp_path.iterdir()} == {"target", "bundle"}


@pytest.mark.slow
def test_a_sibling_is_the_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = save_chat_target(tmp_path / "target", num_hidden_layers=2)
    sibling = save_chat_target(tmp_path / "sibling", num_hidden_layers=2)
    assert make(target, "--sibling", sibling, "--output", tmp_path / "bundle") == 0
    # It is the target itself.
    assert "expect about 100% at T=0, 100% at T=0.7, 100% at T=1" in capsys.readouterr().out
    manifest = read_bundle(tmp_path / "bundle").manifest
    assert manifest.shared.identity.startswith("standalone/0/")
    assert {path.name for path in tmp_path.iterdir()} == {"target", "sibling", "bundle"}


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = save_chat_target(tmp_path / "target", num_hidden_layers=1)
    other = save_target(tmp_path / "other", num_hidden_layers=1)
    assert make(target, "--minutes", "0", "--output", tmp_path / "bundle") == 2
    assert make(target, "--output", tmp_path / "other") == 2
    assert make(target, "--sibling", other, "--output", tmp_path / "bundle") == 2
    assert make(other, "--output", tmp_path / "bundle") == 2
    expected = ("--minutes must be more than 0", "exists: choose another", "300 logits", "has no chat template")
    for message, line in zip(expected, capsys.readouterr().err.splitlines(), strict=True):
        assert message in line
    assert not (tmp_path / "bundle").exists()
