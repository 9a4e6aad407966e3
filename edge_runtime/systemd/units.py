"""Unit files of systemd services: rendered from a template, installed atomically, started, stopped and removed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from edge_runtime.common.files import write_atomically
from edge_runtime.protocol.errors import FlexSpecError, InputError

UNIT_DIRECTORY = Path("etc/systemd/system")
# Exists if systemd is the init system of this machine.
SYSTEMD_RUNNING = Path("/run/systemd/system")
UNIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# Hidden from a service by ProtectHome= and PrivateTmp= of the units.
HIDDEN_DIRECTORIES = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))
# `systemctl start` returns when the service is ready or its own TimeoutStartSec= has passed; this only guards against
# a hang.
SYSTEMCTL_TIMEOUT_SECONDS = 3600.0


class ServiceUnit(NamedTuple):
    """A service, and the template of its unit.

    Attributes:
        module: module to run with `python -m`.
        name: default name of the unit.
        state_directory: directory below /var/lib, if the unit has its default name; else it is named like the unit.
        template: unit file with placeholders such as @NAME@.
    """

    module: str
    name: str
    state_directory: str
    template: Path


class ServiceError(FlexSpecError):
    """A unit could not be written, or systemd reported an error."""


def render_unit(unit: ServiceUnit, name: str, python: Path, arguments: Sequence[str]) -> str:
    """Return a unit file that runs `serve` with these arguments. Raises InputError: they cannot be quoted."""
    words = [str(python), "-m", unit.module, "serve", *arguments]
    text = unit.template.read_text(encoding="utf-8")
    for placeholder, value in {
        "@NAME@": name,
        "@COMMAND@": " ".join(map(quote_argument, words)),
        "@STATE@": unit.state_directory if name == unit.name else name,
    }.items():
        text = text.replace(placeholder, value)
    return text


def validate_unit_name(name: str) -> str:
    """Return `name` without the suffix `.service`. Raises InputError: it is not a valid name of a unit."""
    stem = name.removesuffix(".service")
    if not UNIT_NAME.fullmatch(stem):
        raise InputError(f"{name[:80]!r} is not a valid name of a service; use letters, digits, - and _")
    return stem


def validate_paths(paths: Iterable[Path]) -> None:
    """Raise InputError unless a service, which runs in / and cannot see home directories, can find these paths."""
    for path in paths:
        if not path.is_absolute():
            raise InputError(f"{path}: a service runs in /; write the absolute path")
        for actual in {path, path.resolve()}:
            if hidden := next((root for root in HIDDEN_DIRECTORIES if actual.is_relative_to(root)), None):
                raise InputError(
                    f"{actual}: a service cannot see files below {hidden}; move it, for instance below /opt or /srv"
                )


def installation_paths() -> list[Path]:
    """Return the paths of this installation that a service needs: interpreter and packages."""
    return [Path(sys.executable), Path(sys.prefix), Path(sys.base_prefix), Path(__file__)]


def quote_argument(word: str) -> str:
    """Quote a word for ExecStart=, so that it stays one word without specifiers and variables. Raises InputError."""
    if not word.isprintable():
        raise InputError(f"{word!r}: a unit file cannot hold control characters")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    # systemd looks for a prefix such as - or @ at the start of the command itself, which must therefore not be quoted.
    # None of our commands needs quotes.
    return escaped if re.fullmatch(r"[\w@%+=:,./-]+", escaped, re.ASCII) else f'"{escaped}"'


class UnitManager:
    """Installs and removes the units of this machine, or of the image below `root`."""

    def __init__(self, root: Path | None = None) -> None:
        """
        Raises:
            InputError: `root` does not exist; or it is None, and the user is not root or systemd does not run here.
        """
        self._root = root
        if root is not None:
            if not root.is_dir():
                raise InputError(f"--root {root}: no such directory")
        elif os.geteuid() != 0:
            raise InputError("only root can change services: run this with sudo, or change an image with --root DIR")
        elif not SYSTEMD_RUNNING.is_dir():
            raise InputError(
                "systemd is not the init system here; change an image with --root DIR, or run `serve` yourself"
            )

    def path(self, name: str) -> Path:
        """Return the path of the unit file, whether or not it exists."""
        return (self._root or Path("/")) / UNIT_DIRECTORY / f"{name}.service"

    def install(self, name: str, text: str, *, now: bool) -> bool:
        """Write a unit file. Returns whether that changed it.

        Args:
            now: also enable the unit and, unless it is in an image, start it, or restart it if it has changed.

        Raises:
            ServiceError: the unit cannot be written, which leaves the old one in place, or it cannot be started.
        """
        path = self.path(name)
        changed = _write(path, text)
        if self._root is None:
            systemctl("daemon-reload")
        if now:
            self._enable("enable", name)
            if self._root is None:
                # If earlier failures have used up the start limit, systemd would refuse to start it.
                systemctl("reset-failed", path.name, check=False)
                systemctl("restart" if changed else "start", path.name)
        return changed

    def uninstall(self, name: str) -> bool:
        """Stop, disable and remove a unit. Returns whether it existed. Raises ServiceError."""
        path = self.path(name)
        if not path.exists():
            return False
        if self._root is None:
            systemctl("stop", path.name)
        self._enable("disable", name)
        try:
            path.unlink()
        except OSError as error:
            raise ServiceError(f"cannot remove {path}: {error.strerror}") from None
        if self._root is None:
            systemctl("daemon-reload")
            systemctl("reset-failed", path.name, check=False)
        return True

    def _enable(self, verb: str, name: str) -> None:
        systemctl(*([f"--root={self._root}"] if self._root else []), "--quiet", verb, f"{name}.service")


def systemctl(*arguments: str, check: bool = True) -> str:
    """Run systemctl and return its output. Raises ServiceError: not installed, or it failed and `check` is set."""
    try:
        done = subprocess.run(
            ["systemctl", "--no-pager", "--no-ask-password", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SYSTEMCTL_TIMEOUT_SECONDS,
        )
    except FileNotFoundError:
        raise ServiceError("systemctl is not installed: does this machine use systemd?") from None
    except subprocess.TimeoutExpired:
        raise ServiceError(
            f"`systemctl {' '.join(arguments)}` did not return within {SYSTEMCTL_TIMEOUT_SECONDS:g} s"
        ) from None
    if check and done.returncode:
        message = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        if "has not been booted with systemd" in message:
            raise ServiceError("systemd is not the init system of this machine, so it has no services to ask about")
        raise ServiceError(f"`systemctl {' '.join(arguments)}` failed: {message}")
    return done.stdout


def _write(path: Path, text: str) -> bool:
    """Replace the file atomically, readable by everyone. Returns whether that changed it."""
    try:
        if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode(), 0o644)
        # Readable whatever the umask is.
        path.chmod(0o644)
    except OSError as error:
        raise ServiceError(f"cannot write {path}: {error.strerror}; nothing was changed") from None
    return True
