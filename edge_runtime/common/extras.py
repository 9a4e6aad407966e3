"""Optional dependencies: one sentence that names the extra to install, instead of a traceback."""

from __future__ import annotations

from collections.abc import Set


def describe_missing_extra(error: ModuleNotFoundError, modules: Set[str], extra: str) -> str:
    """The message for a command that needs `extra`, whose top-level modules are `modules`.

    Raises `error` itself if its module is not one of them: then the installation is broken, not incomplete.
    """
    module = (error.name or "").partition(".")[0]
    if module not in modules:
        raise error
    return f"this command needs the Python package {module}: pip install 'flexspec[{extra}]'"
