"""Converts GGUF files into Hugging Face directories.

transformers can load a GGUF file, but not all of it: RoPE scaling is ignored, tensors that it does not know are left
out, the tokenizer is rebuilt from a few fixed patterns, and end tokens get lost. So the configuration is completed here
from the metadata, by an allow-list: a file with a setting or a tensor that is not understood is refused, never served
without it. The tokenizer is rebuilt by `model.gguf_tokenizer`. transformers' rules for names and for the order of
weights are used as they are.

Quantized weights become bfloat16: its rounding (2^-9) is far below that of the quantization. Unquantized files keep
their type.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from cloud_verifier.model.gguf_tokenizer import CONTROL, GgufTokenizer
from cloud_verifier.registry.model_settings import check_model_settings
from edge_runtime.protocol.errors import TargetError

# Settings of an architecture that are understood in addition to those that transformers maps; see `_complete_config`.
EXTRA_SETTINGS = frozenset(
    {
        *("vocab_size", "context_length", "tensor_data_layout", "rope.dimension_count", "rope.freq_base"),
        *("attention.key_length", "attention.value_length", "attention.sliding_window", "attention.causal"),
        *("attn_logit_softcapping", "final_logit_softcapping", "expert_count", "expert_used_count"),
        *("expert_feed_forward_length", "expert_shared_feed_forward_length", "use_parallel_residual"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
        *("rope.scaling.finetuned", "rope.scaling.attn_factor"),
    }
)
# Settings that are copied into the configuration under another name, if it has that attribute.
COPIED_SETTINGS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "rope.freq_base": "rope_theta",
}
# Settings with bounds, by the name under which `model_settings` has them.
BOUNDED_SETTINGS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "num_experts": "expert_count",
}
# Tensors that describe RoPE and are no weights.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Llama 3.1's and 3.2's rule for RoPE (their config.json); a GGUF file stores only the factors that follow from it.
LLAMA3_LOW_FACTOR, LLAMA3_HIGH_FACTOR, LLAMA3_CONTEXT = 1.0, 4.0, 8192
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
# llama.cpp's, for files that do not name the base of their rotary embedding.
DEFAULT_ROPE_THETA = 10_000.0
# Chosen: bounds the memory of a conversion; a tensor of this size is still one shard.
SHARD_BYTES = 2_000_000_000
# Tokens that end a turn, if the chat template writes them: files name only one of them as EOS.
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|return|>")
# Sampling defaults by their GGUF name.
SAMPLING_DEFAULTS = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def convert_gguf(path: Path, directory: Path) -> None:
    """Convert the GGUF file `path` into a Hugging Face directory, which appears complete or not at all.

    It takes memory for one shard, and for the largest tensor in float32.

    Raises:
        TargetError: the file cannot be converted without loss of meaning, or the disk is full.
    """
    work = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _GgufFile(path).save(work)
        work.rename(directory)
    except TargetError as error:
        raise TargetError(f"{path} cannot be converted: {error}") from None
    except OSError as error:
        free = f"{shutil.disk_usage(work).free / 1e6:.0f} MB are free" if work.is_dir() else "it is not writable"
        raise TargetError(f"{path} cannot be converted into {directory}: {error} ({free} there)") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _GgufFile:
    """An opened GGUF file."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._path = path
        try:
            self._reader = GGUFReader(path)
            self._metadata: dict[str, Any] = {name: field.contents() for name, field in self._reader.fields.items()}
        except Exception as error:
            raise TargetError(f"it is damaged or incomplete: {error}") from None
        if self._metadata.get("split.count", 1) > 1:
            raise TargetError("it is one part of several: join them with llama.cpp's `llama-gguf-split --merge`")
        self._architecture = str(self._metadata.get("general.architecture"))

    def save(self, directory: Path) -> None:
        """Write configuration, tokenizer and weights into `directory`."""
        tokenizer = GgufTokenizer(self._metadata)
        config = self._save_config(tokenizer, directory)
        self._save_tokenizer(tokenizer, config, directory)
        self._save_weights(config, directory)

    def _setting(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self._architecture}.{name}", default)

    def _tensor(self, name: str) -> Any:
        return next((tensor for tensor in self._reader.tensors if tensor.name == name), None)

    def _save_config(self, tokenizer: GgufTokenizer, directory: Path) -> Any:
        """Write `config.json`, in the form that releases 4 and 5 of transformers read, and return what they read."""
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        bounded = {name: self._setting(stored) for name, stored in BOUNDED_SETTINGS.items()}
        check_model_settings(bounded, "its metadata")
        try:
            config = AutoConfig.from_pretrained(self._path.parent, gguf_file=self._path.name).to_diff_dict()
        except Exception as error:
            raise TargetError(f"transformers cannot read the architecture {self._architecture!r}: {error}") from None
        mappings: Mapping[str, Any] = GGUF_CONFIG_MAPPING
        mapped = mappings.get(config["model_type"]) or mappings.get(self._architecture, {})
        prefix = f"{self._architecture}."
        settings = {key.removeprefix(prefix) for key in self._metadata if key.startswith(prefix)}
        unknown = sorted(settings - set(mapped) - EXTRA_SETTINGS)
        if unknown:
            raise TargetError(
                f"it sets {', '.join(prefix + name for name in unknown)}, which would be ignored: use the model's "
                "Hugging Face directory instead"
            )
        # The file stores numbers such as 1e-5 as float32; their shortest decimal is what the model was made with.
        config = {name: _shortest(value) if isinstance(value, float) else value for name, value in config.items()}
        config = {name: value for name, value in config.items() if not name.endswith("_name_or_path")}
        # Release 5 has these in one, which no file sets.
        rope = config.pop("rope_parameters", None)
        if rope is not None:
            config |= {"rope_theta": DEFAULT_ROPE_THETA, "rope_scaling": None}
        self._complete_config(config)
        if config["vocab_size"] < len(self._metadata["tokenizer.ggml.tokens"]):
            raise TargetError(f"it has {config['vocab_size']} logits for a larger vocabulary")
        for role in ("bos", "eos", "pad"):
            text = tokenizer.special.get(f"{role}_token")
            config[f"{role}_token_id"] = None if text is None else tokenizer.tokenizer.token_to_id(text)
        config["dtype"] = str(self._dtype()).removeprefix("torch.")
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return AutoConfig.from_pretrained(directory)

    def _complete_config(self, config: dict[str, Any]) -> None:
        """Set what transformers leaves out. Raises TargetError for what the architecture cannot express."""
        if self._architecture == "llama" and self._setting("expert_count", 0):
            raise TargetError("mixtures of experts of the architecture 'llama' (Mixtral) are not supported")
        # The default of transformers' Mistral is a window of 4096, which only its first version had.
        if config["model_type"] == "mistral":
            config["sliding_window"] = None
        if "rope_theta" in config:
            config["rope_theta"] = DEFAULT_ROPE_THETA
        for name, attribute in COPIED_SETTINGS.items():
            value = self._setting(name)
            if value is None or (attribute == "head_dim" and attribute not in config):
                continue
            if attribute not in config:
                raise TargetError(f"it sets {name} to {value}, and a {config['model_type']} has no {attribute}")
            config[attribute] = _shortest(value) if isinstance(value, float) else value
        head_dim = config.get("head_dim") or self._setting("embedding_length") // self._setting("attention.head_count")
        for name in ("attention.key_length", "attention.value_length"):
            if self._setting(name, head_dim) != head_dim:
                raise TargetError(f"it sets {name} to {self._setting(name)}, and its heads have {head_dim} dimensions")
        rotated = int(head_dim * config.get("partial_rotary_factor", 1.0))
        if self._setting("rope.dimension_count", rotated) != rotated:
            raise TargetError(f"it rotates {self._setting('rope.dimension_count')} of {head_dim} dimensions")
        scaling = self._rope_scaling(config, head_dim)
        if scaling is not None:
            config["rope_scaling"] = scaling

    def _rope_scaling(self, config: dict[str, Any], head_dim: int) -> dict[str, Any] | None:
        """The `rope_scaling` of the configuration; None for plain RoPE."""
        kind = self._setting("rope.scaling.type", "none")
        factor = _shortest(self._setting("rope.scaling.factor", 1.0))
        original = self._setting("rope.scaling.original_context_length")
        freqs, long, short = (self._tensor(name) for name in ROPE_TENSORS)
        if long is not None and short is not None:
            # A setting of the model itself, from which the rule for the scaling of attention follows.
            config["original_max_position_embeddings"] = original or config["max_position_embeddings"]
            factors = {"long_factor": long.data.tolist(), "short_factor": short.data.tolist()}
            return {"rope_type": "longrope", "type": "longrope", **factors}
        if freqs is not None and not np.allclose(freqs.data, 1.0):
            return self._llama3_scaling(np.asarray(freqs.data, np.float64), config["rope_theta"], head_dim)
        if kind == "none" or factor in (0.0, 1.0):
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn" and original:
            scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
            attention = self._setting("rope.scaling.attn_factor")
            return scaling if attention in (None, 1.0) else {**scaling, "attention_factor": _shortest(attention)}
        raise TargetError(f"it scales RoPE by {kind!r} with the factor {factor}, which is not supported")

    def _llama3_scaling(self, stored: Any, theta: float, head_dim: int) -> dict[str, Any]:
        """The settings of Llama 3's rule from the factors that it gave, one for each frequency."""
        factor = float(np.round(stored.max(), 3))
        wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = (LLAMA3_CONTEXT / wavelength - LLAMA3_LOW_FACTOR) / (LLAMA3_HIGH_FACTOR - LLAMA3_LOW_FACTOR)
        expected = 1 / ((1 - smooth.clip(0, 1)) / factor + smooth.clip(0, 1))
        if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
            raise TargetError("its RoPE factors (rope_freqs.weight) follow no rule that transformers has")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LLAMA3_LOW_FACTOR,
            "high_freq_factor": LLAMA3_HIGH_FACTOR,
            "original_max_position_embeddings": LLAMA3_CONTEXT,
        }

    def _save_tokenizer(self, tokenizer: GgufTokenizer, config: Any, directory: Path) -> None:
        template = self._metadata.get("tokenizer.chat_template")
        names = self._metadata.get("tokenizer.chat_templates", ())
        # Not the class of the model's type, which may change the tokenizer.
        make_tokenizer: Any = PreTrainedTokenizerFast
        fast = make_tokenizer(
            tokenizer_object=tokenizer.tokenizer,
            clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"],
            model_max_length=config.max_position_embeddings,
            **tokenizer.special,
        )
        named = {name: self._metadata[f"tokenizer.chat_template.{name}"] for name in names}
        fast.chat_template = {"default": template, **named} if template and named else template
        fast.save_pretrained(directory, save_jinja_files=False)

    def _save_weights(self, config: Any, directory: Path) -> None:
        """Write the weights, one shard at a time in memory."""
        from gguf import dequantize
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        dtype = self._dtype()
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config)
        # A tied head is no parameter of its own, and some files repeat it.
        expected: dict[str, torch.Tensor] = dict(model.named_parameters())
        repeated = {"output.weight"} if config.tie_word_embeddings else set()
        names = self._tensor_names(model)
        make_processor: Any = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)
        processor = make_processor(config=config.to_dict())
        shards = ShardWriter(directory)
        for tensor in self._reader.tensors:
            if tensor.name in ROPE_TENSORS or tensor.name in repeated:
                continue
            # Some processors split a tensor into several, which they put here.
            parts: dict[str, torch.Tensor] = {}
            done = processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters={"tensors": parts},
            )
            if done.name is not None:
                parts[names.get(done.name, done.name)] = torch.from_numpy(np.array(done.weights))
            for name, values in parts.items():
                if name not in expected or expected[name].shape != values.shape:
                    shape = list(values.shape)
                    raise TargetError(f"it holds {tensor.name} of the shape {shape}, which a {config.model_type} lacks")
                shards.add(name, values.to(dtype))
                del expected[name]
        if expected:
            raise TargetError(f"it lacks {len(expected)} tensors of a {config.model_type}, such as {min(expected)}")
        shards.close()
        self._generation_config(config).save_pretrained(directory)
        path = directory / CONFIG_FILE
        saved = json.loads(path.read_text(encoding="utf-8")) | {"architectures": [type(model).__name__]}
        path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _tensor_names(self, model: Any) -> dict[str, str]:
        """Names of the model's tensors by their names in the file."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self._architecture)
        known = get_tensor_name_map(architecture, int(self._setting("block_count")))
        # All experts of a layer are one tensor in the file.
        names = {re.sub(r"mlp\.experts\.\d+\.", "mlp.experts.", name): name for name in model.state_dict()}
        found = {known.get_name(name, (".weight", ".bias")): name for name in names}
        return {file_name: name for file_name, name in found.items() if file_name is not None}

    def _dtype(self) -> torch.dtype:
        """The type of the matrices' weights if it is the same for all, else bfloat16."""
        types = {tensor.tensor_type.name for tensor in self._reader.tensors if len(tensor.shape) > 1}
        exact = {"F32": torch.float32, "F16": torch.float16}
        return exact.get(types.pop(), torch.bfloat16) if len(types) == 1 else torch.bfloat16

    def _generation_config(self, config: Any) -> Any:
        template = str(self._metadata.get("tokenizer.chat_template", ""))
        tokens, types = (self._metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
        ends = [self._metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
        ends += [
            index
            for index, token in enumerate(tokens)
            if types[index] == CONTROL and token in TURN_ENDS and token in template
        ]
        unique = list(dict.fromkeys(end for end in ends if end is not None))
        sampling = {
            name: self._metadata[f"general.sampling.{key}"]
            for key, name in SAMPLING_DEFAULTS.items()
            if f"general.sampling.{key}" in self._metadata
        }
        make_config: Any = GenerationConfig
        return make_config(
            bos_token_id=config.bos_token_id,
            eos_token_id=unique[0] if len(unique) == 1 else unique or None,
            pad_token_id=config.pad_token_id,
            do_sample=True if sampling else None,
            **sampling,
        )


class ShardWriter:
    """Writes tensors into safetensors files of limited size, with the index that transformers expects."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor; the shard is written when it is full."""
        if self._pending and self._pending_bytes + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def close(self) -> None:
        """Write the last shard, and the index if there are several."""
        self._flush()
        count = len(self._shards)
        files = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)] if count > 1 else [WEIGHTS_FILE]
        for number, file in enumerate(files):
            self._shard_path(number).rename(self._directory / file)
        if count > 1:
            weights = {name: file for file, names in zip(files, self._shards, strict=True) for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": weights}
            text = json.dumps(index, indent=2) + "\n"
            (self._directory / f"{WEIGHTS_FILE}.index.json").write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        path = self._shard_path(len(self._shards))
        save_file(self._pending, path, {"format": "pt"})
        self._shards.append(list(self._pending))
        self._total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _shard_path(self, number: int) -> Path:
        return self._directory / f"shard-{number}.safetensors"


def _shortest(number: float) -> float:
    """The shortest decimal that is `number` in float32."""
    return float(str(np.float32(number)))
