"""The two directories that versions of the program are in, and the link to the one in use.

/opt/flexspec      -> flexspec.a
/opt/flexspec.a/   a virtual environment
/opt/flexspec.b/   another one: the previous version, or none
/opt/flexspec.update    while an update is on trial: the name of the slot to return to
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_runtime.common.files import fsync_path, write_atomically
from edge_runtime.protocol.errors import InputError
from edge_runtime.updates.package import UpdateError, read_update, unpack_update

HOME = Path("/opt/flexspec")
SUFFIXES = (".a", ".b")
# In a slot: the description of the update that it came from.
DESCRIPTION = "update.json"


class SlotStatus(msgspec.Struct, frozen=True):
    """The versions on a board.

    Attributes:
        active: name of the slot in use.
        version: its version; `as in the image` if it did not come with an update.
        other: version of the other slot; None if it is empty.
        on_trial: whether the update has not been found ready yet.
    """

    active: str
    version: str
    other: str | None
    on_trial: bool


class Slots:
    """The slots at `home`."""

    def __init__(self, home: Path = HOME) -> None:
        """Raises InputError: the installation at `home` cannot be switched."""
        self.home = home
        if not home.is_symlink() or home.readlink().name not in self._names():
            raise InputError(
                f"{home} is not a link to a slot: this installation did not come with an image, or from "
                "`device-profile image customise`; update it with pip"
            )

    @property
    def active(self) -> Path:
        """The slot in use."""
        return self.home.with_name(self.home.readlink().name)

    @property
    def other(self) -> Path:
        """The slot that is not in use; it need not exist."""
        return next(path for name in self._names() if (path := self.home.with_name(name)) != self.active)

    @property
    def on_trial(self) -> bool:
        """Whether an update is on trial."""
        return self._trial.exists()

    def status(self) -> SlotStatus:
        """Return what is on the board."""
        other = _version(self.other) if self.other.is_dir() else None
        return SlotStatus(self.active.name, _version(self.active), other, self.on_trial)

    def install(self, archive: Path, public_keys: Path | None, restart: Callable[[], None]) -> str:
        """Install an update into the other slot, and use it. Returns its version.

        Args:
            restart: restarts the service, and returns when it has been ready for a while. Raises FlexSpecError.

        Raises:
            InputError, UpdateError: the update cannot be used; nothing was changed.
            UpdateError: it did not become ready; the previous version is in use again.
        """
        if self.on_trial:
            raise UpdateError("another update is on trial; wait for it to end, or undo it with `update rollback`")
        description = read_update(archive, public_keys)
        slot, unpacked = self.other, self._temporary("unpacked")
        shutil.rmtree(unpacked, ignore_errors=True)
        try:
            unpack_update(archive, description, unpacked)
            _compile(unpacked)
            (unpacked / DESCRIPTION).write_bytes(msgspec.json.encode(description))
            # After a power cut, files that were not written yet would be empty.
            os.sync()
            self._discard(slot)
            unpacked.rename(slot)
        except OSError as error:
            raise UpdateError(f"cannot unpack {archive}: {error.strerror}; nothing was changed") from None
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
        before = self.active
        write_atomically(self._trial, before.name.encode(), 0o644)
        self._use(slot)
        try:
            restart()
        except BaseException as error:
            self._use(before)
            self._trial.unlink(missing_ok=True)
            try:
                # Should the old version fail too, its own error says why.
                restart()
            finally:
                self._discard(slot)
            raise UpdateError(
                f"version {description.version} did not become ready ({error}); {_version(before)} is in use again"
            ) from None
        self._trial.unlink()
        fsync_path(self.home.parent)
        return description.version

    def rollback(self) -> str:
        """Use the other slot. Returns its version. Raises InputError: it is empty."""
        if not self.other.is_dir():
            raise InputError("there is no previous version")
        self._use(self.other)
        self._trial.unlink(missing_ok=True)
        return _version(self.active)

    def settle(self) -> str | None:
        """Undo an update whose trial was cut short, at boot. Returns the version in use; None if there was none.

        The link may have been set back already: flexspec-configure.service does that before it runs anything of ours.
        """
        if not self.on_trial:
            return None
        before = self.home.with_name(self._trial.read_text().strip())
        if before.name in self._names() and before.is_dir():
            if before != self.active:
                self._use(before)
            self._discard(self.other)
        self._trial.unlink()
        return _version(self.active)

    @property
    def _trial(self) -> Path:
        return self.home.with_name(f"{self.home.name}.update")

    def _names(self) -> list[str]:
        return [f"{self.home.name}{suffix}" for suffix in SUFFIXES]

    def _temporary(self, name: str) -> Path:
        """A directory beside the slots, which is none of them if it is left over."""
        return self.home.with_name(f"{self.home.name}.{name}")

    def _discard(self, slot: Path) -> None:
        """Remove a slot at once, so that an interruption leaves no half of it to return to."""
        discarded = self._temporary("discarded")
        shutil.rmtree(discarded, ignore_errors=True)
        if slot.exists():
            slot.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)

    def _use(self, slot: Path) -> None:
        link = self.home.with_name(f"{self.home.name}.new")
        link.unlink(missing_ok=True)
        link.symlink_to(slot.name)
        link.replace(self.home)
        fsync_path(self.home.parent)


def _compile(slot: Path) -> None:
    """Compile the modules in a slot: the service cannot write byte code itself. Raises UpdateError: no Python runs."""
    command = [str(slot / "bin/python"), "-m", "compileall", "-q", str(slot / "lib")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        message = (done.stdout + done.stderr).strip()[-500:]
        raise UpdateError(f"the update does not run on this board: {message}; nothing was changed")


def _version(slot: Path) -> str:
    with contextlib.suppress(OSError, msgspec.DecodeError, KeyError, TypeError):
        return str(msgspec.json.decode((slot / DESCRIPTION).read_bytes())["version"])
    return "as in the image"
