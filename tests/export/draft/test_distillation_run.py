"""`draft-export distill`: from a target and text to a draft, including resumption and a full disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cloud_verifier.draft_models.checkpoint import WEIGHTS_FILE, load_draft
from cloud_verifier.draft_models.layouts import plan_draft
from edge_runtime.protocol.errors import FlexSpecError, InputError, TargetError
from export.cli.main import main
from export.draft import distillation_run, training
from export.draft.distillation_run import DistillationConfig, distill
from export.draft.teachers import make_siblings, target_teacher
from export.draft.training import TrainingSchedule
from tests.models import make_target, save_target

CPU = torch.device("cpu")
SCHEDULE = TrainingSchedule(12, 1e-2, 4, 24, warm_up=2, accumulate=2)
TEXT = "the quick brown fox jumps over the lazy dog; " * 80


@pytest.fixture
def config(tmp_path: Path) -> DistillationConfig:
    target = save_target(tmp_path / "target", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return DistillationConfig(target, (text,), SCHEDULE, siblings=1, samples=150)


def test_output_files_and_record(config: DistillationConfig, tmp_path: Path) -> None:
    agreement = distill(config, tmp_path / "draft", CPU)
    names = {path.name for path in (tmp_path / "draft").iterdir()}
    assert names == {"distill.json", "distill.png", "draft.json", WEIGHTS_FILE}
    assert not list(tmp_path.glob("*.partial"))
    record = json.loads((tmp_path / "draft" / "distill.json").read_text())
    assert record["agreement"] == agreement.record()
    assert record["plan"]["seed"] == 0
    assert record["curve"]["losses"]
    # The embedding is tied to the head, which the layout shares: only two blocks are trained.
    load_draft(tmp_path / "draft", config.target)
    with pytest.raises(InputError, match="exists"):
        distill(config, tmp_path / "draft", CPU)


@pytest.mark.parametrize("layout", ["prefix", "standalone"])
def test_other_layouts(config: DistillationConfig, tmp_path: Path, layout: str) -> None:
    changed = DistillationConfig(
        config.target,
        config.texts,
        TrainingSchedule(2, 1e-2, 2, 16),
        layout=layout,
        new_blocks=1,
        shared_blocks=1 if layout == "prefix" else 0,
    )
    distill(changed, tmp_path / layout, CPU)
    assert load_draft(tmp_path / layout, config.target).config.num_hidden_layers == (2 if layout == "prefix" else 1)


@pytest.mark.slow
def test_training_reduces_the_loss(config: DistillationConfig, tmp_path: Path) -> None:
    losses = distillation_losses(config, tmp_path)
    assert losses[-1] < losses[0]


def distillation_losses(config: DistillationConfig, tmp_path: Path) -> list[float]:
    longer = DistillationConfig(
        config.target, config.texts, TrainingSchedule(60, 1e-2, 4, 24, warm_up=2), objective="kl"
    )
    distill(longer, tmp_path / "longer", CPU)
    losses: list[float] = json.loads((tmp_path / "longer" / "distill.json").read_text())["curve"]["losses"]
    return losses


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(
    config: DistillationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(config, tmp_path / "uninterrupted", CPU)
    options = [str(config.target), "--text", str(config.texts[0]), "--steps", "12", "--rate", "1e-2", "--rows", "4"]
    options += ["--length", "24", "--accumulate", "2", "--warm-up", "2", "--siblings", "1", "--samples", "150"]
    output = tmp_path / "killed"
    # A child process that saves a checkpoint at every record and then sleeps, so that it can be killed in between.
    program = (
        "import sys, time, export.draft.training as t\n"
        "original, save = t.fit, t._save\n"
        "t.fit.__kwdefaults__.update(seconds_between_checkpoints=0.0, record_every=2)\n"
        "def slow(*a): save(*a); time.sleep(0.5)\n"
        "t._save = slow\n"
        "from export.cli.main import main\n"
        "sys.exit(main(['distill', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-c", program, *options, "--output", str(output), "--device", "cpu"]
    with subprocess.Popen(command) as child:
        while not (tmp_path / "killed.partial" / "checkpoint").exists():
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert not output.exists()
    monkeypatch.setitem(training.fit.__kwdefaults__, "record_every", 2)
    distill(config, output, CPU)
    resumed, expected = load_file(output / WEIGHTS_FILE), load_file(tmp_path / "uninterrupted" / WEIGHTS_FILE)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_other_options_do_not_resume_a_run(
    config: DistillationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation_run, "train_draft", fail)
    with pytest.raises(KeyboardInterrupt):
        distill(config, tmp_path / "draft", CPU)
    changed = DistillationConfig(config.target, config.texts, TrainingSchedule(13, 1e-2, 4, 24))
    with pytest.raises(InputError, match="started with other options"):
        distill(changed, tmp_path / "draft", CPU)


def test_a_full_disk_is_reported(config: DistillationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "draft.partial" / WEIGHTS_FILE))

    monkeypatch.setattr(distillation_run, "save_draft", full)
    with pytest.raises(FlexSpecError, match="No space left on device; free some space"):
        distill(config, tmp_path / "draft", CPU)
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("texts", "error"),
    [(["nowhere.txt"], "no text at"), (["short.txt"], "too short"), (["binary"], "not UTF-8")],
)
def test_unusable_texts_are_rejected(config: DistillationConfig, tmp_path: Path, texts: list[str], error: str) -> None:
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=error):
        distill(
            DistillationConfig(config.target, tuple(tmp_path / name for name in texts), SCHEDULE),
            tmp_path / "draft",
            CPU,
        )


def test_unusable_targets_are_rejected(config: DistillationConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TargetError, match="not a target that transformers can load"):
        distill(DistillationConfig(tmp_path / "empty", config.texts, SCHEDULE), tmp_path / "draft", CPU)
    (config.target / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        distill(config, tmp_path / "other", CPU)


def test_command_line(config: DistillationConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", str(config.texts[0]), "--steps", "2", "--rows", "2", "--length", "16", "--device", "cpu"]
    assert main(["distill", str(config.target), *options, "--output", str(tmp_path / "draft")]) == 0
    assert "acceptance on held-out text" in capsys.readouterr().out
    wrong = ["--rows", "3", "--accumulate", "2", "--output", str(tmp_path / "x")]
    assert main(["distill", str(config.target), *options, *wrong]) == 2
    assert "3 rows cannot be split into 2 equal parts" in capsys.readouterr().err


def test_siblings_differ_in_unshared_blocks_and_leave_the_target_unchanged() -> None:
    target = make_target("llama")
    plan = plan_draft(target.config, "anchor")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = target_teacher(target)(ids)
    first, again = make_siblings(target, plan, 1, 0.2), make_siblings(target, plan, 2, 0.2)
    assert torch.equal(first[0](ids), again[0](ids))
    assert not torch.allclose(again[0](ids), again[1](ids))
    assert not torch.allclose(first[0](ids), before)
    assert torch.equal(target_teacher(target)(ids), before)
    assert torch.allclose(make_siblings(target, plan, 1, 0.0)[0](ids), before, atol=1e-6)
    # The last block is shared with an anchor draft: the same input gives the same output there.
    changed = {id(module) for module, _, _ in first[0]._changes}
    assert not changed & {id(module) for module in target.model.layers[-1].modules()}
    with pytest.raises(InputError, match="at least 0"):
        make_siblings(target, plan, 1, -1.0)
