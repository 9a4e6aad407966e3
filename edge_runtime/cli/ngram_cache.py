"""`edge-runtime memory`: what the board remembers on disk, and having it forget; and the options of who remembers."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.protocol.errors import InputError

# Every command of `edge-runtime` adds this parser; only this one should pay for what it needs.
if TYPE_CHECKING:
    from edge_runtime.ngram_cache.lookup import Memory
    from edge_runtime.protocol.bundle import Manifest

SERVICE = Path("/var/lib/flexspec/memory")
DESCRIPTION = f"""\
A board that serves remembers verified text, prompts too, as token ids: they help its frozen draft guess, and change no
answer. On disk: half a MB for each vocabulary at most, readable by its user alone. `serve --no-memory`, or [draft]
memory = false in the configuration, switches it off; `serve --memory DIR`, or [draft] memory_directory, says where.

The directory is the one given, else the configuration's, else $STATE_DIRECTORY/memory, else {SERVICE}.

examples:
  edge-runtime memory show                         # texts and tokens by target version
  sudo edge-runtime memory erase                   # a running service forgets when its next answer ends
  edge-runtime memory erase /srv/board/memory
"""


def add_options(parser: argparse.ArgumentParser, directory: Path | None = None) -> None:
    """The options that `memory_of` reads; `directory` where nobody names one."""
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--memory",
        type=Path,
        default=directory,
        metavar="DIR",
        help="remember verified text there, prompts too (default: [draft] memory_directory, else what systemd gives a "
        "service; else only in this process)",
    )
    memory.add_argument("--no-memory", action="store_true", help="the draft guesses without a memory of verified text")


def state_directory() -> Path | None:
    """Where a service of systemd may remember; None for other processes."""
    state = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(state) / "memory" if state else None


def memory_of(options: argparse.Namespace, manifest: Manifest) -> Memory | None:
    """The memory that the options ask for; None for none. A disk that fails is logged, and not needed."""
    from edge_runtime.ngram_cache.lookup import Memory
    from edge_runtime.ngram_cache.store import Store

    if options.no_memory:
        return None
    store = Store(options.memory, manifest.vocabulary.hash) if options.memory else None
    return Memory(manifest.architecture.vocabulary_size, store)


def add_parser(commands: Any) -> None:
    """Adds `memory` to argparse's sub-parsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "memory",
        help="show or erase what the board remembers of verified text",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser("show", help="how much is remembered, by target version; not what")
    show.set_defaults(run=_show)
    erase = actions.add_parser("erase", help="forget everything")
    erase.set_defaults(run=_erase)
    for action in (show, erase):
        action.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="default: see `memory --help`")
        action.add_argument("--config", type=Path, metavar="FILE", help="configuration (default: where services look)")


async def _show(options: argparse.Namespace) -> int:
    from edge_runtime.ngram_cache.store import SUFFIX, Store

    directory = _directory(options)
    for path in _there(directory):
        if path.suffix != SUFFIX:
            continue
        store = Store(directory, path.stem)
        records = store.read()
        print(f"{path}: {len(records)} texts, {path.stat().st_size} bytes, {store.damaged + store.failures} unreadable")
        tokens: Counter[str] = Counter()
        for record in records:
            tokens[record.version] += len(record.ids)
        for version, count in tokens.items():
            print(f"  {version}: {count} tokens")
    return 0


async def _erase(options: argparse.Namespace) -> int:
    from edge_runtime.ngram_cache.store import erase

    directory = _directory(options)
    try:
        count = erase(directory) if _there(directory) else 0
    except OSError as error:
        raise InputError(f"cannot erase {directory}: {error.strerror or error}; do it as the service's user") from None
    print(f"{directory}: {count} files erased")
    return 0


def _there(directory: Path) -> list[Path]:
    """The files in `directory`; none if it is not there. Raises InputError."""
    try:
        return sorted(directory.iterdir()) if directory.exists() else []
    except OSError as error:
        raise InputError(f"cannot read {directory}: {error.strerror}; name the memory's directory") from None


def _directory(options: argparse.Namespace) -> Path:
    """The directory that the options, or else the configuration, name. Raises InputError."""
    from edge_runtime.settings.loading import read_configuration

    if options.directory:
        return Path(options.directory)
    return read_configuration(options.config).draft.memory_directory or state_directory() or SERVICE
