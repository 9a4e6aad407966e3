"""The bundles on a board: a store in which a new one replaces the old one at once and whole, or not at all.

    NAME@FINGERPRINT/   a bundle; the fingerprint is that of its manifest, and so of all its files
    current, previous   links to two of them
    .lock               held by whoever changes the store
    .scratch-*          of an installation in progress, or of one that was killed: the next one clears them away

A bundle is copied beside the others, checked (signature, hashes, self-test in another process), written through to the
disk, renamed into place, and only then linked. Who looks at the store at any moment sees whole bundles only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from edge_runtime.bundles.archive import StoreError, fetch
from edge_runtime.bundles.self_test import Examination, examine
from edge_runtime.bundles.signatures import SIGNATURE, BundleUntrusted, check_signature, read_public_keys
from edge_runtime.common.files import sync
from edge_runtime.protocol.bundle import MANIFEST, Bundle, Manifest, read_bundle
from edge_runtime.protocol.errors import BundleCorrupt, BundleError, BundleMissing, FlexSpecError, InputError

if TYPE_CHECKING:
    from edge_runtime.settings.loading import Draft

logger = logging.getLogger(__name__)

CURRENT, PREVIOUS, LOCK, SCRATCH = "current", "previous", ".lock", ".scratch-"
# A bundle's name becomes that of a directory.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")

Signature = Literal["valid", "wrong", "none", "unchecked"]


class Entry(msgspec.Struct, frozen=True):
    """One bundle of a store.

    Attributes:
        name: of its directory, NAME@FINGERPRINT.
        state: `current`, `previous` or empty.
        bytes: of all files that the manifest names.
        installed: when, in seconds since 1970.
        signature: `unchecked` is a signature that no configured key can judge.
        weights, shared: from the manifest; empty where it cannot be read.
        problem: why it cannot be used, as far as that shows without hashing its files; empty if it can.
    """

    name: str
    state: str
    bytes: int
    installed: float
    signature: Signature
    weights: str = ""
    shared: str = ""
    problem: str = ""


class Installed(msgspec.Struct, frozen=True):
    """What an installation came to.

    Attributes:
        name: of the bundle in the store.
        examination: its self-test.
        left_out: files of the source that the manifest does not name.
        removed: old bundles that made room.
    """

    name: str
    examination: Examination
    left_out: list[str]
    removed: list[str]


class BundleStore:
    """A store of bundles in a directory; it need not exist before the first installation.

    Attributes:
        path: of the store.
    """

    def __init__(self, path: Path, public_key_file: Path | None = None) -> None:
        """
        Args:
            public_key_file: keys of which one must have signed a bundle; None asks for no signature.

        Raises:
            InputError: the keys cannot be read.
        """
        self.path = path
        self._keys = read_public_keys(public_key_file) if public_key_file is not None else []

    def install(self, source: Path, *, use: bool = True, keep: int = 1) -> Installed:
        """Puts the bundle at `source`, a directory or a tar archive, into the store.

        Args:
            use: make it the current one.
            keep: how many others to keep, the previous one included, at least 1.

        Raises:
            InputError: `keep` is less than 1.
            BundleError: the bundle is not whole, not trusted, or does not work here; or the store cannot be written.
        """
        if keep < 1:
            raise InputError(f"--keep {keep}: must be at least 1, for the previous bundle")
        with self._changing() as scratch:
            try:
                work, left_out = fetch(source, scratch)
                bundle, examination = self.check(work)
                name = _name(bundle.manifest, work)
            except BundleError as error:
                # What is wrong with the copy is wrong with the source, and only that is there to be looked at.
                message = re.sub(rf"{re.escape(str(scratch))}/\w+", lambda _: str(source), str(error))
                raise type(error)(f"{message}; nothing was installed") from error
            place = self.path / name
            _write_through(work)
            if not self._sound(place):
                if place.exists():
                    place.rename(scratch / "replaced")
                work.rename(place)
                sync(self.path)
            if use:
                self._switch(name)
            removed = self._prune(keep, name)
        return Installed(name, examination, left_out, removed)

    def use(self, name: str) -> str:
        """Makes a bundle the current one, once it has passed all checks. Returns its full name. Raises BundleError."""
        with self._changing():
            full = self.find(name)
            self.check(self.path / full)
            self._switch(full)
        return full

    def remove(self, name: str) -> str:
        """Removes a bundle. Returns its full name.

        Raises:
            InputError: it is the current one.
            BundleError: there is none of this name, or the store cannot be written.
        """
        with self._changing() as scratch:
            full = self.find(name)
            if full == self.link(CURRENT):
                raise InputError(f"{full} is in use; `edge-runtime bundle use` another one first")
            if full == self.link(PREVIOUS):
                (self.path / PREVIOUS).unlink()
            (self.path / full).rename(scratch / "removed")
        return full

    def check(self, path: Path) -> tuple[Bundle, Examination]:
        """The bundle at `path`, once signature, hashes and self-test are found right. Raises BundleError."""
        if self._keys:
            check_signature(path, self._keys)
        return read_bundle(path), examine(path)

    def find(self, name: str) -> str:
        """The full name of a bundle: NAME@FINGERPRINT, `current`, `previous`, or a part in front of or behind the @.

        Raises:
            BundleMissing: there is none, or there are several.
        """
        linked = self.link(name) if name in (CURRENT, PREVIOUS) else None
        names = self.names()
        found = [full for full in names if full == linked or name in (full, *full.split("@"))]
        if len(found) == 1:
            return found[0]
        several = f"several bundles are called {name!r}" if found else f"there is no bundle {name!r} in {self.path}"
        raise BundleMissing(f"{several}: {', '.join(found or names) or 'it is empty'}; name one of them")

    def names(self) -> list[str]:
        """Full names of all bundles, the newest first. Raises StoreError."""
        try:
            paths = [path for path in self.path.iterdir() if "@" in path.name and not path.name.startswith(".")]
            return [path.name for path in sorted(paths, key=lambda path: (-path.stat().st_mtime, path.name))]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot read the bundle store {self.path}: {error.strerror}") from None

    def link(self, which: str) -> str | None:
        """The full name of the `current` or `previous` bundle; None where there is none. Raises StoreError."""
        try:
            name = (self.path / which).readlink().name
            return name if (self.path / name).is_dir() else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read the bundle store {self.path}: {error.strerror}") from None

    def entries(self) -> list[Entry]:
        """All bundles, the newest first. Raises StoreError."""
        current, previous = self.link(CURRENT), self.link(PREVIOUS)
        entries = []
        for name in self.names():
            path = self.path / name
            state = CURRENT if name == current else PREVIOUS if name == previous else ""
            signature = self._signature(path)
            try:
                manifest = read_bundle(path, verify=False).manifest
            except BundleError as error:
                entries.append(Entry(name, state, 0, path.stat().st_mtime, signature, problem=str(error)))
                continue
            size = sum(record.bytes for record in manifest.files.values())
            problem = "" if not self._keys or signature == "valid" else "not signed by a configured key"
            entries.append(
                Entry(
                    name,
                    state,
                    size,
                    path.stat().st_mtime,
                    signature,
                    f"{manifest.graph.kind} {manifest.graph.weights}",
                    manifest.shared.identity,
                    problem,
                )
            )
        return entries

    def _signature(self, path: Path) -> Signature:
        if not os.path.lexists(path / SIGNATURE):
            return "none"
        if not self._keys:
            return "unchecked"
        try:
            check_signature(path, self._keys)
        except BundleUntrusted:
            return "wrong"
        return "valid"

    def _sound(self, path: Path) -> bool:
        """Whether a whole and trusted bundle is at `path`."""
        try:
            if self._keys:
                check_signature(path, self._keys)
            read_bundle(path)
        except BundleError:
            return False
        return True

    def _switch(self, name: str) -> None:
        current = self.link(CURRENT)
        if current == name:
            return
        if current is not None:
            self._point(PREVIOUS, current)
        self._point(CURRENT, name)

    def _point(self, which: str, name: str) -> None:
        link = self.path / f"{SCRATCH}{which}"
        link.symlink_to(name)
        link.replace(self.path / which)
        sync(self.path)

    def _prune(self, keep: int, name: str) -> list[str]:
        """Removes all but the newest `keep` bundles besides the current one; the previous one and `name` stay."""
        linked = (self.link(CURRENT), self.link(PREVIOUS), name)
        old = [full for full in self.names() if full not in linked]
        spared = len({full for full in linked if full is not None}) - 1
        removed = old[max(0, keep - spared) :]
        for full in removed:
            # Renamed first, so that it is gone at once.
            (self.path / full).rename(self.path / f"{SCRATCH}{full}")
        return removed

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Path]:
        """Keeps others from changing the store meanwhile; gives an empty directory in it, which then vanishes.

        What fails to be written raises StoreError.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                # Released by the kernel with the process, however that ends.
                lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.warning("waiting for another change of %s to end", self.path)
                    fcntl.flock(lock, fcntl.LOCK_EX)
                # Nobody else is at work, so what lies about was left by a process that is gone.
                self._clear()
                stack.callback(self._clear)
                yield Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.path))
            except OSError as error:
                raise StoreError(
                    f"cannot write to the bundle store {self.path}: {error.strerror or error}; "
                    "nothing was changed but what is listed by `edge-runtime bundle list`"
                ) from error

    def _clear(self) -> None:
        for path in self.path.glob(f"{SCRATCH}*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def current_bundle(store: BundleStore) -> Bundle:
    """The current bundle once it has passed all checks; else the previous one, with a warning in the log.

    It is read through its own name, so that a switch meanwhile does not mix two bundles.

    Raises:
        BundleError: neither can be used, or there is none.
    """
    failures = []
    for which in (CURRENT, PREVIOUS):
        name = store.link(which)
        if name is None:
            continue
        try:
            bundle, _ = store.check(store.path / name)
        except FlexSpecError as error:
            failures.append(f"{which} bundle {name}: {error}")
            continue
        if failures:
            logger.warning(
                "the %s; falling back to the previous one, %s; `edge-runtime bundle use previous` makes that permanent",
                failures[0],
                name,
            )
        return bundle
    if failures:
        raise BundleCorrupt(f"no bundle in {store.path} can be used: {'; '.join(failures)}; install another one")
    raise BundleMissing(f"no bundle is in use in {store.path}: `edge-runtime bundle install` one")


def configured_bundle(draft: Draft) -> Bundle:
    """The bundle that a configuration names, its signature checked where a key is configured, or else its store's.

    Raises:
        BundleError: it cannot be used.
        InputError: the key cannot be read.
    """
    if draft.bundle is None:
        return current_bundle(BundleStore(draft.store, draft.public_key_file))
    if draft.public_key_file is not None:
        check_signature(draft.bundle, read_public_keys(draft.public_key_file))
    return read_bundle(draft.bundle)


def _name(manifest: Manifest, path: Path) -> str:
    if not NAME.fullmatch(manifest.name):
        raise BundleCorrupt(
            f"the bundle calls itself {manifest.name!r}: use letters, digits, dots and dashes, and export it again"
        )
    return f"{manifest.name}@{hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:16]}"


def _write_through(directory: Path) -> None:
    """Makes everybody able to read the files of `directory`, and sees them onto the disk."""
    directory.chmod(0o755)
    for path in directory.iterdir():
        path.chmod(0o644)
        sync(path)
    sync(directory)
