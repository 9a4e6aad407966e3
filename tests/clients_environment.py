"""The environment of programs that tests run beside the project, which `make clients` makes."""

from __future__ import annotations

from pathlib import Path

import pytest

_ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-clients"
PYTHON, NODE_MODULES = _ENVIRONMENT / "bin" / "python", _ENVIRONMENT / "node_modules"


def require_python() -> Path:
    """Return the environment's Python, or skip the test."""
    if not PYTHON.exists():
        pytest.skip("the clients are not installed: make clients")
    return PYTHON
