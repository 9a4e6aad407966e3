"""Checks of network settings that the board and the verifier share."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from urllib.parse import urlsplit

from edge_runtime.common.files import os_errors_as_input_errors
from edge_runtime.protocol.errors import InputError


def is_loopback(host: str) -> bool:
    """Return whether `host`, an address or `localhost`, can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_proxy(url: str) -> str:
    """Return `url` if it can be the URL of an HTTP proxy. Raises InputError."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        valid = valid and parts.path in ("", "/") and not parts.query and not parts.fragment
    except ValueError:
        valid = False
    if not valid:
        hidden = re.sub(r"//[^/@]*@", "//...@", url)
        raise InputError(f"{hidden!r} is not the URL of an HTTP proxy; write for instance http://proxy.example:3128")
    return url


def check_ca_file(path: Path) -> Path:
    """Return `path` if it is a readable PEM file of certificate authorities.

    Raises:
        InputError: the file cannot be read, or holds no certificate.
    """
    import ssl  # takes milliseconds, and most commands need no TLS

    with os_errors_as_input_errors(path):
        with path.open("rb") as file:
            file.read(1)
        try:
            ssl.create_default_context(cafile=str(path))
        except ssl.SSLError:
            text = f"{path} holds no certificate; give the authority's in PEM, as -----BEGIN CERTI..."
            raise InputError(text) from None
    return path
