"""Finds the external files from which an ONNX graph reads tensors, without loading the graph.

onnxruntime opens whatever file a graph names as external data. The board has no package that parses ONNX, so the few
fields of the protobuf format that lead to a tensor are followed here. Field numbers are those of `onnx.proto`
(github.com/onnx/onnx); they never change.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.protocol.bundle import Bundle
from edge_runtime.protocol.errors import BundleCorrupt

# Fields that hold messages which may lead to a tensor, with the kinds of these messages, by kind of message.
_MESSAGE_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
# Wire types of protobuf: variable-length integer, 8 bytes, length and content, 4 bytes.
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# Protobuf's own limit for nested messages.
_MAX_DEPTH = 100


def find_external_files(graph: Path) -> set[str]:
    """The names of the files that hold tensors of the ONNX graph at `graph`, as it writes them: they may be any text.

    Raises:
        ValueError: it is not an ONNX graph.
        OSError: it cannot be read.
    """
    # Tensors inside the graph are skipped, not read.
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        locations = set(_locations(content, 0, len(content), "Model", _MAX_DEPTH))
    return {location.decode("utf-8", "replace") for location in locations}


def check_external_files(bundle: Bundle) -> None:
    """Check that the graph of a bundle reads tensors only from files that the manifest names.

    Raises:
        BundleCorrupt: it names another file.
        ValueError: it is not an ONNX graph.
        OSError: it cannot be read.
    """
    for name in sorted(find_external_files(bundle.graph_path) - bundle.manifest.files.keys()):
        raise BundleCorrupt(
            f"{bundle.graph_path} reads weights from {name[:200]!r}, which its manifest does not name: nobody hashed "
            "or signed that file; export the bundle again"
        )


def _locations(content: mmap.mmap, start: int, end: int, kind: str, depth: int) -> Iterator[bytes]:
    """The locations of external data in the message of this kind in `content[start:end]`. Raises ValueError."""
    if not depth:
        raise ValueError("it is nested too deeply")
    fields = _MESSAGE_FIELDS[kind]
    for number, first, last in _fields(content, start, end):
        inner = fields.get(number)
        if inner == "Entry":
            yield from _location(content, first, last)
        elif inner:
            yield from _locations(content, first, last, inner, depth - 1)


def _location(content: mmap.mmap, start: int, end: int) -> Iterator[bytes]:
    """The values of an entry of a tensor's external data, if one of its keys is `location`."""
    fields = [(number, content[first:last]) for number, first, last in _fields(content, start, end)]
    if (_ENTRY_KEY, b"location") in fields:
        yield from (text for number, text in fields if number == _ENTRY_VALUE)


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, first and last position of every field with a length in the message `content[start:end]`."""
    while start < end:
        tag, start = _varint(content, start, end)
        if tag >= 1 << 32:
            # Other readers truncate such a number, and would see another field.
            raise ValueError("a field has too large a number")
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            _, start = _varint(content, start, end)
        elif wire_type == _LENGTH:
            length, start = _varint(content, start, end)
            if length > end - start:
                raise ValueError("a field ends after its message")
            yield number, start, start + length
            start += length
        elif wire_type in (_FIXED32, _FIXED64):
            start += 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"a field has the type {wire_type}")
    if start > end:
        raise ValueError("a field ends after its message")


def _varint(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """The variable-length integer at `start`, and the position after it."""
    value = shift = 0
    while start < end and shift < 70:
        byte = content[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
        shift += 7
    raise ValueError("a number does not end")
