"""Tests of images use programs that not every machine has; `.ci/run` installs them."""

from __future__ import annotations

import shutil

import pytest

from device_profiles.image.programs import PACKAGES, search_path


def require_programs(*names: str) -> None:
    """Skip the test unless these programs exist."""
    if missing := [name for name in names if shutil.which(name, path=search_path()) is None]:
        pytest.skip(f"needs {', '.join(missing)}: apt install {' '.join(PACKAGES.get(name, name) for name in missing)}")
