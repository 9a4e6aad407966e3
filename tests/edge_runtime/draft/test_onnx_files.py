"""Files that an ONNX graph names besides itself; graphs are made, and read again, by the package `onnx`."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import msgspec
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo, _get_all_tensors, uses_external_data

from edge_runtime.draft.model import OnnxDraft
from edge_runtime.draft.onnx_files import find_external_files
from edge_runtime.protocol.bundle import record_file, write_manifest
from edge_runtime.protocol.errors import BundleCorrupt
from tests.edge_runtime.bundles.bundle_files import read_manifest


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def graph_of(name: str, location: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [], [external(f"{name}.weight", location)])


def model_of(*locations: str) -> onnx.ModelProto:
    """A model with external tensors in every place where one can be."""
    places = iter(locations)
    branch = graph_of("branch", next(places), helper.make_node("Identity", ["x"], ["y"]))
    node = helper.make_node("If", ["condition"], ["z"], then_branch=branch)
    node.attribute.add(name="tensors", type=onnx.AttributeProto.TENSORS).tensors.append(external("a", next(places)))
    node.attribute.add(name="graphs", type=onnx.AttributeProto.GRAPHS).graphs.append(graph_of("g", next(places)))
    constant = helper.make_node("Constant", [], ["c"], value=external("constant", next(places)))
    graph = graph_of("main", next(places), node)
    sparse = graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(external("values", next(places)))
    sparse.indices.CopyFrom(external("indices", next(places)))
    model = helper.make_model(graph)
    model.functions.append(helper.make_function("own", "f", [], ["c"], [constant], [helper.make_opsetid("", 20)]))
    model.training_info.add().algorithm.CopyFrom(graph_of("training", next(places)))
    return model


PLACES = 8


@pytest.mark.parametrize("place", range(PLACES))
def test_no_place_of_a_tensor_is_missed(tmp_path: Path, place: int) -> None:
    locations = [f"file{number}" for number in range(PLACES)]
    locations[place] = "../../etc/shadow"
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of(*locations).SerializeToString())
    assert find_external_files(path) == set(locations)


@given(st.data())
def test_a_changed_graph_names_all_files_that_onnx_finds_in_it(data: st.DataObject) -> None:
    content = bytearray(model_of(*"abcdefgh").SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        model = onnx.load_from_string(bytes(content))
        tensors = [ExternalDataInfo(tensor) for tensor in _get_all_tensors(model) if uses_external_data(tensor)]
    except Exception:
        return
    expected = {tensor.location for tensor in tensors}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(content)
        try:
            found = find_external_files(path)
        except ValueError:
            return
    assert expected - {""} <= found


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 40, b"\x3b" * 8])
def test_other_files_are_no_graphs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"empty|field|number"):
        find_external_files(path)


@pytest.mark.parametrize("location", ["other.data", "../other.data", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "\x1b[2J"])
def test_a_draft_loads_no_file_that_its_manifest_does_not_name(family: Path, tmp_path: Path, location: str) -> None:
    """However the graph names it, and although it is there, with the right content."""
    bundle = shutil.copytree(family / "bundle", tmp_path / "bundle")
    for name in ("bundle/other.data", "other.data"):
        shutil.copy(bundle / "model.onnx.data", tmp_path / name)
    graph = onnx.load(bundle / "model.onnx", load_external_data=False)
    for entry in next(tensor for tensor in graph.graph.initializer if uses_external_data(tensor)).external_data:
        if entry.key == "location":
            entry.value = location
    (bundle / "model.onnx").write_bytes(graph.SerializeToString())
    manifest = read_manifest(bundle)
    files = {name: record_file(bundle / name) for name in manifest.files}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    with pytest.raises(BundleCorrupt, match=re.escape(f"{location!r}, which its manifest does not name")):
        OnnxDraft.load(bundle)
