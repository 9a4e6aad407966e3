"""The verifier's GPU runner and its kernels, in Triton's interpreter on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TRITON = ROOT / ".venv-triton"
# A limit for hangs: a case takes less than a minute.
LIMIT_SECONDS = 900


def check(*case: str) -> None:
    """Run a case of `simulated_gpu` in a process of its own, beside the Triton that `make triton` installs."""
    if not TRITON.exists():
        pytest.skip("Triton is not installed: make triton")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TRITON)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cloud_verifier.model.simulated_gpu", *case]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "right"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("llama", "float16"),
        ("llama", "float32", "exact"),
        ("gemma2", "float32"),
        ("gpt_oss", "float32"),
        ("llama4_text", "float32"),
    ],
    ids="-".join,
)
def test_its_logits_are_those_of_transformers(arguments: tuple[str, ...]) -> None:
    check("self-test", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tokens", "sampling", "attention"])
def test_it_computes_what_the_cpu_does(case: str) -> None:
    check(case)
