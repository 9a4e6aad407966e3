"""`draft-export distill`: from a target and text to a draft, including resumption and a full disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cloud_verifier.draft_models.checkpoint import WEIGHTS_FILE, load_draft, read_description
from cloud_verifier.draft_models.layouts import build_draft, plan_draft
from cloud_verifier.registry.checkpoint import base_directory
from edge_runtime.protocol.errors import FlexSpecError, InputError, TargetError
from export.bundle.four_bits import round_to_4_bits
from export.cli.main import main
from export.data.token_stream import TokenStream
from export.draft import chats, distillation_run, training, training_text
from export.draft.distillation_config import DistillationConfig
from export.draft.distillation_run import (
    distill,
    extrapolate_doubling,
    four_bit_weights,
    load_version,
    rounded_as_in_bundle,
)
from export.draft.teachers import make_siblings, target_teacher
from export.draft.training import TrainingSchedule
from export.example_family.evolution import evolve, save_adapter
from tests.models import make_target, save_chat_target, save_target

CPU = torch.device("cpu")
SCHEDULE = TrainingSchedule(12, 1e-2, 4, 24, warm_up=2, accumulate=2)
TEXT = "the quick brown fox jumps over the lazy dog; " * 80


@pytest.fixture(autouse=True)
def few_evaluated_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_text, "EVALUATED_WINDOWS", 8)


@pytest.fixture
def config(tmp_path: Path) -> DistillationConfig:
    target = save_target(tmp_path / "target", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return DistillationConfig(target=target, plan=SCHEDULE, texts=(text,), siblings=1, samples=150)


@pytest.mark.slow
def test_output_files_and_record(config: DistillationConfig, tmp_path: Path) -> None:
    result = distill(config, tmp_path / "draft", CPU)
    names = {path.name for path in (tmp_path / "draft").iterdir()}
    assert names == {"distill.json", "distill.png", "draft.json", WEIGHTS_FILE}
    assert not list(tmp_path.glob("*.partial"))
    record = json.loads((tmp_path / "draft" / "distill.json").read_text())
    assert record["agreement"] == json.loads(json.dumps(result.record()))
    assert result.text is not None and (result.chats, result.doubling_gain) == ({}, None)
    assert record["plan"]["seed"] == 0
    assert record["curve"]["losses"]
    # The embedding is tied to the head, which the layout shares: only two blocks are trained.
    load_draft(tmp_path / "draft", config.target)
    with pytest.raises(InputError, match="exists"):
        distill(config, tmp_path / "draft", CPU)


@pytest.mark.parametrize("layout", ["prefix", "standalone"])
def test_other_layouts(config: DistillationConfig, tmp_path: Path, layout: str) -> None:
    changed = replace(
        config,
        plan=TrainingSchedule(2, 1e-2, 2, 16),
        samples=0,
        layout=layout,
        new_blocks=1,
        shared_blocks=1 if layout == "prefix" else 0,
    )
    distill(changed, tmp_path / layout, CPU)
    assert load_draft(tmp_path / layout, config.target).config.num_hidden_layers == (2 if layout == "prefix" else 1)


@pytest.mark.slow
def test_training_reduces_the_loss(config: DistillationConfig, tmp_path: Path) -> None:
    longer = replace(config, plan=TrainingSchedule(60, 1e-2, 4, 24, warm_up=2), objective="kl", siblings=0, samples=0)
    distill(longer, tmp_path / "longer", CPU)
    losses = json.loads((tmp_path / "longer" / "distill.json").read_text())["curve"]["losses"]
    assert losses[-1] < losses[0]


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
    changed = replace(config, plan=TrainingSchedule(13, 1e-2, 4, 24))
    with pytest.raises(InputError, match="started with other options"):
        distill(changed, tmp_path / "draft", CPU)


@pytest.mark.slow
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
        distill(replace(config, texts=tuple(tmp_path / name for name in texts)), tmp_path / "draft", CPU)


def test_unusable_targets_are_rejected(config: DistillationConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TargetError, match=r"it has no config\.json"):
        distill(replace(config, target=tmp_path / "empty"), tmp_path / "draft", CPU)
    (config.target / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        distill(config, tmp_path / "other", CPU)


def test_command_line(config: DistillationConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", str(config.texts[0]), "--steps", "2", "--rows", "2", "--length", "16", "--device", "cpu"]
    assert main(["distill", str(config.target), *options, "--output", str(tmp_path / "draft")]) == 0
    printed = capsys.readouterr().out
    assert "on held-out text\n  given text: " in printed and " at T=0.7, " in printed
    wrong = ["--rows", "3", "--accumulate", "2", "--output", str(tmp_path / "x")]
    assert main(["distill", str(config.target), *options, *wrong]) == 2
    assert "3 rows cannot be split into 2 equal parts" in capsys.readouterr().err


def test_siblings_differ_in_unshared_blocks_and_leave_the_target_unchanged() -> None:
    target = make_target("llama")
    plan = plan_draft(target.config, "anchor")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = target_teacher(target)(ids)
    first, again = make_siblings(target, plan, 1, 0.2), make_siblings(target, plan, 2, 0.2)
    taught, *others = (target_teacher(sibling)(ids) for sibling in (*first, *again))
    assert torch.equal(taught, others[0])
    assert not torch.allclose(*others)
    assert not torch.allclose(taught, before)
    assert torch.equal(target_teacher(target)(ids), before)
    assert torch.equal(target_teacher(make_siblings(target, plan, 1, 0.0)[0])(ids), before)
    # Only matrices in front of the last block, which an anchor draft shares, are copies.
    shared = {id(parameter) for parameter in target.parameters()}
    for name, parameter in first[0].named_parameters():
        copied = "proj" in name and not name.startswith(f"model.layers.{len(target.model.layers) - 1}.")
        assert (id(parameter) not in shared) == copied, name
        if copied:
            original = target.get_parameter(name).detach()
            assert float((parameter.detach() - original).norm() / original.norm()) == pytest.approx(0.2, rel=1e-3)
    with pytest.raises(InputError, match="at least 0"):
        make_siblings(target, plan, 1, -1.0)


# Chats, versions, and drafts to start from


@pytest.fixture
def chat_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DistillationConfig:
    monkeypatch.setattr(chats, "CPU_ROWS", 4)
    monkeypatch.setattr(chats, "MAX_USER_TOKENS", 8)
    target = save_chat_target(tmp_path / "target", num_hidden_layers=3, tie_word_embeddings=True)
    plan = TrainingSchedule(10, 1e-2, 4, 48, warm_up=2)
    return DistillationConfig(target=target, plan=plan, chats=10, evaluated_chats=3, new_blocks=1)


def stored_weights(draft: Path) -> dict[str, torch.Tensor]:
    return load_file(draft / WEIGHTS_FILE)


@pytest.mark.slow
def test_a_draft_distilled_on_chats_alone(
    chat_config: DistillationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(training.fit.__kwdefaults__, "record_every", 1)
    result = distill(replace(chat_config, head_bits=4), tmp_path / "draft", CPU)
    assert result.text is None
    assert [*result.chats] == ["T=0", "T=0.7", "T=1"]
    for temperature, agreement in result.chats.items():
        assert [*agreement.accepted] == [*agreement.round_tokens] == [temperature]
        assert agreement.positions > 0 and 0 <= agreement.accepted[temperature] <= 1
    record = json.loads((tmp_path / "draft" / "distill.json").read_text())
    assert record["agreement"] == result.record()
    assert record["tokens"] > 48 and record["chats"] == 10
    # The held-out chats are also judged during the training, the last time at its end.
    assert len(record["curve"]["scores"]) == training.EVALUATIONS
    assert record["curve"]["evaluated_steps"][-1] == 10
    assert {path.name for path in (tmp_path / "draft").iterdir()} == {
        *("distill.json", "distill.png", "draft.json", WEIGHTS_FILE)
    }
    # The bundle rounds the head; the draft keeps its target's.
    draft = load_draft(tmp_path / "draft", chat_config.target)
    target = load_version(chat_config.target, CPU)
    assert torch.equal(draft.lm_head.weight.float(), target.lm_head.weight)


@pytest.mark.slow
def test_an_interrupted_training_resumes_with_the_chats_that_it_wrote(
    chat_config: DistillationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(chat_config, tmp_path / "uninterrupted", CPU)
    train, write_batch = distillation_run.train_draft, chats.ChatWriter._write_batch
    monkeypatch.setattr(distillation_run, "train_draft", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distill(chat_config, tmp_path / "draft", CPU)
    assert not (tmp_path / "draft").exists()
    monkeypatch.setattr(distillation_run, "train_draft", train)
    counts: list[int] = []

    def count(self: chats.ChatWriter, rows: int, *others: object) -> chats.Chats:
        counts.append(rows)
        return write_batch(self, rows, *others)

    monkeypatch.setattr(chats.ChatWriter, "_write_batch", count)
    distill(chat_config, tmp_path / "draft", CPU)
    assert counts == []
    expected, resumed = stored_weights(tmp_path / "uninterrupted"), stored_weights(tmp_path / "draft")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_training_starts_from_a_draft(chat_config: DistillationConfig, tmp_path: Path) -> None:
    distill(chat_config, tmp_path / "first", CPU)
    # At a rate of almost zero it stays what it was.
    further = replace(chat_config, start=tmp_path / "first", new_blocks=2, plan=TrainingSchedule(1, 1e-12, 4, 48))
    distill(further, tmp_path / "second", CPU)
    first, second = stored_weights(tmp_path / "first"), stored_weights(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "second" / "draft.json").read_bytes() == (tmp_path / "first" / "draft.json").read_bytes()


@pytest.mark.slow
def test_versions_teach_along(tmp_path: Path) -> None:
    target_path = save_target(tmp_path / "target", num_hidden_layers=3)
    adapted, _ = evolve(
        load_version(target_path, CPU).requires_grad_(True),
        TokenStream(torch.arange(300, dtype=torch.int32)),
        TrainingSchedule(2, 0.1, 2, 16, warm_up=1),
        rank=2,
        frozen_blocks=0,
    )
    save_adapter(adapted, tmp_path / "version", "../target")
    target = load_version(target_path, CPU)
    config = DistillationConfig(
        target=target_path, plan=SCHEDULE, versions=(tmp_path / "version",), siblings=2, future_share=0.3
    )
    text = TokenStream(torch.arange(300, dtype=torch.int32))
    mixes = distillation_run._make_teachers(config, target, plan_draft(target.config, "anchor"), text, compiled=False)
    assert [mix.share for mix in mixes] == pytest.approx([0.7, 0.1, 0.1, 0.1])
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    version = load_version(tmp_path / "version", CPU)
    taught = [mix.teacher(ids) for mix in mixes]
    with torch.no_grad():
        assert torch.equal(taught[0], target(input_ids=ids).logits)
        assert sum(torch.equal(logits, version(input_ids=ids).logits) for logits in taught[1:]) == 1
    assert not any(torch.equal(taught[0], logits) for logits in taught[1:])
    (alone,) = distillation_run._make_teachers(
        replace(config, versions=(), siblings=0), target, plan_draft(target.config, "anchor"), text, compiled=False
    )
    assert alone.share == 1.0


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_or_all_matrices_are_rounded_for_a_while(tied: bool) -> None:
    draft, _ = build_draft(make_target("llama", tie_word_embeddings=tied), new_blocks=1, shared_blocks=0)
    before = {name: value.clone() for name, value in draft.state_dict().items()}
    blocks = [name for name in before if "proj" in name]
    with pytest.raises(KeyboardInterrupt), rounded_as_in_bundle(four_bit_weights(draft, 4, None)):
        assert all(torch.equal(draft.get_parameter(name), before[name]) for name in blocks)
        assert torch.equal(draft.lm_head.weight, round_to_4_bits(before["lm_head.weight"]))
        assert torch.equal(draft.model.embed_tokens.weight, round_to_4_bits(before["model.embed_tokens.weight"]))
        assert not torch.equal(draft.lm_head.weight, before["lm_head.weight"])
        raise KeyboardInterrupt
    after = draft.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with rounded_as_in_bundle(four_bit_weights(draft, None, 4)):
        assert torch.equal(draft.lm_head.weight, before["lm_head.weight"])
        for name in blocks:
            # The scales of one matrix are stored relative to a power of two of its own.
            assert torch.equal(draft.get_parameter(name), round_to_4_bits(before[name])), name
    assert four_bit_weights(draft, None, None) == []


def test_a_shared_draft_is_trained_on_with_its_head_as_in_the_bundle(
    config: DistillationConfig, tmp_path: Path
) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    distill(replace(config, head_bits=4), shared, CPU)
    base = base_directory(config.target)
    before = load_draft(shared, base).get_input_embeddings().weight
    plan = replace(config.plan, steps=1)
    distill(replace(config, plan=plan, start=shared, layout="standalone", head_bits=4), own, CPU)
    draft, description = load_draft(own, base), read_description(own)
    assert (description.plan.layout, description.plan.blocks) == ("standalone", read_description(shared).plan.blocks)
    after = draft.get_input_embeddings().weight
    # The step is taken from the exact values: the stored weights are not those of the rounded head.
    assert 0 < (after - before).abs().max() <= 2 * plan.peak_rate
    assert not torch.equal(after, round_to_4_bits(after))
    deeper = tmp_path / "deeper"
    distill(replace(config, plan=plan, start=own, added_blocks=1, head_bits=4, block_bits=4), deeper, CPU)
    assert read_description(deeper).plan.blocks == description.plan.blocks + 1
    with pytest.raises(InputError, match="is a draft of the layout standalone: leave out --layout"):
        distill(replace(config, start=own, layout="anchor"), tmp_path / "again", CPU)


def curve(scores: list[float], steps: list[int]) -> training.TrainingCurve:
    return training.TrainingCurve({}, {}, evaluated_steps=steps, scores=scores)


def test_the_gain_of_doubling_continues_a_power_law() -> None:
    steps = [200, 300, 450, 675, 1000]
    rejected = [0.9 * count**-0.2 for count in steps]
    gain = extrapolate_doubling(curve([1 - share for share in rejected], steps))
    assert gain == pytest.approx(rejected[-1] - 0.9 * 2000**-0.2, abs=1e-4)
    # No training makes a draft worse for certain; one that gains nothing gains nothing from more.
    assert extrapolate_doubling(curve([0.5, 0.49, 0.48, 0.5, 0.5], steps)) == 0
    assert extrapolate_doubling(curve([0.5, 0.6, 0.7], steps[:3])) is None
    assert extrapolate_doubling(curve([0.0, 0.2, 0.3, 0.4, 0.5], steps)) is None


def test_nothing_to_train_on_is_an_error(
    config: DistillationConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distill", str(config.target), "--output", str(tmp_path / "draft")]) == 2
    assert "nothing to train on: give --chats, --text or both" in capsys.readouterr().err
    assert main(["distill", str(config.target), "--chats", "4", "--output", str(tmp_path / "draft")]) == 2
    assert "has no chat template, so that it cannot write chats: give text with --text" in capsys.readouterr().err
    assert not (tmp_path / "draft").exists()
    # The corrected command is no other run to resume.
    with pytest.raises(InputError, match="no text at"):
        distill(replace(config, texts=(tmp_path / "nowhere",)), tmp_path / "draft", CPU)
