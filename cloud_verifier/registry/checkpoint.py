"""A target version on disk: its form of storage, its base and its identity. No model is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoConfig

from cloud_verifier.registry.catalog import VersionKind
from cloud_verifier.registry.delta import CHANGES_FILE, changed_tensor_names, read_base_name
from edge_runtime.protocol.bundle import READ_CHUNK_BYTES, fingerprint_tensor, hash_vocabulary, shared_tensor_names
from edge_runtime.protocol.errors import TargetError


def base_directory(path: Path) -> Path:
    """The directory of the base checkpoint: `path` itself unless it holds a PEFT adapter, or changes to a base.

    Raises:
        TargetError: there is no target at `path`, or its base is missing.
    """
    if not path.is_dir():
        raise TargetError(f"no target at {path}: give the directory of a Hugging Face checkpoint or PEFT adapter")
    file = path / "adapter_config.json"
    if (path / CHANGES_FILE).exists():
        file, name = path / CHANGES_FILE, read_base_name(path)
    elif not file.exists():
        return path
    else:
        try:
            name = json.loads(file.read_text())["base_model_name_or_path"]
            path / name
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TargetError(f"{file} does not name a base model: {error!r}") from None
    for base in (path / name, Path(name)):
        if base.is_dir():
            return base.resolve()
    raise TargetError(
        f"{file} names the base model {name!r}, which is not a directory, neither as given nor relative to {path}"
    )


def version_kind(path: Path, base: Path) -> VersionKind:
    """How the version at `path`, based on `base`, is stored."""
    if (path / CHANGES_FILE).exists():
        return "changes"
    return "checkpoint" if path.resolve() == base else "adapter"


def load_config(base: Path) -> Any:
    """The configuration of the checkpoint at `base`. No code of the checkpoint runs. Raises TargetError."""
    file = base / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        model_type = settings.get("model_type")
    except FileNotFoundError:
        raise TargetError(f"{base} is not a Hugging Face model directory: it has no config.json") from None
    except (OSError, ValueError, AttributeError) as error:
        raise TargetError(f"{file} is not a model configuration ({error}); copy the model again") from None
    if not isinstance(model_type, str):
        raise TargetError(f"{file} names no model_type; save the model again with save_pretrained")
    if model_type not in CONFIG_MAPPING:
        needs = "code of its own (auto_map), which is never run" if settings.get("auto_map") else "a newer transformers"
        raise TargetError(
            f"{base} is of type {model_type[:80]!r}, which transformers {transformers.__version__} does not have; "
            f"it needs {needs}"
        )
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise TargetError(f"{file} is not a {model_type} configuration: {_first_line(error)}") from None


def check_weights(base: Path) -> None:
    """Check that the checkpoint at `base` has all its weight files, at their full length. Raises TargetError."""
    files = sorted(base.glob("*.safetensors"))
    if not files:
        pickled = next((path.name for path in sorted(base.glob("*.bin")) if path.name != "training_args.bin"), "")
        others = f", only {pickled}, and pickled weights are never loaded" if pickled else ""
        raise TargetError(
            f"{base} has no safetensors weights{others}; save the model again with safe_serialization=True"
        )
    whole = (base / "model.safetensors").exists() or any(base.glob("*.safetensors.index.json"))
    if not whole and any(re.search(r"-of-\d+\.safetensors$", file.name) for file in files):
        raise TargetError(f"{base} lacks model.safetensors.index.json; copy the model again")
    for index in base.glob("*.safetensors.index.json"):
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(f"{index} cannot be read ({error!r}); copy the model again") from None
        missing = sorted(listed - {file.name for file in files})
        if missing:
            raise TargetError(f"{base} lacks {', '.join(missing[:3])}; copy the model again")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise TargetError(f"{file} is damaged or truncated ({error}); copy the model again") from None


def load_tokenizer(path: Path, base: Path) -> Tokenizer:
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


def check_tokenizer(tokenizer: Tokenizer, vocabulary_size: int, path: Path) -> None:
    """Check that a model with `vocabulary_size` logits can have this tokenizer.

    Tokens that were added to a tokenizer, such as one for images, need no logits.

    Raises:
        TargetError: it is another model's.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if largest >= vocabulary_size:
        raise TargetError(
            f"the tokenizer of {path} has token ids up to {largest}, but the model has {vocabulary_size} logits: it is "
            "another model's; copy tokenizer.json of this model"
        )


def tokenizer_vocabulary_hash(tokenizer: Tokenizer) -> str:
    """`bundle.hash_vocabulary` of a tokenizer, added tokens included."""
    return hash_vocabulary(tokenizer.get_vocab(with_added_tokens=True))


def read_end_ids(base: Path) -> list[int]:
    """The end-of-text ids of the checkpoint at `base`, ascending. Raises TargetError."""
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
    """12 hex digits of SHA-256 over the names and contents of all weight and configuration files."""
    digest = hashlib.sha256()
    for directory in dict.fromkeys((base, path)):
        for file in sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")]):
            digest.update(file.name.encode())
            with file.open("rb") as contents:
                while chunk := contents.read(READ_CHUNK_BYTES):
                    digest.update(chunk)
    return digest.hexdigest()[:12]


def shared_fingerprints(path: Path, base: Path, layout: str, blocks: int, layers: int) -> dict[str, str]:
    """Fingerprints, by name, of the tensors that a draft of this layout shares with the version at `path`.

    They are computed from the files, so they do not depend on the dtype that the model computes in. A tensor that an
    adapter or a list of changes names counts as different.

    Args:
        layout, blocks: see `bundle.shared_tensor_names`.
        layers: depth of the target.

    Raises:
        TargetError: a file is damaged.
    """
    adapted, changed = adapter_tensor_names(path), changed_tensor_names(path)
    fingerprints: dict[str, str] = {}
    for file in sorted(base.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in shared_tensor_names(layout, blocks, layers, list(tensors.keys())):
                    module = name.rpartition(".")[0] + "."
                    fingerprints[name] = (
                        fingerprint_tensor(tensors.get_tensor(name).float().numpy())
                        + "+adapter" * any(key.startswith(module) for key in adapted)
                        + "+changed" * (name in changed)
                    )
        except (OSError, SafetensorError) as error:
            raise TargetError(f"{file} cannot be read ({error}); copy the model again") from None
    return fingerprints


def adapter_tensor_names(path: Path) -> set[str]:
    """Names of the adapter's own tensors, each starting with the name of the module it changes; none if no adapter."""
    names: set[str] = set()
    for file in path.glob("adapter_model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= {name.removeprefix("base_model.model.") for name in tensors.keys()}  # noqa: SIM118 - no iterator
    return names


def _first_line(error: Exception) -> str:
    """The first line of an error message, shortened."""
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
