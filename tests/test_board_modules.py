"""The board's tests run where PyTorch is not installed; `make test-arm` runs them so on aarch64."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.board_modules import CHECKOUT, board_test_modules, missing_packages

# As if these were not installed.
COLLECT = """
import importlib.abc, sys, pytest

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers", "safetensors", "huggingface_hub", "openai", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find_spec(name, package)
raise SystemExit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
# Some of what must be among them.
EXPECTED = (
    "tests/edge_runtime/protocol/test_sampling.py",
    "tests/edge_runtime/protocol/test_messages.py",
    "tests/edge_runtime/draft/test_model.py",
    "tests/edge_runtime/bundles/test_store.py",
    "tests/edge_runtime/planning/test_analytic.py",
    "tests/edge_runtime/service/test_requests.py",
    "tests/device_profiles/first_boot/test_configure.py",
)


@pytest.mark.slow
def test_what_the_board_does_is_tested_without_pytorch() -> None:
    modules = board_test_modules()
    assert {name: missing_packages(CHECKOUT / name) for name in EXPECTED if name not in modules} == {}
    assert "tests/edge_runtime/test_exactness.py" not in modules
    done = subprocess.run([sys.executable, "-c", COLLECT, *modules], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
