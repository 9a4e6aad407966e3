"""Reproducible tar archives of parts of a root file system."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


class TreeArchive:
    """A tar archive that is being written: every entry belongs to root and has the same time stamp.

    Names are relative to the root of the file system.
    """

    def __init__(self, tar: tarfile.TarFile, epoch: int) -> None:
        self._tar = tar
        self._epoch = epoch

    def file(self, name: str, content: str | bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        data = content.encode() if isinstance(content, str) else content
        self._add(name, mode, tarfile.REGTYPE, size=len(data), content=io.BytesIO(data))

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(name, 0o777, tarfile.SYMTYPE, target=target)

    def directory(self, name: str, mode: int = 0o755) -> None:
        """Add a directory."""
        self._add(name, mode, tarfile.DIRTYPE)

    def tree(self, directory: Path, name: str) -> None:
        """Add `directory` with everything below it, in sorted order and with the modes of the files, as `name`."""
        self.directory(name)
        for path in sorted(directory.rglob("*")):
            self.copy(path, f"{name}/{path.relative_to(directory)}")

    def copy(self, path: Path, name: str) -> None:
        """Add a file, link or empty directory of this machine, with its mode."""
        mode = path.lstat().st_mode & 0o777
        if path.is_symlink():
            self.link(name, str(path.readlink()))
        elif path.is_dir():
            self.directory(name, mode)
        else:
            with path.open("rb") as content:
                self._add(name, mode, tarfile.REGTYPE, size=path.stat().st_size, content=content)

    def _add(
        self, name: str, mode: int, kind: bytes, *, target: str = "", size: int = 0, content: IO[bytes] | None = None
    ) -> None:
        entry = tarfile.TarInfo(name)
        entry.mode, entry.type, entry.linkname, entry.size = mode, kind, target, size
        entry.mtime, entry.uname, entry.gname = self._epoch, "root", "root"
        self._tar.addfile(entry, content)


@contextlib.contextmanager
def new_archive(path: Path, epoch: int, compression: str = "") -> Iterator[TreeArchive]:
    """Create a tar archive, of which every entry gets the time stamp `epoch`. A failure leaves no file.

    Args:
        compression: of tarfile, such as `xz`.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with tarfile.open(unfinished, f"w:{compression}", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
            yield TreeArchive(tar, epoch)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
