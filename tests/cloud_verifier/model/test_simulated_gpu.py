"""The verifier's GPU runner and its kernels, in Triton's interpreter on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TRITON = ROOT / ".venv-triton"
# A limit for hangs: the cases take less than a minute.
LIMIT_SECONDS = 900


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        # In few processes: each takes five seconds to start.
        ("self-test:gemma2:float32", "self-test:gpt_oss:float32", "self-test:llama4_text:float32", "attention"),
        ("self-test:llama:float32:exact", "self-test:llama:float32:fp8", "sampling", "many-texts"),
        ("self-test:llama:float32:quantized", "self-test:llama:float16", "tokens", "ahead"),
    ],
    ids=lambda cases: cases[0],
)
def test_it_computes_what_the_cpu_and_transformers_do(cases: tuple[str, ...]) -> None:
    if not TRITON.exists():
        pytest.skip("Triton is not installed: make triton")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TRITON)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cloud_verifier.model.simulated_gpu", *cases]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == [f"{case}: right" for case in cases]
