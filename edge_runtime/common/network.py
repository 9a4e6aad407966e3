"""Checks of network settings that the board and the verifier share."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from edge_runtime.protocol.errors import InputError


def is_loopback(host: str) -> bool:
    """Return whether `host`, an address or `localhost`, can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_ca_file(path: Path) -> Path:
    """Return `path` if it is a readable PEM file of certificate authorities.

    Raises:
        InputError: the file cannot be read, or holds no certificate.
    """
    import ssl  # takes milliseconds, and most commands need no TLS

    try:
        with path.open("rb") as file:
            file.read(1)
        ssl.create_default_context(cafile=str(path))
    except ssl.SSLError:
        raise InputError(f"{path} holds no certificate; give the authority's in PEM, as -----BEGIN CERTI...") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; correct the path, or its permissions") from None
    except ValueError as error:
        raise InputError(f"{str(path)!r} is no path: {error}") from None
    return path
