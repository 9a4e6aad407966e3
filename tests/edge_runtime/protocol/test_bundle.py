"""The draft bundle on disk: a round trip, and a typed error with a remedy for every unusable bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.protocol import bundle
from edge_runtime.protocol.bundle import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Architecture,
    Bundle,
    Manifest,
    OnnxGraph,
    Parity,
    SharedTensors,
    Vocabulary,
    draft_identity,
    fingerprint_tensor,
    hash_vocabulary,
    read_bundle,
    record_file,
    shared_tensor_names,
    write_manifest,
)
from edge_runtime.protocol.errors import BundleCorrupt, BundleError, BundleMissing

FILES = {"model.onnx": b"graph" * 50, "model.onnx.data": bytes(range(256)) * 9, "tokenizer.json": b'{"a": 1}'}


def manifest_of(path: Path) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        name="tiny",
        architecture=Architecture(
            model_type="llama", hidden_size=64, layers=2, kv_heads=2, head_dim=16, vocabulary_size=300, context=512
        ),
        vocabulary=Vocabulary(300, "0123456789abcdef", {"eos": 0}),
        shared=SharedTensors("anchor", 1, {"lm_head.weight": "00", "model.norm.weight": "11"}),
        graph=OnnxGraph("model.onnx", "fused", "int4"),
        parity=Parity(100, 0.99, 0.01),
        files={name: record_file(path / name) for name in FILES},
        acceptance={"code": 0.8},
        made={"tool": "test", "steps": [1, 2]},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle of three small files."""
    where = tmp_path / "bundle"
    where.mkdir()
    for name, contents in FILES.items():
        (where / name).write_bytes(contents)
    write_manifest(where, manifest_of(where))
    return where


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON directly, bypassing the struct."""
    fields = json.loads((path / MANIFEST_NAME).read_text())
    change(fields)
    (path / MANIFEST_NAME).write_text(json.dumps(fields))


def test_a_bundle_round_trip(path: Path) -> None:
    assert read_bundle(path) == Bundle(path, manifest_of(path))
    assert read_bundle(path).graph_path.read_bytes() == FILES["model.onnx"]
    assert read_bundle(path).tokenizer_path.read_bytes() == FILES["tokenizer.json"]


def test_the_same_manifest_has_the_same_bytes(path: Path) -> None:
    before = (path / MANIFEST_NAME).read_bytes()
    write_manifest(path, read_bundle(path).manifest)
    assert (path / MANIFEST_NAME).read_bytes() == before


def test_record_file_hashes_in_pieces(tmp_path: Path) -> None:
    contents = bytes(range(251)) * (bundle.READ_CHUNK_BYTES // 100)
    (tmp_path / "file").write_bytes(contents)
    record = record_file(tmp_path / "file")
    assert record.bytes == len(contents) > bundle.READ_CHUNK_BYTES
    assert record.sha256 == hashlib.sha256(contents).hexdigest()


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing, match=r"no draft bundle at .*draft-export onnx.*--bundle"):
        read_bundle(tmp_path / "nowhere")


def test_a_file_instead_of_a_directory(path: Path) -> None:
    with pytest.raises(BundleMissing, match="no draft bundle"):
        read_bundle(path / "model.onnx")


def test_a_directory_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing, match=r"it has no manifest\.json"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_named(path: Path, name: str, verify: bool) -> None:
    (path / name).unlink()
    with pytest.raises(BundleMissing, match=f"lacks {name} .*copy the bundle again"):
        read_bundle(path, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_detected_even_without_hashing(path: Path, verify: bool) -> None:
    data = path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(BundleCorrupt, match=r"model\.onnx\.data has 2303 bytes instead of 2304.*copy it again"):
        read_bundle(path, verify=verify)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_detected(path: Path, name: str) -> None:
    contents = bytearray(FILES[name])
    contents[len(contents) // 2] ^= 1
    (path / name).write_bytes(contents)
    with pytest.raises(BundleCorrupt, match=rf"{name} is not the file that was exported \(sha256 differs\)"):
        read_bundle(path)
    assert read_bundle(path, verify=False).path == path


def test_a_newer_format_asks_for_an_upgrade(path: Path) -> None:
    edit(path, lambda fields: fields.update(format_version=FORMAT_VERSION + 1, architecture="all new"))
    with pytest.raises(BundleCorrupt, match=r"has format 2 and this release reads 1: upgrade flexspec"):
        read_bundle(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', '{"format_version": 1}', "\x00"])
def test_a_malformed_manifest(path: Path, text: str) -> None:
    (path / MANIFEST_NAME).write_text(text)
    with pytest.raises(BundleCorrupt, match=r"manifest\.json is not a bundle manifest .*: copy the bundle again"):
        read_bundle(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", None),
        ("architecture", {}),
        ("files", {}),
        ("files", {"model.onnx": {"bytes": "many", "sha256": ""}}),
        ("graph", "model.onnx"),
        ("shared", {"layout": "anchor", "blocks": "one", "fingerprints": {}}),
    ],
)
def test_a_manifest_with_a_wrong_field_names_it(path: Path, field: str, value: object) -> None:
    edit(path, lambda fields: fields.update({field: value}))
    with pytest.raises(BundleCorrupt, match=rf"is not a bundle manifest .*\$\.{field}"):
        read_bundle(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/file", "./model.onnx", "."])
def test_files_outside_the_bundle_are_not_touched(path: Path, name: str) -> None:
    (path.parent / "secret").write_bytes(b"secret")
    edit(path, lambda fields: fields["files"].update({name: {"bytes": 6, "sha256": "0" * 64}}))
    with pytest.raises(BundleCorrupt, match=r"at `key` in `\$\.files`"):
        read_bundle(path)


@pytest.mark.parametrize("name", ["..", ""])
def test_a_directory_is_not_accepted_as_a_file(path: Path, name: str) -> None:
    edit(path, lambda fields: fields["files"].update({name: {"bytes": 6, "sha256": "0" * 64}}))
    with pytest.raises(BundleError):
        read_bundle(path)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("../model.onnx", r"\$\.graph\.file"),
        ("\x1b[2J", r"\$\.graph\.file"),
        ("other.onnx", "records no hash for other"),
    ],
)
def test_a_graph_that_no_hash_covers_is_refused(path: Path, graph: str, message: str) -> None:
    edit(path, lambda fields: fields["graph"].update(file=graph))
    with pytest.raises(BundleCorrupt, match=message) as caught:
        read_bundle(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("architecture", "context", 10**12),
        ("architecture", "context", -5),
        ("architecture", "layers", 10**9),
        ("architecture", "vocabulary_size", 0),
        ("architecture", "hidden_size", 10**30),
        ("architecture", "model_type", "\x1b]0;title"),
        ("vocabulary", "size", 1.5),
        ("shared", "blocks", -1),
        ("graph", "head_ids", "../ids.npy"),
        ("parity", "greedy_agreement", 2),
    ],
)
def test_absurd_values_are_refused_in_a_sentence(path: Path, part: str, field: str, value: object) -> None:
    edit(path, lambda fields: fields[part].update({field: value}))
    with pytest.raises(BundleCorrupt, match=rf"Expected .* - at `\$\.{part}\.{field}`") as caught:
        read_bundle(path, verify=False)
    assert str(caught.value).isprintable()


def test_an_endless_manifest_is_not_read(path: Path) -> None:
    with (path / MANIFEST_NAME).open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleCorrupt, match="has more than 1048576 bytes"):
        read_bundle(path)


def test_a_symbolic_link_is_no_file_of_a_bundle(path: Path) -> None:
    (path / "model.onnx.data").rename(path.parent / "elsewhere")
    (path / "model.onnx.data").symlink_to("../elsewhere")
    with pytest.raises(BundleCorrupt, match=r"model\.onnx\.data is a symbolic link"):
        read_bundle(path)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_needed_file_without_a_record_is_refused(path: Path, name: str) -> None:
    edit(path, lambda fields: fields["files"].pop(name))
    with pytest.raises(BundleCorrupt, match=f"records no hash for {name}"):
        read_bundle(path)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=150)
def test_a_damaged_manifest_reads_or_is_a_bundle_error(path: Path, data: st.DataObject) -> None:
    write_manifest(path, manifest_of(path))
    text = bytearray((path / MANIFEST_NAME).read_bytes())
    start = data.draw(st.integers(0, len(text)))
    ascii_only = st.binary(max_size=4).map(lambda piece: bytes(byte & 0x7F for byte in piece))
    text[start : start + data.draw(st.integers(0, 4))] = data.draw(ascii_only)
    (path / MANIFEST_NAME).write_bytes(text)
    try:
        read_bundle(path)
    except BundleError as error:
        assert str(path) in str(error)


def test_a_manifest_that_is_not_utf8(path: Path) -> None:
    text = (path / MANIFEST_NAME).read_bytes()
    (path / MANIFEST_NAME).write_bytes(text.replace(b"tiny", b"tin\xff"))
    with pytest.raises(BundleCorrupt):
        read_bundle(path)


def test_a_manifest_that_is_a_nesting_bomb(path: Path) -> None:
    (path / MANIFEST_NAME).write_bytes(b'{"made":' * 100_000)
    with pytest.raises(BundleCorrupt):
        read_bundle(path)


def test_a_manifest_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(BundleError):
        read_bundle(tmp_path)


halves = st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=12)


@pytest.mark.slow
@given(halves, st.sampled_from(["bfloat16", "float16", "float32", "float64"]))
def test_a_fingerprint_does_not_depend_on_the_storage_type(values: list[float], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    stored = torch.tensor(values, dtype=torch.float32).bfloat16().half().float()  # representable in every type
    stored = torch.where(stored.to(torch.bfloat16).float() == stored, stored, 0.0)
    assert fingerprint_tensor(stored.to(getattr(torch, dtype)).float().numpy()) == fingerprint_tensor(stored.numpy())


@pytest.mark.slow
@given(halves, st.data())
def test_a_fingerprint_covers_every_value(values: list[float], data: st.DataObject) -> None:
    tensor = np.array(values, dtype=np.float32)
    other = tensor.copy()
    index = data.draw(st.integers(0, len(values) - 1))
    other[index] = np.nextafter(other[index], np.float32(np.inf))
    assert fingerprint_tensor(tensor) != fingerprint_tensor(other)


def test_a_fingerprint_covers_shape_and_order_but_not_memory_layout() -> None:
    tensor = np.arange(12, dtype=np.float32).reshape(3, 4)
    shapes = [tensor, tensor.reshape(4, 3), tensor.reshape(12), tensor.reshape(1, 3, 4), tensor.T, tensor[::-1]]
    assert len({fingerprint_tensor(shape) for shape in shapes}) == len(shapes)
    assert fingerprint_tensor(np.asfortranarray(tensor)) == fingerprint_tensor(tensor)
    assert fingerprint_tensor(np.repeat(tensor, 2, axis=1)[:, ::2]) == fingerprint_tensor(tensor)
    assert fingerprint_tensor(tensor.astype(">f4")) == fingerprint_tensor(tensor)
    assert len(fingerprint_tensor(tensor)) == 16


NAMES = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    *(
        f"model.layers.{layer}.{part}"
        for layer in range(12)
        for part in ("mlp.up_proj.weight", "self_attn.q_proj.bias")
    ),
]


def test_anchor_shares_the_last_blocks_norm_head_and_embedding() -> None:
    assert shared_tensor_names("anchor", 1, 12, NAMES) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.11.mlp.up_proj.weight",
        "model.layers.11.self_attn.q_proj.bias",
        "model.norm.weight",
    ]


def test_prefix_shares_the_embedding_and_the_first_blocks() -> None:
    """Block 1 must not match blocks 10 and 11."""
    assert shared_tensor_names("prefix", 2, 12, NAMES) == [
        "model.embed_tokens.weight",
        *(
            f"model.layers.{layer}.{part}"
            for layer in (0, 1)
            for part in ("mlp.up_proj.weight", "self_attn.q_proj.bias")
        ),
    ]


def test_standalone_shares_nothing() -> None:
    assert shared_tensor_names("standalone", 0, 12, NAMES) == []


@pytest.mark.parametrize("layout", ["anchor", "prefix"])
def test_all_blocks_shared(layout: str) -> None:
    shared = shared_tensor_names(layout, 12, 12, NAMES)
    assert [name for name in NAMES if "layers" in name and name not in shared] == []


def test_the_identity_covers_layout_blocks_and_every_fingerprint() -> None:
    prints = {"b": "1", "a": "2"}
    identity = draft_identity("anchor", 1, prints)
    assert identity.startswith("anchor/1/")
    assert identity == draft_identity("anchor", 1, dict(reversed(prints.items())))
    assert identity == SharedTensors("anchor", 1, prints).identity
    others = [
        draft_identity("prefix", 1, prints),
        draft_identity("anchor", 2, prints),
        draft_identity("anchor", 1, {"b": "1", "a": "3"}),
        draft_identity("anchor", 1, {"b": "1"}),
        draft_identity("anchor", 1, {"b": "2", "a": "1"}),
    ]
    assert len({identity, *others}) == 6


@given(st.dictionaries(st.text(max_size=5), st.integers(0, 50), min_size=1, max_size=10))
def test_vocabulary_hash_depends_on_the_mapping_alone(vocabulary: dict[str, int]) -> None:
    vocabulary = {token: index for index, token in enumerate(sorted(vocabulary))}
    assert hash_vocabulary(vocabulary) == hash_vocabulary(dict(reversed(vocabulary.items())))
    assert hash_vocabulary(vocabulary) != hash_vocabulary({**vocabulary, "one more token": len(vocabulary)})
    shifted = {token: index + 1 for token, index in vocabulary.items()}
    assert hash_vocabulary(vocabulary) != hash_vocabulary(shifted)
