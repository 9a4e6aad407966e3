"""The draft bundle on disk: what the board holds, and how both ends know that it fits.

A bundle is a directory:

    manifest.json      this module's `Manifest`
    model.onnx         the draft's graph, with its weights beside it or inside
    tokenizer.json     the tokenizer that draft and targets share
    head_ids.npy       where the head is trimmed: which ids its rows are

The manifest records the sha256 of every other file, the vocabulary's hash, and a fingerprint of every tensor that the
draft shares with its targets. The verifier compares these with its own when a session opens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.errors import BundleCorrupt, BundleMissing

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
READ_SIZE = 1 << 20


class Architecture(msgspec.Struct, frozen=True):
    """Shape of the draft model; lengths in tokens."""

    model_type: str
    hidden_size: int
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary_size: int
    context: int


class Vocabulary(msgspec.Struct, frozen=True):
    """The tokenizer, as far as both ends must agree on it."""

    size: int
    hash: str
    special_ids: dict[str, int]


class SharedTensors(msgspec.Struct, frozen=True):
    """Which of the target's tensors the draft contains, frozen for good.

    Attributes:
        layout: `anchor` (the target's last blocks, norm and head), `prefix` (its first blocks) or `standalone` (none).
        blocks: how many of the target's blocks are shared.
        fingerprints: `fingerprint` of each shared tensor by its name in the target's checkpoint.
    """

    layout: str
    blocks: int
    fingerprints: dict[str, str]

    @property
    def identity(self) -> str:
        """What a client presents at opening, such as `anchor/1/0123456789abcdef`; the verifier computes its own."""
        return shared_identity(self.layout, self.blocks, self.fingerprints)


class Graph(msgspec.Struct, frozen=True, omit_defaults=True):
    """The ONNX graph.

    Attributes:
        file: its name in the bundle.
        kind: `fused` or `concat` cache.
        weights: their form, such as `fp32`, `int8`, `int4`.
        head_ids: the file (NumPy's, int32, ascending) that says which ids the logits are of; empty for all.
    """

    file: str
    kind: str
    weights: str
    head_ids: str = ""


class FileRecord(msgspec.Struct, frozen=True):
    """Length in bytes and sha256 of one file of the bundle."""

    bytes: int
    sha256: str


class Parity(msgspec.Struct, frozen=True):
    """How the exported graph compares with PyTorch fp32 on the same tokens.

    Attributes:
        positions: how many positions were compared.
        greedy_agreement: share of them where the argmax is the same.
        max_logit_difference: largest absolute difference of a logit.
    """

    positions: int
    greedy_agreement: float
    max_logit_difference: float


class Manifest(msgspec.Struct, frozen=True):
    """Everything there is to know about a bundle.

    Attributes:
        acceptance: measured share of draft tokens accepted, by what it was measured on; may be empty.
        made: tool versions and options that made it.
    """

    format_version: int
    name: str
    architecture: Architecture
    vocabulary: Vocabulary
    shared: SharedTensors
    graph: Graph
    parity: Parity
    files: Annotated[dict[str, FileRecord], msgspec.Meta(min_length=1)]
    acceptance: dict[str, float] = {}
    made: dict[str, Any] = {}


class Bundle(msgspec.Struct, frozen=True):
    """A bundle that was read and whose files were checked."""

    path: Path
    manifest: Manifest

    @property
    def graph_path(self) -> Path:
        return self.path / self.manifest.graph.file

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"


def read_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Reads the manifest of the bundle at `path` and, unless told otherwise, hashes every file it names.

    Raises:
        BundleMissing: there is no bundle here, or a file of it is missing.
        BundleCorrupt: the manifest does not parse, is of a newer format, or a file is not what it records.
    """
    try:
        text = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BundleMissing(
            f"no draft bundle at {path}: it has no {MANIFEST}; make one with `draft-export onnx`, "
            "or point --bundle at one"
        ) from None
    except OSError as error:
        raise BundleMissing(f"cannot read {path / MANIFEST}: {error.strerror}") from None
    try:
        version = msgspec.json.decode(text, type=dict[str, Any]).get("format_version")
        if version != FORMAT_VERSION:
            raise BundleCorrupt(
                f"{path / MANIFEST} has format {version!r} and this release reads {FORMAT_VERSION}: "
                "upgrade flexspec, or export the bundle again"
            )
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleCorrupt(f"{path / MANIFEST} is not a bundle manifest ({error}): copy the bundle again") from None
    bundle = Bundle(path, manifest)
    needed = {manifest.graph.file, bundle.tokenizer_path.name, manifest.graph.head_ids} - {""}
    for name in needed - manifest.files.keys():
        raise BundleCorrupt(f"{path / MANIFEST} records no hash for {name}: export the bundle again")
    for name, record in manifest.files.items():
        # A manifest comes from outside: it must not make us read, or later run, files elsewhere.
        if Path(name).name != name:
            raise BundleCorrupt(f"{path / MANIFEST} names the file {name!r}, which is not inside the bundle")
        _check_file(path / name, record, verify)
    return bundle


def read_head_ids(bundle: Bundle) -> npt.NDArray[np.int32] | None:
    """Which ids the draft's logits are of, ascending, (n,); None where they are of the whole vocabulary.

    Raises:
        BundleCorrupt: the file that the manifest names does not hold such ids.
    """
    name, size = bundle.manifest.graph.head_ids, bundle.manifest.architecture.vocabulary_size
    if not name:
        return None
    try:
        ids = np.load(bundle.path / name, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BundleCorrupt(f"{bundle.path / name} is no list of ids ({error}): copy the bundle again") from None
    ascending = ids.dtype == np.int32 and ids.ndim == 1 and ids.size > 0 and bool(np.all(np.diff(ids) > 0))
    if not ascending or ids[0] < 0 or ids[-1] >= size:
        raise BundleCorrupt(f"{bundle.path / name} does not hold ascending ids below {size}: export the bundle again")
    return np.asarray(ids, np.int32)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes `manifest` into the bundle directory `path`: same manifest, same bytes."""
    text = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2)
    (path / MANIFEST).write_bytes(text + b"\n")


def record_file(path: Path) -> FileRecord:
    """Length and sha256 of the file at `path`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_SIZE):
            digest.update(piece)
        return FileRecord(file.tell(), digest.hexdigest())


def fingerprint(tensor: npt.NDArray[np.float32]) -> str:
    """16 hex digits that identify a tensor's shape and values, whatever type it was stored in.

    The values are hashed as little-endian float32, which represents float16 and bfloat16 exactly, so storing a
    checkpoint in another of these types changes nothing unless it changes a value.
    """
    digest = hashlib.sha256(repr(tensor.shape).encode())
    digest.update(np.ascontiguousarray(tensor, dtype="<f4").data)
    return digest.hexdigest()[:16]


def shared_identity(layout: str, blocks: int, fingerprints: Mapping[str, str]) -> str:
    """One short string for a layout and the tensors that it shares; equal iff all of them are."""
    lines = "".join(f"{name}={value}\n" for name, value in sorted(fingerprints.items()))
    return f"{layout}/{blocks}/{hashlib.sha256(lines.encode()).hexdigest()[:16]}"


def shared_names(layout: str, blocks: int, layers: int, tensor_names: list[str]) -> list[str]:
    """Which of a target's tensors a layout shares.

    Args:
        layout: `anchor`, `prefix` or `standalone`.
        blocks: how many blocks are shared.
        layers: number of blocks of the target.
        tensor_names: names in the target's checkpoint, in the naming that transformers gives Llama, Qwen2, Qwen3,
            Mistral and Gemma alike.
    """
    if layout == "standalone":
        return []
    first = layers - blocks if layout == "anchor" else 0
    prefixes = ["model.embed_tokens."] + [f"model.layers.{first + index}." for index in range(blocks)]
    if layout == "anchor":
        prefixes += ["model.norm.", "lm_head."]
    return sorted(name for name in tensor_names if name.startswith(tuple(prefixes)))


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """16 hex digits that identify a token-to-id mapping, added tokens included."""
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        digest.update(f"{index}\0{token}\n".encode())
    return digest.hexdigest()[:16]


def _check_file(path: Path, record: FileRecord, verify: bool) -> None:
    if not path.is_file():
        raise BundleMissing(f"the bundle lacks {path.name} ({path}): copy the bundle again")
    size = path.stat().st_size
    if size != record.bytes:
        raise BundleCorrupt(f"{path} has {size} bytes instead of {record.bytes}: it was cut short; copy it again")
    if verify and record_file(path).sha256 != record.sha256:
        raise BundleCorrupt(f"{path} is not the file that was exported (sha256 differs): copy it again")
