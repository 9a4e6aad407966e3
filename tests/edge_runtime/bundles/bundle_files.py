"""Bundles that tests change, commands that they run, and checks of a store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_runtime.bundles.store import BundleStore
from edge_runtime.protocol.bundle import MANIFEST_NAME, Manifest, read_bundle, record_file, write_manifest
from tests.edge_runtime import commands


def run(*arguments: str, preexec_fn: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `edge-runtime bundle`; with `preexec_fn`, which cannot be undone, in a process of its own."""
    if preexec_fn is None:
        return commands.run("bundle", *arguments)
    command = [sys.executable, "-m", "edge_runtime.cli", "bundle", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=preexec_fn)


def start(store: Path, source: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edge_runtime.cli", "bundle", "install", str(source), "--store", str(store)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_manifest(bundle: Path) -> Manifest:
    return msgspec.json.decode((bundle / MANIFEST_NAME).read_bytes(), type=Manifest)


def change(bundle: Path, **fields: object) -> Path:
    """Writes the manifest of `bundle` anew, with the hashes that its files have now and with other `fields`."""
    manifest = read_manifest(bundle)
    files = {name: record_file(bundle / name) for name in manifest.files}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files, **fields))
    return bundle


def spoil(path: Path) -> None:
    """Another byte in the middle of the file, its length the same."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def assert_whole(store: BundleStore) -> None:
    """Everything that shows in the store is a whole bundle, or a link to one."""
    for path in store.path.iterdir():
        if not path.name.startswith("."):
            read_bundle(path)


def assert_clean(store: BundleStore) -> None:
    assert {path.name for path in store.path.glob(".*")} <= {".lock"}
    assert_whole(store)
