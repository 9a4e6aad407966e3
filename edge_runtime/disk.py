"""What must have reached the disk before anybody counts on it."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Sees a file's contents, or a directory's names, onto the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
