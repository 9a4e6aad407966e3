"""The unit of a service: written whole or not at all, started, stopped and removed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from edge_runtime.protocol.errors import FlexSpecError, InputError

UNITS = Path("etc/systemd/system")
# Exists while systemd is the init of this machine.
RUNNING = Path("/run/systemd/system")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# What the units' ProtectHome= and PrivateTmp= hide from a service.
HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))
# A start ends when the service is ready, and the unit says when that takes too long.
SYSTEMCTL_SECONDS = 3600.0


class Kind(NamedTuple):
    """One of the two services.

    Attributes:
        module: that is run, as `python -m` takes it.
        name: of the unit, unless another is given.
        state: directory below /var/lib of a service of that name.
        template: the unit, with blanks between at signs.
    """

    module: str
    name: str
    state: str
    template: Path


class ServiceError(FlexSpecError):
    """A unit could not be written, or systemd did not do what it was asked."""


def unit_text(kind: Kind, name: str, python: Path, arguments: Sequence[str]) -> str:
    """The unit `name`, which runs `serve` with these arguments. Raises InputError: no unit could say them."""
    words = [str(python), "-m", kind.module, "serve", *arguments]
    text = kind.template.read_text(encoding="utf-8")
    for blank, value in {
        "@NAME@": name,
        "@COMMAND@": " ".join(map(quoted, words)),
        "@STATE@": kind.state if name == kind.name else name,
    }.items():
        text = text.replace(blank, value)
    return text


def check_name(name: str) -> str:
    """`name` without `.service` at its end. Raises InputError if no unit may be called that."""
    stem = name.removesuffix(".service")
    if not NAME.fullmatch(stem):
        raise InputError(f"{name[:80]!r} is no name for a service; use letters, digits, - and _")
    return stem


def check_paths(paths: Iterable[Path]) -> None:
    """Raises InputError unless a service, which starts in / and sees no homes, can find all of these."""
    for path in paths:
        if not path.is_absolute():
            raise InputError(f"{path}: a service starts in /; write the whole path")
        for place in {path, path.resolve()}:
            if hidden := next((root for root in HIDDEN if place.is_relative_to(root)), None):
                raise InputError(
                    f"{place}: a service sees nothing below {hidden}; put it elsewhere, such as below /opt or /srv"
                )


def installation() -> list[Path]:
    """What a service needs of this installation of FlexSpec: interpreter and packages."""
    return [Path(sys.executable), Path(sys.prefix), Path(sys.base_prefix), Path(__file__)]


def quoted(word: str) -> str:
    """`word` as ExecStart= takes it: no specifiers, no variables, one word. Raises InputError."""
    if not word.isprintable():
        raise InputError(f"{word!r}: a unit takes no such characters")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    # A command must not be quoted before systemd has seen its first character; none of ours needs it.
    return escaped if re.fullmatch(r"[\w@%+=:,./-]+", escaped, re.ASCII) else f'"{escaped}"'


class Units:
    """The units of a machine, or of the image below `root`."""

    def __init__(self, root: Path | None = None) -> None:
        """
        Raises:
            InputError: there is no such root; or this machine's units are meant, and the user is not root, or systemd
                does not run here.
        """
        self._root = root
        if root is not None:
            if not root.is_dir():
                raise InputError(f"--root {root}: there is no such directory")
        elif os.geteuid() != 0:
            raise InputError("services are root's: run this with sudo, or write into an image with --root DIR")
        elif not RUNNING.is_dir():
            raise InputError("systemd does not run this machine; write into an image with --root DIR, or run `serve`")

    def path(self, name: str) -> Path:
        """Where the unit `name` is, or would be."""
        return (self._root or Path("/")) / UNITS / f"{name}.service"

    def install(self, name: str, text: str, *, now: bool) -> bool:
        """Writes a unit.

        Args:
            now: enable it, and unless it is in an image start it, or start it again where it has changed.

        Returns:
            Whether there is anything new.

        Raises:
            ServiceError: it cannot be written or started; an older one then stays.
        """
        path = self.path(name)
        changed = _write(path, text)
        if self._root is None:
            systemctl("daemon-reload")
        if now:
            self._enable("enable", name)
            if self._root is None:
                # With the start limit used up by an earlier fault, a start would be refused.
                systemctl("reset-failed", path.name, check=False)
                systemctl("restart" if changed else "start", path.name)
        return changed

    def uninstall(self, name: str) -> bool:
        """Stops, disables and removes a unit. Returns whether there was one. Raises ServiceError."""
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
    """What `systemctl` prints. Raises ServiceError: there is none; or it failed, and `check` is set."""
    try:
        done = subprocess.run(
            ["systemctl", "--no-pager", "--no-ask-password", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SYSTEMCTL_SECONDS,
        )
    except FileNotFoundError:
        raise ServiceError("there is no systemctl here: is this a machine with systemd?") from None
    except subprocess.TimeoutExpired:
        raise ServiceError(f"`systemctl {' '.join(arguments)}` did not end within {SYSTEMCTL_SECONDS:g} s") from None
    if check and done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ServiceError(f"`systemctl {' '.join(arguments)}` failed: {said}")
    return done.stdout


def _write(path: Path, text: str) -> bool:
    """Puts `text` at `path` in one step, for everybody to read. Returns whether that changed anything."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                os.fchmod(file.fileno(), 0o644)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ServiceError(f"cannot write {path}: {error.strerror}; nothing was changed") from None
    return True
