"""The bundle store of a board: a new bundle replaces the old one atomically or not at all.

    NAME@FINGERPRINT/   a bundle; the fingerprint is that of its manifest, which covers all files
    current, previous   symbolic links to two of them
    .lock               locked by the process that changes the store
    .scratch-*          temporary files of an installation; those of a killed one are removed by the next

A bundle is copied into the store, verified (signature, hashes, self-test in another process), synced to disk, renamed
into place and only then linked, so that a reader never sees a partial bundle.
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
from edge_runtime.bundles.self_test import SelfTestReport, run_self_test
from edge_runtime.bundles.signatures import SIGNATURE, BundleUntrusted, check_signature, read_public_keys
from edge_runtime.common.files import fsync_path
from edge_runtime.protocol.bundle import MANIFEST_NAME, Bundle, Manifest, read_bundle
from edge_runtime.protocol.errors import BundleCorrupt, BundleError, BundleMissing, FlexSpecError, InputError

if TYPE_CHECKING:
    from edge_runtime.settings import DraftSettings

logger = logging.getLogger(__name__)

CURRENT, PREVIOUS, LOCK, SCRATCH = "current", "previous", ".lock", ".scratch-"
# A bundle's name becomes a directory name.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")

Signature = Literal["valid", "wrong", "none", "unchecked"]


class StoredBundle(msgspec.Struct, frozen=True):
    """One bundle of a store.

    Attributes:
        name: directory name, NAME@FINGERPRINT.
        state: `current`, `previous` or empty.
        bytes: size of all files that the manifest names.
        installed: time of installation, in seconds since 1970.
        signature: `unchecked` if there is a signature but no configured key.
        weights, shared: from the manifest; empty if it cannot be read.
        problem: why it cannot be used, found without hashing its files; empty if none was found.
    """

    name: str
    state: str
    bytes: int
    installed: float
    signature: Signature
    weights: str = ""
    shared: str = ""
    problem: str = ""


class Installation(msgspec.Struct, frozen=True):
    """Result of an installation.

    Attributes:
        name: name of the bundle in the store.
        left_out: files of the source that the manifest does not name.
        removed: old bundles that were removed.
    """

    name: str
    self_test: SelfTestReport
    left_out: list[str]
    removed: list[str]


class BundleStore:
    """A store of bundles in a directory; it need not exist before the first installation."""

    def __init__(self, path: Path, public_key_file: Path | None = None) -> None:
        """
        Args:
            public_key_file: PEM file of public keys, one of which must have signed a bundle; None requires no
                signature.

        Raises:
            InputError: the keys cannot be read.
        """
        self.path = path
        self._keys = read_public_keys(public_key_file) if public_key_file is not None else []

    def install(self, source: Path, *, use: bool = True, keep: int = 1) -> Installation:
        """Install the bundle at `source`, a directory or a tar archive, into the store.

        Args:
            use: make it the current bundle.
            keep: number of other bundles to keep, at least 1, the previous one included.

        Raises:
            InputError: `keep` is less than 1.
            BundleError: the bundle is incomplete, untrusted or does not work here, or the store cannot be written.
        """
        if keep < 1:
            raise InputError(f"--keep {keep}: must be at least 1, for the previous bundle")
        with self._exclusive() as scratch:
            try:
                work, left_out = fetch(source, scratch, self._keys)
                bundle, self_test = self.check(work)
                name = _name(bundle.manifest, work)
            except BundleError as error:
                # The temporary copy is removed, so the error names the source instead.
                message = re.sub(rf"{re.escape(str(scratch))}/\w+", lambda _: str(source), str(error))
                raise type(error)(f"{message}; nothing was installed") from error
            place = self.path / name
            _publish_files(work)
            if not self._is_valid(place):
                if place.exists():
                    place.rename(scratch / "replaced")
                work.rename(place)
                fsync_path(self.path)
            if use:
                self._switch(name)
            removed = self._prune(keep, name)
        return Installation(name, self_test, left_out, removed)

    def use(self, name: str) -> str:
        """Make a bundle the current one after verifying it. Returns its full name. Raises BundleError."""
        with self._exclusive():
            full = self.find(name)
            self.check(self.path / full)
            self._switch(full)
        return full

    def remove(self, name: str) -> str:
        """Remove a bundle. Returns its full name.

        Raises:
            InputError: it is the current one.
            BundleError: no bundle has this name, or the store cannot be written.
        """
        with self._exclusive() as scratch:
            full = self.find(name)
            if full == self.link(CURRENT):
                raise InputError(f"{full} is the current bundle; `edge-runtime bundle use` another one first")
            if full == self.link(PREVIOUS):
                (self.path / PREVIOUS).unlink()
            (self.path / full).rename(scratch / "removed")
        return full

    def check(self, path: Path) -> tuple[Bundle, SelfTestReport]:
        """Verify signature and hashes of the bundle at `path` and run its self-test. Raises BundleError."""
        return self.read(path), run_self_test(path)

    def read(self, path: Path) -> Bundle:
        """Verify signature and hashes of the bundle at `path`, in the store or elsewhere. Raises BundleError."""
        if self._keys:
            check_signature(path, self._keys)
        return read_bundle(path)

    def find(self, name: str) -> str:
        """The full name of a bundle, given NAME@FINGERPRINT, NAME, FINGERPRINT, `current` or `previous`.

        Raises:
            BundleMissing: none or several match.
        """
        linked = self.link(name) if name in (CURRENT, PREVIOUS) else None
        names = self.names()
        found = [full for full in names if full == linked or name in (full, *full.split("@"))]
        if len(found) == 1:
            return found[0]
        several = f"several bundles are called {name!r}" if found else f"there is no bundle {name!r} in {self.path}"
        raise BundleMissing(f"{several}: {', '.join(found or names) or 'it is empty'}; name one of them")

    def locate(self, name: str) -> Path:
        """The directory of a bundle: of one in the store (see `find`), else the directory of this path.

        Raises:
            BundleMissing: there is neither.
        """
        if "/" in name:
            return Path(name)
        try:
            return self.path / self.find(name)
        except BundleMissing:
            if Path(name).is_dir():
                return Path(name)
            raise

    def names(self) -> list[str]:
        """Full names of all bundles, newest first. Raises StoreError."""
        try:
            paths = [path for path in self.path.iterdir() if "@" in path.name and not path.name.startswith(".")]
            return [path.name for path in sorted(paths, key=lambda path: (-path.stat().st_mtime, path.name))]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot read the bundle store {self.path}: {error.strerror}") from None

    def link(self, which: str) -> str | None:
        """The full name of the `current` or `previous` bundle, or None. Raises StoreError."""
        try:
            name = (self.path / which).readlink().name
            return name if (self.path / name).is_dir() else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read the bundle store {self.path}: {error.strerror}") from None

    def entries(self) -> list[StoredBundle]:
        """All bundles, newest first. Raises StoreError."""
        current, previous = self.link(CURRENT), self.link(PREVIOUS)
        entries = []
        for name in self.names():
            path = self.path / name
            state = CURRENT if name == current else PREVIOUS if name == previous else ""
            signature = self._signature(path)
            try:
                manifest = read_bundle(path, verify=False).manifest
            except BundleError as error:
                entries.append(StoredBundle(name, state, 0, path.stat().st_mtime, signature, problem=str(error)))
                continue
            size = sum(record.bytes for record in manifest.files.values())
            weights = f"{manifest.graph.kind} {manifest.graph.weights}"
            problem = "" if not self._keys or signature == "valid" else "not signed by a configured key"
            details = {"weights": weights, "shared": manifest.shared.identity, "problem": problem}
            entries.append(StoredBundle(name, state, size, path.stat().st_mtime, signature, **details))
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

    def _is_valid(self, path: Path) -> bool:
        """Whether there is a complete and trusted bundle at `path`."""
        try:
            self.read(path)
        except BundleError:
            return False
        return True

    def _switch(self, name: str) -> None:
        current = self.link(CURRENT)
        if current == name:
            return
        if current is not None:
            self._link(PREVIOUS, current)
        self._link(CURRENT, name)

    def _link(self, which: str, name: str) -> None:
        link = self.path / f"{SCRATCH}{which}"
        link.symlink_to(name)
        link.replace(self.path / which)
        fsync_path(self.path)

    def _prune(self, keep: int, name: str) -> list[str]:
        """Keep the current bundle and `keep` others: the previous one, `name`, then the newest. Remove the rest."""
        linked = (self.link(CURRENT), self.link(PREVIOUS), name)
        old = [full for full in self.names() if full not in linked]
        kept_by_link = len({full for full in linked if full is not None}) - 1
        removed = old[max(0, keep - kept_by_link) :]
        for full in removed:
            # Renamed first, so that it disappears atomically.
            (self.path / full).rename(self.path / f"{SCRATCH}{full}")
        return removed

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[Path]:
        """Lock the store and yield an empty temporary directory in it, which is removed afterwards.

        Raises StoreError if writing fails.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                # The kernel releases the lock when the process ends, however it ends.
                lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.warning("waiting for another change of %s to end", self.path)
                    fcntl.flock(lock, fcntl.LOCK_EX)
                # With the lock held, temporary files can only be left over from a killed process.
                self._clear()
                stack.callback(self._clear)
                yield Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.path))
            except OSError as error:
                raise StoreError(
                    f"cannot write to the bundle store {self.path}: {error.strerror or error}; "
                    "`edge-runtime bundle list` shows what is installed"
                ) from error

    def _clear(self) -> None:
        for path in self.path.glob(f"{SCRATCH}*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def current_bundle(store: BundleStore) -> Bundle:
    """The current bundle after verification; if it fails, the previous one with a warning in the log.

    It is read by its own name, not through the link, so that a concurrent switch cannot mix two bundles.

    Raises:
        BundleError: neither can be used, or the store is empty.
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
        raise BundleCorrupt(f"no bundle in {store.path} is usable: {'; '.join(failures)}; install another one")
    raise BundleMissing(f"{store.path} has no current bundle: install one with `edge-runtime bundle install`")


def configured_bundle(draft: DraftSettings) -> Bundle:
    """The bundle that the configuration names (signed, if a key is configured), else the current one of its store.

    Raises:
        BundleError: it cannot be used.
        InputError: the key cannot be read.
    """
    store = BundleStore(draft.store, draft.public_key_file)
    return current_bundle(store) if draft.bundle is None else store.read(draft.bundle)


def _name(manifest: Manifest, path: Path) -> str:
    if not NAME.fullmatch(manifest.name):
        raise BundleCorrupt(
            f"the bundle is named {manifest.name!r}: use letters, digits, dots and dashes, and export it again"
        )
    return f"{manifest.name}@{hashlib.sha256((path / MANIFEST_NAME).read_bytes()).hexdigest()[:16]}"


def _publish_files(directory: Path) -> None:
    """Make the files of `directory` world-readable and sync them to disk."""
    directory.chmod(0o755)
    for path in directory.iterdir():
        path.chmod(0o644)
        fsync_path(path)
    fsync_path(directory)
