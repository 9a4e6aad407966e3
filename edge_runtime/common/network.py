"""Checks of network settings that the board and the verifier share."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
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


def is_address(text: str) -> bool:
    """Return whether `text` is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def check_host_name(name: str) -> str:
    """Return `name` if a Host header can have it, without port. Raises InputError."""
    if not re.fullmatch(r"[0-9A-Za-z_.-]+", name):
        raise InputError(f"{name!r} is not a host name; write for instance raspberrypi.local, without a port")
    return name


class HostNames:
    """The names by which this machine calls itself.

    A server that listens on loopback and asks for no key answers only for these: a foreign web page can let its own
    host name resolve to this machine (DNS rebinding), and its requests then carry that name. It has no power over this
    machine's own names.
    """

    def __init__(self, further: Iterable[str] = ()) -> None:
        """
        Args:
            further: names in addition to localhost and the machine's own, also with .local.
        """
        name = socket.gethostname().lower()
        self._names = {name, f"{name.partition('.')[0]}.local", *(host.lower() for host in further)}

    def foreign_name(self, header: str) -> str | None:
        """Return the name in a Host header if it is not one of these; None if it is, or if there is no name."""
        name = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
        name = name.lower().rstrip(".")
        is_own = not name or name in self._names or name.endswith(".localhost") or is_loopback(name)
        return None if is_own else name


def is_http_url(url: str) -> bool:
    """Return whether `url` names a server of HTTP: its scheme, a host, and a port that exists, if it has one."""
    try:
        parts = urlsplit(url)
        # The property raises ValueError for what is no number below 65536.
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and named and not re.search(r"\s", url)


def check_proxy(url: str) -> str:
    """Return `url` if it can be the URL of an HTTP proxy. Raises InputError."""
    parts = urlsplit(url) if is_http_url(url) else None
    if parts is None or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise InputError(
            f"{hide_password(url)!r} is not the URL of an HTTP proxy; write for instance http://proxy.example:3128"
        )
    return url


def hide_password(url: str) -> str:
    """Return `url` without its user and password, for messages."""
    return re.sub(r"//[^/@]*@", "//...@", url)


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
