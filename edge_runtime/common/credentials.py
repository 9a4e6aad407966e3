"""Secrets that systemd passes to a service as credentials (LoadCredential= in its unit)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# Content of a credential that the machine does not have. The units set it as the default (SetCredential=), because
# systemd logs a line for every missing credential without one. Not empty: an empty file is a mistake of its owner.
ABSENT = b"none"


def find_credential(name: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file of a credential; None if systemd passes none of this name."""
    path = Path(environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"), name)
    try:
        return None if path.read_bytes() == ABSENT else path
    except FileNotFoundError:
        return None
    except OSError:
        # It exists; whoever uses it reports why it cannot be read.
        return path
