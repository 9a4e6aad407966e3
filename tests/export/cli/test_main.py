"""The parser and the base install: which commands work without the extra `export`, and what the others print."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from cloud_verifier.draft_models.layouts import LAYOUTS
from export.bundle.onnx_graph import GRAPH_KINDS, WEIGHT_TYPES
from export.cli import choices
from export.cli.family import STAGES
from export.draft.distill import Objective
from export.draft.distillation_config import DistillationConfig
from export.evaluate.doctor import DraftQuery
from export.example_family.prepare import PACKAGE
from export.example_family.sizes import SIZES

# Runs `draft-export` with the packages of the extras blocked, as on a base install.
BASE_INSTALL = """
import sys
for name in ("torch", "transformers", "optimum", "onnx", "onnx_ir", "onnxruntime_genai", "peft", "safetensors",
             "accelerate", "gymnasium", "stable_baselines3", "matplotlib"):
    sys.modules[name] = None
from export.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run_on_base_install(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BASE_INSTALL, *map(str, arguments)]
    variables = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=variables)


def test_choices_match_their_definitions() -> None:
    assert choices.GRAPH_KINDS == GRAPH_KINDS
    assert sorted(choices.WEIGHT_TYPES) == sorted(WEIGHT_TYPES)
    assert tuple(LAYOUTS) == choices.LAYOUTS
    assert get_args(Objective) == choices.OBJECTIVES
    assert tuple(SIZES) == choices.FAMILY_SIZES
    defaults = choices.DEFAULT_NEW_BLOCKS, choices.DEFAULT_SHARED_BLOCKS
    for config in (DistillationConfig, DraftQuery):
        assert (config.new_blocks, config.shared_blocks) == defaults
    assert len(set(STAGES)) == len(STAGES)


@pytest.mark.slow
def test_help_works_on_the_base_install() -> None:
    done = run_on_base_install("--help")
    assert done.returncode == 0, done.stderr
    assert "draft-export keygen maker.key" in done.stdout
    for command in (
        *("onnx", "quick", "example", "family", "record", "keygen", "sign", "distill", "forms", "evaluate", "doctor"),
        "policy",
    ):
        assert f"\n    {command} " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("output", [("maker.key",), ("--output", "maker")], ids=str)
def test_keygen_and_sign_work_on_the_base_install(family: Path, tmp_path: Path, output: tuple[str, ...]) -> None:
    bundle = shutil.copytree(family / "bundle", tmp_path / "bundle")
    *option, name = output
    done = run_on_base_install("keygen", *option, tmp_path / name)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'maker.key'}: keep it secret; {tmp_path / 'maker.pub'}: for boards" in done.stdout
    done = run_on_base_install("sign", bundle, "--key", tmp_path / "maker.key")
    assert done.returncode == 0, done.stderr
    assert (bundle / "manifest.sig").is_file()


@pytest.mark.slow
def test_keygen_takes_one_name() -> None:
    assert run_on_base_install("keygen").returncode == 2
    assert run_on_base_install("keygen", "a.key", "--output", "a").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("onnx", "target", "draft", "--output", "bundle"),
        ("forms", ".", "draft", "--output", "forms"),
        ("family", "source", "--size", "smoke", "--out", "out"),
        ("example",),
        ("record", "bundle", "--target", "target", "--output", "a.npz"),
        ("distill", "target", "--text", "text", "--output", "draft"),
        ("evaluate", "bundle", "--target", "target"),
        ("doctor", "target"),
        ("policy", "--output", "policy"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_other_commands_name_the_extra(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """`example` needs it for a model that is not converted yet."""
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").write_bytes(b"GGUF")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = run_on_base_install(*arguments, PYTHONPATH=paths, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("draft-export: this command needs the Python package ")
    assert line.endswith(": pip install 'flexspec[export]'")
