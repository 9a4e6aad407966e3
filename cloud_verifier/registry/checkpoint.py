"""A target version on disk: its form of storage, its base and its identity. No model is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoConfig

from cloud_verifier.registry.adapter import ADAPTER_CONFIG_FILE, adapter_tensor_names, read_adapter_config
from cloud_verifier.registry.catalog import VersionKind
from cloud_verifier.registry.delta import CHANGES_FILE, changed_tensor_names, read_base_name
from cloud_verifier.registry.model_settings import check_model_settings
from cloud_verifier.registry.tokenizer_config import ends_of_tokenizer
from cloud_verifier.registry.version_files import find_tensor_files, loading_directory
from edge_runtime.protocol.bundle import fingerprint_tensor, hash_vocabulary, shared_tensor_names
from edge_runtime.protocol.errors import TargetError

# Names of the embedding and of the head in the architectures that drafts are made for.
EMBEDDING, HEAD_MODULE = "model.embed_tokens.weight", "lm_head"
HEAD = f"{HEAD_MODULE}.weight"
# A draft fits a version to which at most this many special tokens were added. Chosen: chat formats and tool calls add
# fewer, and an opening that presents another draft costs a hash of the embedding for each.
MAX_ADDED_TOKENS = 16


def base_directory(path: Path) -> Path:
    """The directory of the base checkpoint: `path` itself unless it holds a PEFT adapter, or changes to a base.

    A base that an adapter names by its id on the hub is looked for in the hub's local cache; nothing is downloaded.

    Raises:
        TargetError: there is no target at `path`, or its base is missing, or not a checkpoint.
    """
    if not path.is_dir():
        raise TargetError(f"no target at {path}: give the directory of a Hugging Face checkpoint or PEFT adapter")
    revision = None
    if (path / CHANGES_FILE).exists():
        file, name = path / CHANGES_FILE, read_base_name(path)
    elif (path / ADAPTER_CONFIG_FILE).exists():
        file, config = path / ADAPTER_CONFIG_FILE, read_adapter_config(path)
        named, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not isinstance(named, str) or not named:
            raise TargetError(f"{file} does not name a base model: set base_model_name_or_path")
        name = named
    else:
        return path
    base = next((base for base in (path / name, Path(name)) if base.is_dir()), None)
    base = base or _cached_snapshot(name, revision)
    if base is None:
        raise TargetError(
            f"{file} names the base model {name!r}, which is not a directory, neither as given nor relative to {path}, "
            "and not in the local cache of the hub"
        )
    base = base.resolve()
    for held, what in ((CHANGES_FILE, "a list of changes"), (ADAPTER_CONFIG_FILE, "an adapter")):
        if (base / held).exists():
            raise TargetError(f"{file} names the base {base}, which holds {what}: name a whole checkpoint")
    return base


def _cached_snapshot(repository: str, revision: object) -> Path | None:
    """The directory of a model in the local cache of the hub; None if it is not there."""
    try:
        file = try_to_load_from_cache(
            repository, "config.json", revision=revision if isinstance(revision, str) else None
        )
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) else None


def version_name(path: Path) -> str:
    """The name of the version at `path`: its directory's, or the model's if that is a snapshot in the hub's cache.

    A link counts by its own name, by which its user knows the version.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100  # resolve() would follow the link
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return path.name


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
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TargetError(f"{file} is not a model configuration ({error}); copy the model again") from None
    if not isinstance(model_type, str):
        raise TargetError(f"{file} names no model_type; save the model again with save_pretrained")
    if model_type not in CONFIG_MAPPING:
        needs = "code of its own (auto_map), which is never run" if settings.get("auto_map") else "a newer transformers"
        raise TargetError(
            f"{base} is of type {model_type[:80]!r}, which transformers {transformers.__version__} does not have; "
            f"it needs {needs}"
        )
    check_model_settings(settings, file)
    try:
        with loading_directory([file]) as directory:
            return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise TargetError(f"{file} is not a {model_type} configuration: {_first_line(error)}") from None


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


def accepted_vocabularies(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Hashes of the vocabularies of drafts that can draft for a target with this tokenizer.

    These are the hash of the tokenizer itself, and those of the tokenizer before special tokens were added to it: a
    draft with one of those never proposes the added tokens.

    Returns:
        By hash: None for the tokenizer itself; else the lowest added id, which is the number of rows that an embedding
        without the added tokens has.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    accepted: dict[str, int | None] = {hash_vocabulary(vocabulary): None}
    by_id = sorted(((index, token) for token, index in vocabulary.items()), reverse=True)
    for index, token in by_id[:MAX_ADDED_TOKENS]:
        if index not in special:
            break
        del vocabulary[token]
        accepted[hash_vocabulary(vocabulary)] = index
    return accepted


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
            return sorted({*([ids] if isinstance(ids, int) else ids), *ends_of_tokenizer(base)})
    return sorted(ends_of_tokenizer(base))


def shared_fingerprints(
    path: Path, base: Path, layout: str, blocks: int, layers: int, *, rows: int | None = None
) -> dict[str, str]:
    """Fingerprints, by name, of the tensors that a draft of this layout shares with the version at `path`.

    They are computed from the files, so they do not depend on the dtype that the model computes in. A tensor that an
    adapter or a list of changes names counts as different.

    Args:
        layout, blocks: see `bundle.shared_tensor_names`.
        layers: depth of the target.
        rows: rows of the draft's embedding and head, if the version has more; None for all.

    Raises:
        TargetError: a file is damaged.
    """
    adapted, changed = adapter_tensor_names(path), changed_tensor_names(path)
    files = find_tensor_files(base)
    if layout == "anchor" and HEAD not in files and any(name.startswith(f"{HEAD_MODULE}.") for name in adapted):
        # The head of the base is its embedding. The adapter changes the head, which the draft shares.
        adapted = adapted | {EMBEDDING}
    fingerprints: dict[str, str] = {}
    for name in shared_tensor_names(layout, blocks, layers, list(files)):
        try:
            with safe_open(files[name], framework="pt") as tensors:
                tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise TargetError(f"{files[name]} cannot be read ({error}); copy the model again") from None
        if rows is not None and name in (EMBEDDING, HEAD):
            tensor = tensor[:rows]
        module = name.rpartition(".")[0] + "."
        fingerprints[name] = (
            fingerprint_tensor(tensor.float().numpy())
            + "+adapter" * any(key.startswith(module) for key in adapted)
            + "+changed" * (name in changed)
        )
    return fingerprints


def _first_line(error: Exception) -> str:
    """The first line of an error message, shortened."""
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
