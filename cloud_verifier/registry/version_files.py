"""The files that make up a target version: what is loaded, and nothing else.

`list_version_files` lists them. The version's identity is a hash of these files, the compatibility gate reads them, and
transformers and peft load a version from a directory that contains nothing else (`loading_directory`). Therefore
nothing is loaded that is not hashed, whatever else is beside it. Weights are safetensors: nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open

from cloud_verifier.registry.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from cloud_verifier.registry.delta import CHANGED_TENSORS_FILE, CHANGES_FILE
from cloud_verifier.registry.tokenizer_config import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from cloud_verifier.registry.tokenizer_config import SPECIAL_TOKENS_FILE, TOKENIZER_FILE
from edge_runtime.protocol.bundle import READ_CHUNK_BYTES
from edge_runtime.protocol.errors import TargetError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CONFIG_FILE, GENERATION_CONFIG_FILE = "config.json", "generation_config.json"
# What is loaded of a base besides its weights; only the configuration is required.
BASE_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)
# What is loaded of a version that is stored as its difference from a base, by the file that says so. A tokenizer of
# its own is loaded, too.
OWN_FILES = {
    CHANGES_FILE: (CHANGES_FILE, CHANGED_TENSORS_FILE),
    ADAPTER_CONFIG_FILE: (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE),
}
# Prefix of the temporary directories to load from, which a library's errors may show.
LOADING_PREFIX = "flexspec-loading-"
# Endings of files with weights, and a pickled file that has none.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".h5", ".msgpack", ".gguf", ".onnx")
TRAINING_ARGUMENTS_FILE = "training_args.bin"


class VersionFiles(msgspec.Struct, frozen=True):
    """The files of a version, each in the order of their names.

    Attributes:
        base: of the whole checkpoint that it is, or is based on.
        own: of its difference from the base; none for a checkpoint.
    """

    base: tuple[Path, ...]
    own: tuple[Path, ...]


def list_version_files(path: Path, base: Path) -> VersionFiles:
    """Every file that is loaded of the version at `path`, which is based on the checkpoint `base`.

    Raises:
        TargetError: a file is missing or damaged, or it is not clear which are to be loaded.
    """
    own = list_own_files(path) if path != base else []
    return VersionFiles(tuple(list_base_files(base)), tuple(own))


def list_own_files(path: Path) -> list[Path]:
    """Every file that is loaded of the adapter or the changes at `path`. Raises TargetError."""
    kinds = [kind for kind in OWN_FILES if (path / kind).exists()]
    if len(kinds) != 1:
        raise TargetError(f"{path} holds {' and '.join(kinds) or 'neither changes nor an adapter'}; keep one of them")
    files = [path / name for name in OWN_FILES[kinds[0]]]
    missing = next((file for file in files if not file.is_file()), None)
    if missing:
        raise TargetError(
            f"{path} has no {missing.name}{_only_others(path)}; save the adapter again with safe_serialization=True, "
            "or copy the version again"
        )
    return sorted([*files, *_present(path, [TOKENIZER_FILE])])


def list_base_files(base: Path) -> list[Path]:
    """Every file that is loaded of the checkpoint at `base`. Raises TargetError: see `find_tensor_files`."""
    index = [INDEX_FILE] if not (base / SINGLE_FILE).exists() else []
    return sorted({*find_tensor_files(base).values(), *_present(base, [*index, *BASE_FILES])})


def list_unused_weights(path: Path, base: Path) -> list[Path]:
    """Files with weights beside those of a version, which are never loaded. Raises TargetError."""
    files = list_version_files(path, base)
    found = {file for directory in (path, base) for file in directory.iterdir() if file.suffix in WEIGHT_SUFFIXES}
    return sorted(file for file in found - {*files.base, *files.own} if file.name != TRAINING_ARGUMENTS_FILE)


def version_hash(path: Path, base: Path) -> str:
    """12 hex digits of SHA-256 over the names and contents of all files that are loaded. Raises TargetError."""
    digest = hashlib.sha256()
    files = list_version_files(path, base)
    for role, listed in (("base", files.base), ("own", files.own)):
        for file in listed:
            try:
                with file.open("rb") as contents:
                    # With its length, no file can pass for two.
                    digest.update(f"{role}/{file.name}\0{file.stat().st_size}\0".encode())
                    while chunk := contents.read(READ_CHUNK_BYTES):
                        digest.update(chunk)
            except OSError as error:
                raise TargetError(f"{file} cannot be read ({error.strerror}); copy the version again") from None
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def loading_directory(files: Iterable[Path]) -> Iterator[Path]:
    """A temporary directory with links to `files` alone, from which a library can load nothing else."""
    with tempfile.TemporaryDirectory(prefix=LOADING_PREFIX) as name:
        for file in files:
            Path(name, file.name).symlink_to(file.absolute())
        yield Path(name)


def find_tensor_files(directory: Path) -> dict[str, Path]:
    """By tensor name: the file from which transformers loads it. One file comes before an index; others are not read.

    Raises:
        TargetError: there is no safetensors checkpoint, or one of its files is missing or damaged.
    """
    index = directory / INDEX_FILE
    if (directory / SINGLE_FILE).exists():
        return dict.fromkeys(_stored_names(directory / SINGLE_FILE), directory / SINGLE_FILE)
    if not index.exists():
        raise TargetError(_why_no_weights(directory))
    try:
        listed = {
            str(name): directory / str(file)
            for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TargetError(f"{index} cannot be read ({error!r}); copy the model again") from None
    files = sorted(set(listed.values()))
    outside = next((file for file in files if file.parent != directory), None)
    if outside:
        raise TargetError(f"{index} names {str(outside)!r}, which is not beside it; copy the model again")
    pickled = next((file for file in files if file.suffix != ".safetensors"), None)
    if pickled:
        raise TargetError(f"{index} names {pickled.name!r}, which is not safetensors; copy the model again")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise TargetError(f"{directory} lacks {', '.join(missing[:3])}; copy the model again")
    stored: dict[str, Path] = {}
    for file in files:
        for name in _stored_names(file):
            # transformers reads a listed file whole, so that a second copy would replace the first.
            if stored.setdefault(name, file) != file:
                raise TargetError(f"{file} and {stored[name].name} both hold {name}; copy the model again")
    for name, file in listed.items():
        if stored.get(name) != file:
            raise TargetError(f"{file} has no tensor {name}, although {index.name} says so; copy the model again")
    return listed


def _present(directory: Path, names: Iterable[str]) -> list[Path]:
    return [directory / name for name in names if (directory / name).is_file()]


def _stored_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise TargetError(f"{file} is damaged or truncated ({error}); copy the model again") from None


def _why_no_weights(directory: Path) -> str:
    if any(directory.glob("*-of-*.safetensors")):
        return f"{directory} lacks {INDEX_FILE}; copy the model again"
    return (
        f"{directory} has no safetensors weights ({SINGLE_FILE} or {INDEX_FILE}){_only_others(directory)}; save the "
        "model again with safe_serialization=True"
    )


def _only_others(directory: Path) -> str:
    """A remark on the weights that are there instead of those that could be loaded."""
    names = sorted(path.name for path in directory.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    others = [name for name in names if name != TRAINING_ARGUMENTS_FILE]
    pickled = [name for name in others if name.endswith(PICKLE_SUFFIXES)]
    if pickled:
        return f", only {pickled[0]!r}, and pickled weights are never loaded"
    return f", only {others[0]!r}, which is not loaded" if others else ""
