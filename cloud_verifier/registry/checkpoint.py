"""A target version on disk: what it is stored as, on which base, and what identifies it. No model is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig

from cloud_verifier.registry.catalog import Kind
from cloud_verifier.registry.delta import CHANGES, base_name, changed_names
from edge_runtime.protocol.bundle import READ_SIZE, fingerprint, shared_names, vocabulary_hash
from edge_runtime.protocol.errors import TargetError


def base_of(path: Path) -> Path:
    """The base checkpoint's directory: `path` itself unless it holds a PEFT adapter, or changes to a base."""
    if not path.is_dir():
        raise TargetError(f"no target at {path}: give the directory of a Hugging Face checkpoint or PEFT adapter")
    note = path / "adapter_config.json"
    if (path / CHANGES).exists():
        note, name = path / CHANGES, base_name(path)
    elif not note.exists():
        return path
    else:
        try:
            name = json.loads(note.read_text())["base_model_name_or_path"]
            path / name
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TargetError(f"{note} does not name a base model: {error!r}") from None
    for base in (path / name, Path(name)):
        if base.is_dir():
            return base.resolve()
    raise TargetError(f"{note} names the base model {name!r}, which is not a directory beside it")


def kind_of(path: Path, base: Path) -> Kind:
    """How the version at `path`, on `base`, is stored."""
    if (path / CHANGES).exists():
        return "changes"
    return "checkpoint" if path.resolve() == base else "adapter"


def config_of(base: Path) -> Any:
    """The configuration of the checkpoint at `base`. Raises TargetError."""
    try:
        if not (base / "config.json").is_file():
            raise OSError("it has no config.json")
        return AutoConfig.from_pretrained(base)
    except Exception as error:
        raise TargetError(f"{base} is not a Hugging Face model directory: {error}") from None


def check_whole(base: Path) -> None:
    """Raises TargetError unless all weights are here, at their full length."""
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise TargetError(f"{base} has no safetensors weights; save the model again with safe_serialization=True")
    for index in base.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(f"{index} cannot be read ({error!r}); copy the model again") from None
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise TargetError(f"{base} lacks {', '.join(missing[:3])}; copy the model again")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise TargetError(f"{file} is damaged or was cut short ({error}); copy the model again") from None


def tokenizer_of(path: Path, base: Path) -> Tokenizer:
    """The tokenizer of the version at `path`, or else of its base.

    Raises:
        TargetError: there is none.
    """
    for directory in (path, base):
        file = directory / "tokenizer.json"
        if file.exists():
            try:
                return Tokenizer.from_file(str(file))
            except Exception as error:  # tokenizers raises bare Exception
                raise TargetError(f"{file} is not a tokenizer: {error}") from None
    raise TargetError(f"{base} has no tokenizer.json, so no draft can be checked against it; save its fast tokenizer")


def vocabulary_of(tokenizer: Tokenizer) -> str:
    """See `bundle.vocabulary_hash`."""
    return vocabulary_hash(tokenizer.get_vocab(with_added_tokens=True))


def end_ids_of(base: Path) -> list[int]:
    """The ids that end a text of the checkpoint at `base`, ascending."""
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((base / name).read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise TargetError(f"{base / name} cannot be read ({error}); copy the model again") from None
        if ids is not None:
            return sorted([ids] if isinstance(ids, int) else ids)
    return []


def version_hash(path: Path, base: Path) -> str:
    """12 hex digits over the contents of every weight and configuration file."""
    digest = hashlib.sha256()
    for directory in dict.fromkeys((base, path)):
        for file in sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")]):
            digest.update(file.name.encode())
            with file.open("rb") as contents:
                while piece := contents.read(READ_SIZE):
                    digest.update(piece)
    return digest.hexdigest()[:12]


def shared_fingerprints(path: Path, base: Path, layout: str, blocks: int, layers: int) -> dict[str, str]:
    """The fingerprint of every tensor that a draft of this layout shares, by name.

    Read from the files, so that it does not depend on the type that the model computes in. A tensor that an adapter or
    a list of changes names counts as different.

    Raises:
        TargetError: a file is damaged.
    """
    adapted, changed = adapter_keys(path), changed_names(path)
    fingerprints: dict[str, str] = {}
    for file in sorted(base.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in shared_names(layout, blocks, layers, list(tensors.keys())):
                    module = name.rpartition(".")[0] + "."
                    fingerprints[name] = (
                        fingerprint(tensors.get_tensor(name).float().numpy())
                        + "+adapter" * any(key.startswith(module) for key in adapted)
                        + "+changed" * (name in changed)
                    )
        except (OSError, SafetensorError) as error:
            raise TargetError(f"{file} cannot be read ({error}); copy the model again") from None
    return fingerprints


def adapter_keys(path: Path) -> set[str]:
    """Names of the adapter's own tensors, each beginning with the module that it changes; none for a checkpoint."""
    keys: set[str] = set()
    for file in path.glob("adapter_model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            keys |= {name.removeprefix("base_model.model.") for name in tensors.keys()}  # noqa: SIM118 - no iterator
    return keys
