"""Applies flexspec.toml to the root file system: host name, Wi-Fi, SSH keys, credentials and the service's settings.

Everything is checked before anything is written. Writing twice does no harm, so an interruption is repaired by the
next boot.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from device_profiles.first_boot.board_file import (
    CREDENTIALS,
    STORED,
    ZONES,
    BoardFile,
    WifiTable,
    hide_secrets,
    service_text,
)
from edge_runtime.common.files import fsync_path, write_atomically
from edge_runtime.settings.loading import read_effective_settings

STATE = "var/lib/flexspec-board"
APPLIED, INSTALLED_BUNDLE = f"{STATE}/applied", f"{STATE}/bundle"
BUNDLE_STORE = "var/lib/flexspec/bundles"
CONFIGURATION = "etc/flexspec"
WIFI = "etc/NetworkManager/system-connections/flexspec-wifi.nmconnection"
CONNECTION_NAMESPACE = uuid.UUID("b5d3bd0e-0f66-4a53-8d2c-7e4d8a3b6f52")
REGULATORY_DOMAIN = "etc/modprobe.d/flexspec-wifi.conf"
CREDENTIAL_STORE = "etc/credstore"
SSH_KEYS = "root/.ssh/authorized_keys"
# The line of /etc/hosts for the machine's own name, as Debian writes it.
OWN_ADDRESS = "127.0.1.1"
NOTICE = "# Written from flexspec.toml on the boot partition; change that file.\n"


class BoardRoot:
    """The root file system of a board, and what this module has stored in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def is_current(self, text: bytes) -> bool:
        """Return whether this content of flexspec.toml has been applied already."""
        applied = self.root / APPLIED
        return applied.is_file() and applied.read_text() == _digest(text)

    def is_stored(self, name: str) -> bool:
        """Return whether the board has the secret `wifi.password` or `secrets.NAME`."""
        if name == "wifi.password":
            return self._stored_wifi_password() is not None
        return (self.root / CREDENTIAL_STORE / CREDENTIALS[name.removeprefix("secrets.")]).is_file()

    def apply(self, file: BoardFile, source: Path) -> list[str]:
        """Apply a flexspec.toml, which lies at `source`. Returns what was done, a phrase each. Raises OSError."""
        done = [*self._apply_board(file), *self._apply_wifi(file.tables.wifi), *self._apply_secrets(file)]
        self._write(f"{CONFIGURATION}/config.toml", NOTICE + service_text(file.text), 0o644)
        done += [f"copied {name}" for name in self._copy_named_files(file, source.parent)]
        done.append(f"verifier {', '.join(file.settings.settings.verifier.urls)}")
        return done

    def finish(self, file: BoardFile, source: Path) -> None:
        """Remove the secrets from flexspec.toml, and remember that it has been applied. Raises OSError."""
        hidden = hide_secrets(file.text).encode()
        if hidden != file.text.encode():
            overwrite(source, hidden)
        self._write(APPLIED, _digest(source.read_bytes()), 0o600)

    def install_bundle(self, archive: Path) -> str:
        """Install the draft in `archive` unless that was done before. Returns its name; empty if it was.

        Raises:
            OSError, FlexSpecError: it cannot be installed; the present one stays.
        """
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        installed = self.root / INSTALLED_BUNDLE
        if installed.is_file() and installed.read_text() == digest:
            return ""
        # Not at every boot: it imports numpy, and takes longer than everything else here.
        from edge_runtime.bundles.store import BundleStore

        configuration = self.root / CONFIGURATION / "config.toml"
        key = (
            read_effective_settings(configuration, {}).settings.draft.public_key_file
            if configuration.exists()
            else None
        )
        name = BundleStore(self.root / BUNDLE_STORE, key).install(archive).name
        self._write(INSTALLED_BUNDLE, digest, 0o600)
        return name

    def _apply_board(self, file: BoardFile) -> Iterator[str]:
        board, ssh = file.tables.board, file.tables.ssh
        if board.hostname:
            hosts = self.root / "etc/hosts"
            lines = hosts.read_text().splitlines() if hosts.exists() else ["127.0.0.1\tlocalhost", "::1\tlocalhost"]
            lines = [line for line in lines if line.split()[:1] != [OWN_ADDRESS]]
            self._write("etc/hosts", "\n".join([*lines, f"{OWN_ADDRESS}\t{board.hostname}"]) + "\n", 0o644)
            self._write("etc/hostname", board.hostname + "\n", 0o644)
            yield f"host name {board.hostname}"
        if board.timezone:
            link = self.root / "etc/localtime"
            link.unlink(missing_ok=True)
            link.symlink_to(ZONES / board.timezone)
            yield f"time zone {board.timezone}"
        if ssh.keys:
            self._write(SSH_KEYS, NOTICE + "".join(f"{key.strip()}\n" for key in ssh.keys), 0o600, 0o700)
            yield f"{len(ssh.keys)} SSH keys"

    def _apply_wifi(self, wifi: WifiTable) -> Iterator[str]:
        if not wifi.ssid:
            (self.root / WIFI).unlink(missing_ok=True)
            return
        password = self._stored_wifi_password() if wifi.password == STORED else wifi.password
        self._write(WIFI, _wifi_connection(wifi, password or ""), 0o600)
        self._write(REGULATORY_DOMAIN, f"{NOTICE}options cfg80211 ieee80211_regdom={wifi.country}\n", 0o644)
        yield f"Wi-Fi {wifi.ssid} ({wifi.country})"

    def _apply_secrets(self, file: BoardFile) -> Iterator[str]:
        for name, credential in CREDENTIALS.items():
            secret = getattr(file.tables.secrets, name)
            path = f"{CREDENTIAL_STORE}/{credential}"
            if not secret:
                (self.root / path).unlink(missing_ok=True)
            elif secret != STORED:
                self._write(path, secret, 0o600, 0o700)
                yield f"credential {credential}"

    def _copy_named_files(self, file: BoardFile, directory: Path) -> Iterator[str]:
        """Copy the files beside flexspec.toml that settings name, such as a certificate."""
        for key, origin in file.settings.origins.items():
            value = file.settings.settings.get(key)
            if (
                origin.kind == "file"
                and isinstance(value, Path)
                and value.is_relative_to(directory)
                and value.is_file()
            ):
                name = value.relative_to(directory)
                self._write(f"{CONFIGURATION}/{name}", value.read_bytes(), 0o644)
                yield str(name)

    def _stored_wifi_password(self) -> str | None:
        path = self.root / WIFI
        text = path.read_text() if path.is_file() else ""
        match = re.search(r"^psk=(.*)$", text, re.MULTILINE)
        return _unescape(match[1]) if match else None

    def _write(self, name: str, content: str | bytes, mode: int, directory_mode: int = 0o755) -> None:
        path = self.root / PurePosixPath(name)
        path.parent.mkdir(mode=directory_mode, parents=True, exist_ok=True)
        write_atomically(path, content.encode() if isinstance(content, str) else content, mode)
        # Whatever the umask is.
        path.chmod(mode)


def overwrite(path: Path, content: bytes) -> None:
    """Replace a file on a FAT partition so that its old content is gone from the blocks that it had.

    A flash card may keep a copy of overwritten blocks where only its maker's tools can read it. Raises OSError.
    """
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        file.write(b"\n" * size)
        file.flush()
        os.fsync(file.fileno())
    unfinished = path.with_name(path.name + ".new")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    fsync_path(path.parent)


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _wifi_connection(wifi: WifiTable, password: str) -> str:
    """Return a key file of NetworkManager."""
    identifier = uuid.uuid5(CONNECTION_NAMESPACE, wifi.ssid)
    ssid = ";".join(str(byte) for byte in wifi.ssid.encode()) + ";"
    security = f"\n[wifi-security]\nkey-mgmt=wpa-psk\npsk={_escape(password)}\n" if password else ""
    return (
        f"{NOTICE}[connection]\nid=flexspec-wifi\nuuid={identifier}\ntype=wifi\nautoconnect-retries=0\n\n"
        f"[wifi]\nmode=infrastructure\nssid={ssid}\nhidden={str(wifi.hidden).lower()}\n"
        f"{security}\n[ipv4]\nmethod=auto\n\n[ipv6]\nmethod=auto\n"
    )


def _escape(value: str) -> str:
    r"""Quote a value for a key file of GLib: a backslash is \\, a blank at the start \s."""
    escaped = value.replace("\\", "\\\\")
    return f"\\s{escaped[1:]}" if escaped.startswith(" ") else escaped


def _unescape(value: str) -> str:
    return re.sub(r"\\(.)", lambda match: " " if match[1] == "s" else match[1], value)
