"""`edge-runtime ngram-cache`: show or erase the n-gram cache on disk."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from edge_runtime.cli.draft_options import NGRAM_CACHE_DIRECTORY_NAME, ngram_cache_state_directory
from edge_runtime.cli.settings_options import add_config_option, read_settings
from edge_runtime.common.options import add_action
from edge_runtime.protocol.errors import InputError

SERVICE_DIRECTORY = Path("/var/lib/flexspec") / NGRAM_CACHE_DIRECTORY_NAME
HELP = "show or erase the cache of verified text that improves the draft"
DESCRIPTION = f"""\
With `serve --ngram-cache DIR`, or ngram_cache_directory or ngram_cache = true under [draft] in the configuration,
`edge-runtime serve` caches verified text, prompts included, as token ids. The cache improves the acceptance of a draft
that is not trained for what its target writes by now, and changes no answer. On disk it takes at most half a MB per
vocabulary, readable by its owner only.

The directory is the one given, else the configured one, else $STATE_DIRECTORY/{NGRAM_CACHE_DIRECTORY_NAME}, else \
{SERVICE_DIRECTORY}.

examples:
  edge-runtime ngram-cache show                    # texts and tokens by target version
  sudo edge-runtime ngram-cache erase              # a running service erases its copy after its next answer
  edge-runtime ngram-cache erase /srv/board/cache
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    show = add_action(actions, "show", _show, "print the number of texts and tokens by target version, but no content")
    erase = add_action(actions, "erase", _erase, "delete everything")
    for action in (show, erase):
        text = "directory of the cache (default: see `edge-runtime ngram-cache --help`)"
        action.add_argument("directory", nargs="?", type=Path, metavar="DIR", help=text)
        add_config_option(action)


async def _show(options: argparse.Namespace) -> int:
    from edge_runtime.ngram_cache import STORE_SUFFIX, NgramStore

    directory = _directory(options)
    for path in _list_files(directory):
        if path.suffix != STORE_SUFFIX:
            continue
        store = NgramStore(directory, path.stem)
        records = store.read()
        print(f"{path}: {len(records)} texts, {path.stat().st_size} bytes, {store.damaged + store.failures} unreadable")
        tokens: Counter[str] = Counter()
        for record in records:
            tokens[record.version] += len(record.ids)
        for version, count in tokens.items():
            print(f"  {version}: {count} tokens")
    return 0


async def _erase(options: argparse.Namespace) -> int:
    from edge_runtime.ngram_cache import erase_stores

    directory = _directory(options)
    try:
        count = erase_stores(directory) if _list_files(directory) else 0
    except OSError as error:
        raise InputError(
            f"cannot erase {directory}: {error.strerror or error}; run this as the service's user"
        ) from None
    print(f"{directory}: {count} files erased")
    return 0


def _list_files(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir()) if directory.exists() else []
    except OSError as error:
        raise InputError(f"cannot read {directory}: {error.strerror}; name the directory of the cache") from None


def _directory(options: argparse.Namespace) -> Path:
    """Return the directory of the cache. Raises InputError."""
    if options.directory:
        return Path(options.directory)
    return read_settings(options).draft.ngram_cache_directory or ngram_cache_state_directory() or SERVICE_DIRECTORY
