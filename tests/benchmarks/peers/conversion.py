"""Converts the target, and a bundle's draft, for the engines of `peers`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from edge_runtime.protocol.bundle import Bundle
from tests.benchmarks.verifier.random_models import make_random_model
from tests.toy_family import FAMILY

# Names of genai's configuration that bundles' graphs have, too.
GENAI_NAMES = {
    "inputs": {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    },
}
# Linear layers of a decoder layer of the Llama form: names in genai's graphs, and in GGUF files. Projections of
# queries, keys and values are one product in the graph.
LINEAR_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def write_random_target(shape: str, directory: Path, device: str) -> None:
    """Save a target of a real shape with random weights, with the tokenizer of the toy family.

    The tokens that this lacks get a text of their own: some servers fail on tokens that their tokenizer does not know.
    """
    model = make_random_model(shape, device)
    AutoTokenizer.from_pretrained(FAMILY / "target-v1").save_pretrained(directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"token{number}": number for number in range(len(vocabulary), model.config.vocab_size)}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    # Last: a directory with it is complete.
    model.save_pretrained(directory)
    del model
    # vLLM does not start where another process has much of the GPU's memory.
    torch.cuda.empty_cache()


def build_genai_target(target: Path, directory: Path, scratch: Path) -> None:
    """Let onnxruntime-genai's builder export a target in float32."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(target), "-o", str(directory)]
    subprocess.run([*command, "-p", "fp32", "-e", "cpu", "-c", str(scratch)], check=True, stdout=subprocess.DEVNULL)


def add_genai_draft(bundle: Bundle, directory: Path) -> None:
    """Put a bundle's graph, as it is, beside a target of onnxruntime-genai; `draft.json` is its configuration."""
    architecture, name = bundle.manifest.architecture, "draft"
    draft = directory / name
    draft.mkdir(exist_ok=True)
    for file in bundle.manifest.files:
        if file.startswith(bundle.manifest.graph.file):
            shutil.copyfile(bundle.path / file, draft / file)
    configuration = {
        "filename": f"{name}/{bundle.manifest.graph.file}",
        "hidden_size": architecture.hidden_size,
        "head_size": architecture.head_dim,
        "num_hidden_layers": architecture.layers,
        "num_key_value_heads": architecture.kv_heads,
        "num_attention_heads": architecture.hidden_size // architecture.head_dim,
        **GENAI_NAMES,
    }
    (directory / "draft.json").write_text(json.dumps(configuration))


def write_draft(bundle: Bundle, target: Path, directory: Path) -> None:
    """Write a bundle's draft as a checkpoint for transformers: its quantized weights as float32.

    Args:
        target: its checkpoint, of the same architecture but for the number of layers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(target)
    config.num_hidden_layers = bundle.manifest.architecture.layers
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: torch.tensor(array) for name, array in read_draft_weights(bundle).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # A head that is tied to the embedding is no weight of its own.
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"the weights of {bundle.path} are not those of {target}: {missing}, {unexpected}")
    model.tie_weights()
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (target / name).exists():
            shutil.copyfile(target / name, directory / name)


def read_draft_weights(bundle: Bundle) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of a bundle with genai's graph of a Llama, by their names in transformers, dequantized.

    What a quantized operator multiplies by is read off its product with the unit matrix.
    """
    import onnx

    graph = onnx.load(str(bundle.graph_path)).graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    final_norm = f"model.layers.{bundle.manifest.architecture.layers}.final_norm_layernorm.weight"
    weights: dict[str, npt.NDArray[np.float32]] = {}
    for node in graph.node:
        if node.op_type in ("MatMul", "MatMulNBits"):
            # For example /model/layers.0/attn/qkv_proj/MatMul_Q4.
            name = node.name.strip("/").rpartition("/")[0].replace("/", ".").replace(".attn.", ".self_attn.")
            weights |= _split_projections(bundle, name, _multiply_units(node, graph).T)
        elif node.op_type.endswith("SimplifiedLayerNormalization"):
            [name] = [each for each in node.input if each.endswith("layernorm.weight")]
            known = "model.norm.weight" if name == final_norm else name
            weights[known] = onnx.numpy_helper.to_array(values[name])
    # The head is the embedding.
    weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
    return weights


def _split_projections(
    bundle: Bundle, name: str, weight: npt.NDArray[np.float32]
) -> dict[str, npt.NDArray[np.float32]]:
    """The weight (out, in) of a linear layer; those of queries, keys and values are parts of one."""
    if not name.endswith("qkv_proj"):
        return {f"{name}.weight": np.ascontiguousarray(weight)}
    rows = bundle.manifest.architecture.kv_heads * bundle.manifest.architecture.head_dim
    query, key, value = np.split(weight, [len(weight) - 2 * rows, len(weight) - rows])
    prefix = name.removesuffix("qkv_proj")
    parts = zip("qkv", (query, key, value), strict=True)
    return {f"{prefix}{part}_proj.weight": np.ascontiguousarray(each) for part, each in parts}


def _multiply_units(node: Any, graph: Any) -> npt.NDArray[np.float32]:
    """The product of the unit matrix with the weight of a matrix product: (in, out)."""
    import onnxruntime
    from onnx import TensorProto, helper

    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    # In float32, rather than with the input quantized as well.
    attributes.pop("accuracy_level", None)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: each for each in graph.node for name in each.output}
    nodes, tensors, wanted = [], [], [name for name in node.input[1:] if name]
    # Some constants are computed, from smaller ones.
    while wanted:
        name = wanted.pop()
        if name in initializers:
            tensors.append(initializers[name])
        else:
            nodes.insert(0, producers[name])
            wanted += producers[name].input
    rows = attributes.get("K") or initializers[node.input[1]].dims[0]
    nodes.append(helper.make_node(node.op_type, ["x", *node.input[1:]], ["y"], domain=node.domain, **attributes))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, rows])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, None])]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    product = helper.make_graph(nodes, "product", inputs, outputs, tensors)
    model = helper.make_model(product, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: npt.NDArray[np.float32] = session.run(None, {"x": np.eye(rows, dtype=np.float32)})[0]
    return result


def write_float_gguf(source: Path, destination: Path) -> None:
    """Write a GGUF file with the weights that a checkpoint converted from `source` has: bfloat16 values as float32."""
    import gguf
    import torch

    reader = gguf.GGUFReader(source)
    tensors = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).bfloat16().float().numpy()
        for tensor in reader.tensors
    }
    _write_gguf(reader, destination, tensors, lambda _, value: value)


def write_draft_gguf(source: Path, draft: Path, destination: Path) -> None:
    """Write a GGUF file with the draft that `write_draft` wrote.

    Args:
        source: GGUF file of the target, whose metadata the draft shares but for the number of layers.
    """
    import gguf
    from safetensors.numpy import load_file

    reader, weights = gguf.GGUFReader(source), load_file(draft / "model.safetensors")
    config = json.loads((draft / "config.json").read_text())
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        for name, short in (LINEAR_LAYERS | NORMS).items():
            tensor = weights[f"model.layers.{layer}.{name}.weight"]
            if name.endswith(("q_proj", "k_proj")):
                # llama.cpp's Llama rotates neighbors, not halves.
                heads = config["num_attention_heads" if name.endswith("q_proj") else "num_key_value_heads"]
                halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
                tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
            tensors[f"blk.{layer}.{short}.weight"] = tensor

    def change(name: str, value: Any) -> Any:
        return config["num_hidden_layers"] if name.endswith(".block_count") else value

    _write_gguf(reader, destination, tensors, change)


def _write_gguf(reader: Any, destination: Path, tensors: Mapping[str, Any], change: Callable[[str, Any], Any]) -> None:
    """Write float32 tensors with the metadata of another file, as `change` changes it."""
    import gguf

    writer = gguf.GGUFWriter(destination, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, item_kind = field.types[0], field.types[-1]
        value = (
            gguf.LlamaFileType.ALL_F32 if field.name == "general.file_type" else change(field.name, field.contents())
        )
        writer.add_key_value(field.name, value, kind, sub_type=item_kind if kind == gguf.GGUFValueType.ARRAY else None)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
