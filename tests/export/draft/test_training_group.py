"""A training that torchrun divides among processes takes the steps of one process."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from cloud_verifier.draft_models.checkpoint import WEIGHTS_FILE
from edge_runtime.protocol.errors import InputError
from export.cli import distill, family
from export.cli.main import main
from export.draft.training_group import TrainingGroup
from tests.models import save_chat_target

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "export.cli"]


@pytest.mark.slow
def test_two_processes_train_the_draft_of_one(tmp_path: Path) -> None:
    target = save_chat_target(tmp_path / "target", num_hidden_layers=2)
    options = ["--chats", "16", "--steps", "4", "--rows", "4", "--accumulate", "2", "--length", "48"]
    options += ["--held-out-chats", "6"]
    command = ["distill", str(target), *options, "--new-blocks", "1", "--warm-up", "1", "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "alone")]) == 0
    done = subprocess.run([*TORCHRUN, *command, "--output", tmp_path / "together"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Only the first process reports.
    assert done.stdout.count("held-out text") == 1
    records = [json.loads((tmp_path / name / "distill.json").read_text()) for name in ("alone", "together")]
    assert records[0]["tokens"] == records[1]["tokens"]
    assert records[0]["curve"]["losses"] == pytest.approx(records[1]["curve"]["losses"], abs=1e-4)
    alone, together = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("alone", "together"))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name].float(), tensor.float(), rtol=0.02, atol=1e-3)


def test_parts_must_divide_among_the_processes() -> None:
    assert [*TrainingGroup(1, 2).own_parts(4)] == [1, 3]
    with pytest.raises(InputError, match="3 parts of a batch cannot be divided among 2 processes: --accumulate"):
        TrainingGroup(0, 2).own_parts(3)


def test_torchrun_is_refused_where_stages_cannot_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TrainingGroup, "join", lambda device: TrainingGroup(0, 2))
    command = ["family", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu", "--stage", "bundle"]
    assert main(command) == InputError.exit_code
    assert "torchrun is for --stage blocks, chats, distill, retrain" in capsys.readouterr().err


@pytest.mark.parametrize("command", [distill, family])
def test_torchrun_takes_no_option_for_one_of_its_own(command: Any) -> None:
    """It expands abbreviations of its own options, also where they follow the program that it is to run."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    (actions,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    (own,) = actions.choices.values()
    for action in own._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        for option in action.option_strings:
            parsed = get_args_parser().parse_args(["-m", "export.cli", own.prog.split()[-1], option, "value"])
            assert parsed.training_script_args[-2:] == [option, "value"]


def test_the_former_name_of_an_option_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails for another reason."""
    target = str(tmp_path / "target")
    arguments = ["distill", target, "--chats", "1", "--start", "draft", "--output", str(tmp_path / "out")]
    assert main(arguments) != 0
    assert "--start is deprecated; use --from-draft" in capsys.readouterr().err
