"""Which test modules run where only the board's install is: without PyTorch, as on a board.

Found by following imports from the modules of tests, so that a new module needs no list. Imports within functions are
not followed: a test that needs PyTorch there is skipped by a fixture of `tests/conftest.py`, or fails.
"""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

from device_profiles.image.runtime import CHECKOUT, read_lock

DIRECTORIES = ("tests/edge_runtime", "tests/device_profiles")
OWN_PACKAGES = ("edge_runtime", "cloud_verifier", "export", "device_profiles", "tests")
# What these tests need in addition to the board's install.
PYTEST = ("pytest", "pytest-asyncio", "pytest-rerunfailures", "pytest-timeout", "pytest-xdist")
REQUIREMENTS = (*PYTEST, "hypothesis", "jsonschema")


def board_test_modules() -> list[str]:
    """Return the paths, relative to the checkout, of the test modules that import nothing but the board's install."""
    paths = (path for name in DIRECTORIES for path in sorted((CHECKOUT / name).rglob("test_*.py")))
    return [str(path.relative_to(CHECKOUT)) for path in paths if not missing_packages(path)]


def missing_packages(module: Path) -> set[str]:
    """Return the top-level packages outside the board's install that `module` and all that it imports import."""
    seen: set[Path] = set()
    outside: set[str] = set()
    pending = [module]
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in _imports(path):
            top = name.partition(".")[0]
            if top in OWN_PACKAGES:
                pending += _files(name)
            elif top not in _available():
                outside.add(top)
    return outside


@functools.cache
def _available() -> frozenset[str]:
    """Names of the packages that can be imported; they are those of the distributions, with underscores."""
    return sys.stdlib_module_names | {name.replace("-", "_") for name in (*read_lock(), *REQUIREMENTS)}


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    """Full names that a file imports when it is imported; of `from a import b` also `a.b`, which may be a module."""
    names: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level, f"{path} has a relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)


@functools.cache
def _files(name: str) -> tuple[Path, ...]:
    """Return the files that importing a module of ours reads: the packages that it is in, and itself."""
    package, _, _ = name.rpartition(".")
    path = CHECKOUT.joinpath(*name.split("."))
    own = (file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file())
    return (*(_files(package) if package else ()), *own)
