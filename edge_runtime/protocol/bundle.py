"""The draft bundle: the draft model on disk, and the identities by which both ends check that draft and target fit.

A bundle is a directory:

    manifest.json      this module's `Manifest`
    model.onnx         the draft's graph, its weights inside or in a file next to it
    tokenizer.json     the tokenizer that the draft and its targets share
    head_ids.npy       only if the head is trimmed: the token ids of its rows
    chat.json          the target's chat templates and sampling defaults: this module's `ChatFormat`; older bundles and
                       targets without them have none

The manifest records the length and sha256 of every other file, a hash of the vocabulary, and a fingerprint of every
tensor that the draft shares with its targets. When a session opens, the verifier compares vocabulary hash and
fingerprints with its own.

Format version 1. The JSON field names are those of the structs below; a change of meaning needs a new FORMAT_VERSION.
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
MANIFEST_NAME = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
CHAT_FILE = "chat.json"
READ_CHUNK_BYTES = 1 << 20
# Chosen: a manifest has a few kilobytes, and one that names thousands of special tokens a few hundred.
MAX_MANIFEST_BYTES = 1 << 20
# Chosen: chat templates have up to a hundred kilobytes.
MAX_CHAT_BYTES = 1 << 20
# Chosen: no draft of this size answers in time on a board.
MAX_FILE_BYTES = 1 << 32

# Sizes of a model. The bounds, about eight times the largest of any published model, are there to refuse nonsense
# before memory is reserved for it.
LayerCount = Annotated[int, msgspec.Meta(ge=1, le=1 << 10)]
HeadCount = Annotated[int, msgspec.Meta(ge=1, le=1 << 10)]
HiddenSize = Annotated[int, msgspec.Meta(ge=1, le=1 << 17)]
VocabularySize = Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]
ContextLength = Annotated[int, msgspec.Meta(ge=1, le=1 << 27)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 22)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
# Texts that are used as names, of files in the bundle's directory and in messages; the patterns keep both safe.
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
FileName = Annotated[str, msgspec.Meta(pattern=rf"\A{_NAME}\Z")]
OptionalFileName = Annotated[str, msgspec.Meta(pattern=rf"\A({_NAME})?\Z")]
Identifier = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_.+-]{1,200}\Z")]


class Architecture(msgspec.Struct, frozen=True):
    """Shape of the draft model. `context` is the longest text in tokens; `model_type` is that of transformers."""

    model_type: Identifier
    hidden_size: HiddenSize
    layers: LayerCount
    kv_heads: HeadCount
    head_dim: HiddenSize
    vocabulary_size: VocabularySize
    context: ContextLength


class Vocabulary(msgspec.Struct, frozen=True):
    """The properties of the tokenizer on which both ends must agree. `hash`: see `hash_vocabulary`."""

    size: VocabularySize
    hash: Identifier
    special_ids: dict[str, TokenId]


class SharedTensors(msgspec.Struct, frozen=True):
    """The tensors of the target that the draft contains; they are frozen, in the draft and in all targets.

    Attributes:
        layout: `anchor` (the target's last blocks, norm, head and embedding), `prefix` (its first blocks and embedding)
            or `standalone` (none).
        blocks: number of the target's blocks that are shared.
        fingerprints: `fingerprint_tensor` of each shared tensor by its name in the target's checkpoint.
    """

    layout: Annotated[str, msgspec.Meta(pattern=r"\A(anchor|prefix|standalone)\Z")]
    blocks: Annotated[int, msgspec.Meta(ge=0, le=1 << 10)]
    fingerprints: dict[Identifier, Identifier]

    @property
    def identity(self) -> str:
        """The draft identity that a client sends on opening, such as `anchor/1/0123456789abcdef`."""
        return draft_identity(self.layout, self.blocks, self.fingerprints)


class OnnxGraph(msgspec.Struct, frozen=True, omit_defaults=True):
    """The ONNX graph.

    Attributes:
        file: its name in the bundle.
        kind: how it handles the KV cache, `fused` or `concat`; see `draft.onnx_runner`.
        weights: numeric format of the weights, such as `fp32`, `int8`, `int4`.
        head_ids: file of the ids that the logits cover (.npy, int32, ascending); empty if they cover the vocabulary.
    """

    file: FileName
    kind: Annotated[str, msgspec.Meta(pattern=r"\A(fused|concat)\Z")]
    weights: Identifier
    head_ids: OptionalFileName = ""


class SamplingDefaults(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling parameters of requests that name none: the target's `generation_config.json`; None if unset."""

    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None


class ChatFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the target is talked to.

    Attributes:
        templates: Jinja sources of its chat templates, by name; empty if it has none. Most have only `default`; some
            have others, such as `tool_use`.
        special_tokens: texts of special tokens by the name under which templates use them, such as `bos_token`.
        sampling: see `SamplingDefaults`.
    """

    templates: dict[str, str] = {}
    special_tokens: dict[str, str | list[str]] = {}
    sampling: SamplingDefaults = SamplingDefaults()


class FileRecord(msgspec.Struct, frozen=True):
    """Length in bytes and sha256 of one file of the bundle."""

    bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Parity(msgspec.Struct, frozen=True):
    """Agreement of the exported graph with PyTorch fp32 on the same tokens.

    Attributes:
        greedy_agreement: share of positions with the same argmax.
        max_logit_difference: largest absolute difference of a logit.
    """

    positions: Annotated[int, msgspec.Meta(ge=0)]
    greedy_agreement: Share
    max_logit_difference: Annotated[float, msgspec.Meta(ge=0)]


class Manifest(msgspec.Struct, frozen=True):
    """The manifest of a bundle.

    Attributes:
        files: every file of the bundle but the manifest, by name.
        acceptance: measured acceptance rate by the data it was measured on; may be empty.
        made: tool versions and options of the export.
    """

    format_version: int
    name: Annotated[str, msgspec.Meta(max_length=200)]
    architecture: Architecture
    vocabulary: Vocabulary
    shared: SharedTensors
    graph: OnnxGraph
    parity: Parity
    files: Annotated[dict[FileName, FileRecord], msgspec.Meta(min_length=1, max_length=100)]
    acceptance: dict[str, Share] = {}
    made: dict[str, Any] = {}


class _AnyFormat(msgspec.Struct, frozen=True):
    """The one field that manifests of all formats have."""

    format_version: int


class Bundle(msgspec.Struct, frozen=True):
    """A bundle whose manifest was read and whose files were checked."""

    path: Path
    manifest: Manifest

    @property
    def graph_path(self) -> Path:
        return self.path / self.manifest.graph.file

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER_FILE


def read_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Read the manifest of the bundle at `path` and check its files.

    Args:
        verify: hash every file; otherwise only the lengths are compared.

    Raises:
        BundleMissing: there is no bundle, or one of its files is missing.
        BundleCorrupt: the manifest does not parse, has another format version, or a file does not match its record.
    """
    bundle = Bundle(path, parse_manifest(read_manifest_text(path), path))
    for name, record in bundle.manifest.files.items():
        _check_file(path / name, record, verify)
    return bundle


def read_manifest_text(path: Path) -> bytes:
    """Read the manifest of the bundle at `path`, for `parse_manifest`. Raises BundleMissing, BundleCorrupt."""
    try:
        with (path / MANIFEST_NAME).open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleMissing(
            f"no draft bundle at {path}: it has no {MANIFEST_NAME}; make one with `draft-export onnx`, "
            "or point --bundle at one"
        ) from None
    except OSError as error:
        raise BundleMissing(f"cannot read {path / MANIFEST_NAME}: {error.strerror}") from None
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleCorrupt(
            f"{path / MANIFEST_NAME} is not a bundle manifest (it has more than {MAX_MANIFEST_BYTES} bytes): "
            "copy the bundle again"
        )
    return text


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """Parse a manifest. It is untrusted input: every number is bounded, and every file is in the bundle's directory.

    Args:
        path: directory or archive of the bundle, for messages.

    Raises:
        BundleCorrupt: it does not parse, has another format version, or does not record a file that is needed.
    """
    try:
        version = msgspec.json.decode(text, type=_AnyFormat).format_version
        if version != FORMAT_VERSION:
            raise BundleCorrupt(
                f"{path / MANIFEST_NAME} has format {version} and this release reads {FORMAT_VERSION}: "
                "upgrade flexspec, or export the bundle again"
            )
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleCorrupt(
            f"{path / MANIFEST_NAME} is not a bundle manifest ({error}): copy the bundle again, or export it again"
        ) from None
    required = {manifest.graph.file, TOKENIZER_FILE, manifest.graph.head_ids} - {""}
    for name in sorted(required - manifest.files.keys()):
        raise BundleCorrupt(f"{path / MANIFEST_NAME} records no hash for {name}: export the bundle again")
    return manifest


def read_head_ids(bundle: Bundle) -> npt.NDArray[np.int32] | None:
    """Return the ids that the draft's logits cover, ascending, (n,); None if they cover the whole vocabulary.

    Raises:
        BundleCorrupt: the file that the manifest names does not hold such ids.
    """
    name, size = bundle.manifest.graph.head_ids, bundle.manifest.architecture.vocabulary_size
    if not name:
        return None
    try:
        ids = np.load(bundle.path / name, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise BundleCorrupt(f"{bundle.path / name} is not a list of ids ({error}): copy the bundle again") from None
    ascending = ids.dtype == np.int32 and ids.ndim == 1 and ids.size > 0 and bool(np.all(np.diff(ids) > 0))
    if not ascending or ids[0] < 0 or ids[-1] >= size:
        raise BundleCorrupt(f"{bundle.path / name} does not hold ascending ids below {size}: export the bundle again")
    return np.asarray(ids, np.int32)


def read_chat_format(bundle: Bundle) -> ChatFormat:
    """Return how the bundle's target is talked to; an empty `ChatFormat` if the bundle has none.

    A file that the manifest does not record is ignored: nobody signed it.

    Raises:
        BundleCorrupt: the file is not a `ChatFormat`.
    """
    if CHAT_FILE not in bundle.manifest.files:
        return ChatFormat()
    try:
        with (bundle.path / CHAT_FILE).open("rb") as file:
            return msgspec.json.decode(file.read(MAX_CHAT_BYTES), type=ChatFormat)
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError, RecursionError) as error:
        raise BundleCorrupt(
            f"{bundle.path / CHAT_FILE} does not describe chats ({error}): copy the bundle again"
        ) from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest` into the bundle directory `path`. Deterministic: equal manifests have equal bytes."""
    text = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2)
    (path / MANIFEST_NAME).write_bytes(text + b"\n")


def record_file(path: Path) -> FileRecord:
    """Compute length and sha256 of the file at `path`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_CHUNK_BYTES):
            digest.update(chunk)
        return FileRecord(file.tell(), digest.hexdigest())


def fingerprint_tensor(tensor: npt.NDArray[np.float32]) -> str:
    """Return 16 hex digits that identify a tensor's shape and values, independent of its storage type.

    The values are hashed as little-endian float32, which represents float16 and bfloat16 exactly. Storing a checkpoint
    in another of these types therefore changes the fingerprint only if it changes a value.
    """
    digest = hashlib.sha256(repr(tensor.shape).encode())
    digest.update(np.ascontiguousarray(tensor, dtype="<f4").data)
    return digest.hexdigest()[:16]


def draft_identity(layout: str, blocks: int, fingerprints: Mapping[str, str]) -> str:
    """Return a short string that identifies a layout and its shared tensors: `layout/blocks/hash of fingerprints`."""
    lines = "".join(f"{name}={value}\n" for name, value in sorted(fingerprints.items()))
    return f"{layout}/{blocks}/{hashlib.sha256(lines.encode()).hexdigest()[:16]}"


def shared_tensor_names(layout: str, blocks: int, layers: int, tensor_names: list[str]) -> list[str]:
    """Return the names of the target's tensors that a layout shares, sorted.

    Args:
        layout: `anchor`, `prefix` or `standalone`.
        layers: number of blocks of the target.
        tensor_names: names in the target's checkpoint, in the scheme that transformers uses for Llama, Qwen2, Qwen3,
            Mistral and Gemma alike.
    """
    if layout == "standalone":
        return []
    first = layers - blocks if layout == "anchor" else 0
    prefixes = ["model.embed_tokens."] + [f"model.layers.{first + index}." for index in range(blocks)]
    if layout == "anchor":
        prefixes += ["model.norm.", "lm_head."]
    return sorted(name for name in tensor_names if name.startswith(tuple(prefixes)))


def hash_vocabulary(vocabulary: Mapping[str, int]) -> str:
    """Return 16 hex digits that identify a token-to-id mapping, which must include the added tokens."""
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        digest.update(f"{index}\0{token}\n".encode())
    return digest.hexdigest()[:16]


def _check_file(path: Path, record: FileRecord, verify: bool) -> None:
    if path.is_symlink():
        raise BundleCorrupt(f"{path} is a symbolic link, and a bundle has regular files: copy it again with `cp -L`")
    if not path.is_file():
        raise BundleMissing(f"the bundle lacks {path.name} ({path}): copy the bundle again")
    size = path.stat().st_size
    if size != record.bytes:
        raise BundleCorrupt(f"{path} has {size} bytes instead of {record.bytes}: copy it again")
    if verify and record_file(path).sha256 != record.sha256:
        raise BundleCorrupt(f"{path} is not the file that was exported (sha256 differs): copy it again")
