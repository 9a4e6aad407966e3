"""Archives that are small and cost their reader much, and their installation by `edge-runtime bundle install`."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.emulator.test_bed import BUNDLE

MEBIBYTE = 1 << 20
# Several times what any bound allows, and written in a second.
DEFAULT_BYTES = 192 * MEBIBYTE
SPARSE_BYTES = 4096 * MEBIBYTE
# What an installation may take beyond that of a good bundle; chosen.
MAX_GROWTH_BYTES = 64 * MEBIBYTE
# What a store may hold while an archive of a small bundle is installed; several times the bundle.
MAX_STORE_BYTES = 64 * MEBIBYTE
INSTALL_SECONDS = 60.0


def write_huge_manifest(path: Path, size: int = DEFAULT_BYTES) -> None:
    """A manifest of zeros."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        _add_zeros(tar, "manifest.json", size)


def write_unnamed_file(path: Path, size: int = DEFAULT_BYTES) -> None:
    """A bundle after a file that its manifest does not name."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        _add_zeros(tar, "huge", size)
        tar.add(BUNDLE, ".")


def write_grown_member(path: Path, size: int = DEFAULT_BYTES) -> None:
    """A bundle whose graph is larger than its manifest says."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(BUNDLE / "manifest.json", "manifest.json")
        _add_zeros(tar, "model.onnx", size)


def write_sparse_member(path: Path, size: int = SPARSE_BYTES) -> None:
    """A hundred bytes that are a sparse file of gigabytes, without any data."""
    member = tarfile.TarInfo("model.onnx")
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    # Fields of GNU's sparse header: a map of (offset, size), here one empty piece at the end, and the real size.
    header[386:410] = _number(size) + _number(0)
    header[483:495] = _number(size)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(gzip.compress(bytes(header) + bytes(2 * tarfile.BLOCKSIZE), mtime=0))


def write_long_header(path: Path, size: int = DEFAULT_BYTES) -> None:
    """An extended header, which readers keep in memory, with a path of that many characters."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        _add_zeros(tar, "././@PaxHeader", size, tarfile.XHDTYPE)


def write_many_members(path: Path, count: int = 200_000) -> None:
    """Empty files without number."""
    header = tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT)
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(count):
            file.write(header)


HOSTILE_ARCHIVES: dict[str, Callable[[Path], None]] = {
    "a huge manifest": write_huge_manifest,
    "a huge file that the manifest does not name": write_unnamed_file,
    "a graph larger than recorded": write_grown_member,
    "a sparse file of 4 GB": write_sparse_member,
    "a huge header": write_long_header,
    "200,000 files": write_many_members,
}
# A bundle may be installed if what is beside it in the archive is left out.
INSTALLABLE = {"a huge file that the manifest does not name"}


def attack_installation(seconds: float) -> list[str]:
    """Install all archives, again while there is time. Return the broken guarantees."""
    end = time.monotonic() + seconds
    broken: dict[str, None] = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for number, write in enumerate(HOSTILE_ARCHIVES.values()):
            write(folder / f"{number}.tar.gz")
        _, usual_peak, _ = _install(BUNDLE, folder / "usual", lambda: None)
        for round_number in itertools.count():
            for number, name in enumerate(HOSTILE_ARCHIVES):
                # Each at least once.
                if round_number and time.monotonic() > end:
                    return list(broken)
                store = folder / "store"
                broken |= dict.fromkeys(_try(folder / f"{number}.tar.gz", store, name, usual_peak))
                shutil.rmtree(store, ignore_errors=True)
    raise AssertionError("the loop above ends by returning")


def _try(archive: Path, store: Path, name: str, usual_peak: int) -> list[str]:
    largest = 0

    def watch() -> None:
        nonlocal largest
        largest = max(largest, sum(path.stat().st_size for path in store.rglob("*") if path.is_file()))
        if largest > MAX_STORE_BYTES:
            raise TimeoutError("the store is too large")

    code, peak, errors = _install(archive, store, watch)
    broken = []
    if peak > usual_peak + MAX_GROWTH_BYTES:
        broken.append(f"installing {name} took {(peak - usual_peak) >> 20} MB of memory")
    if largest > MAX_STORE_BYTES:
        broken.append(f"installing {name} wrote more than {largest >> 20} MB")
    elif code == 0 and name not in INSTALLABLE:
        broken.append(f"{name} was installed")
    elif code < 0 or "Traceback" in errors:
        broken.append(f"installing {name} ended with {code}: {errors[-200:]!r}")
    return broken


def _install(source: Path, store: Path, watch: Callable[[], None]) -> tuple[int, int, str]:
    """Install; return the exit code (negative for a signal), the peak of resident bytes, and the standard error.

    Args:
        watch: called now and then. A TimeoutError kills the installation, as its time does.
    """
    command = [sys.executable, "-m", "edge_runtime.cli", "bundle", "install", str(source), "--store", str(store)]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        end = time.monotonic() + INSTALL_SECONDS
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            try:
                watch()
            except OSError as error:
                # A file that went between listing and looking; or the limit.
                if isinstance(error, TimeoutError) or time.monotonic() > end:
                    process.kill()
            if time.monotonic() > end:
                process.kill()
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        return process.returncode, usage.ru_maxrss * 1024, errors.read().decode(errors="replace")


def _add_zeros(tar: tarfile.TarFile, name: str, size: int, kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    tar.addfile(member, _Zeros(size))


def _number(value: int) -> bytes:
    """Twelve bytes of a header: octal digits."""
    return b"%011o\0" % value if value < 8**11 else b"\x80" + value.to_bytes(11, "big")


class _Zeros(io.RawIOBase):
    """A readable file of zeros."""

    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1) -> bytes:
        count = self._left if size < 0 else min(size, self._left)
        self._left -= count
        return bytes(count)
