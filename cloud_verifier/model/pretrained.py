"""Loading a checkpoint with transformers: its text part, quantized or not, without running any code of it."""

from __future__ import annotations

import copy
import importlib.util
import re
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM

from cloud_verifier.draft_models.checkpoint import no_init_weights
from cloud_verifier.registry.checkpoint import load_config
from cloud_verifier.registry.version_files import LOADING_PREFIX, find_tensor_files, list_base_files, loading_directory
from edge_runtime.protocol.errors import TargetError

# transformers loads one model at a time: while loading it changes global state that affects all threads.
_LOAD_LOCK = threading.Lock()
# The longest text of a model that names no limit, such as a recurrent one. Chosen: enough for a long chat.
UNLIMITED_CONTEXT = 1 << 15
# How the tensors of a language model are named in a multimodal checkpoint, and alone.
_TEXT_TENSOR_NAMES = {r"^model\.language_model\.": "model."}
# Length of the text of which a multimodal model and its text part must give the same logits.
COMPARED_TOKENS = 12
# Where configurations name the length of text that a model was trained for.
_CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "context_length",
)  # fmt: skip
# By quantization method: the package that reads it and its module, for errors of transformers that do not name it.
QUANTIZATION_PACKAGES = {
    "awq": ("autoawq", "awq"), "gptq": ("gptqmodel", "gptqmodel"), "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed-tensors", "compressed_tensors"), "hqq": ("hqq", "hqq"), "eetq": ("eetq", "eetq"),
    "torchao": ("torchao", "torchao"), "fbgemm_fp8": ("fbgemm-gpu", "fbgemm_gpu"), "quark": ("amd-quark", "quark"),
}  # fmt: skip


def load_text_config(base: Path) -> Any:
    """The configuration of the text model of the checkpoint at `base`.

    Raises:
        TargetError: there is none, or it is not of a model that generates text.
    """
    config = load_config(base)
    auto_class(config, base)
    text_config = config.get_text_config(decoder=True)
    if not isinstance(getattr(text_config, "vocab_size", None), int):
        raise TargetError(f"{base} is a {config.model_type} model whose configuration names no vocab_size")
    return text_config


def usable_context(config: Any, requested: int | None, path: Path) -> int:
    """The longest text to serve, in tokens.

    Args:
        config: configuration of the text model.
        requested: the length to serve; None for the length that the model was trained for.
        path: for the error message.

    Raises:
        TargetError: `requested` is longer than that.
    """
    lengths = (getattr(config, name, None) for name in _CONTEXT_NAMES)
    trained = next((length for length in lengths if isinstance(length, int) and length > 0), None)
    if requested and trained and requested > trained:
        raise TargetError(f"{path} was trained for {trained} tokens, not {requested}")
    return requested or trained or UNLIMITED_CONTEXT


def load_pretrained(base: Path, device: str | torch.device, dtype: torch.dtype) -> Any:
    """Load the checkpoint at `base`, in eval mode. A multimodal one is loaded whole; see `text_part`.

    Nothing is unpickled, and no code of the checkpoint runs.

    Raises:
        TargetError: it does not load.
    """
    config = load_config(base)
    options: dict[str, Any] = {
        "config": config, "dtype": dtype, "trust_remote_code": False, "use_safetensors": True, "local_files_only": True,
    }  # fmt: skip
    quantization = quantization_method(config)
    if quantization:
        options["device_map"] = {"": torch.device(device)}
    try:
        with _LOAD_LOCK, loading_directory(list_base_files(base)) as directory:
            _check_size(config, base)
            model, info = _from_pretrained(auto_class(config, base), directory, options)
        if info["missing_keys"]:
            raise ValueError(f"its checkpoint lacks {', '.join(sorted(info['missing_keys'])[:3])}")
        if getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None):
            # transformers' default attention leaves soft-capping out without a word.
            model.set_attn_implementation("eager")
        if not quantization:
            model = model.to(device)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(_load_error(base, device, quantization, error)) from None
    return model.eval()


def check_parameter_count(count: int, base: Path) -> None:
    """Check that the weights of the checkpoint at `base` can be those of so many parameters, at one bit for each.

    Raises:
        TargetError: they cannot, or there are none.
    """
    size = sum(file.stat().st_size for file in set(find_tensor_files(base).values()))
    if count > 8 * size:
        raise TargetError(
            f"{base / 'config.json'} describes {count} parameters, and the weights have {size} bytes; copy the model "
            "again"
        )


def _check_size(config: Any, base: Path) -> None:
    """Check the size of the model before memory is reserved: transformers fills what the files lack.

    A model that cannot be built without memory, or not at all, is left to the loading. Raises TargetError.
    """
    model_class = auto_class(config, base)
    try:
        with no_init_weights(), torch.device("meta"):
            empty = model_class.from_config(copy.deepcopy(config))
    except Exception:
        return
    check_parameter_count(sum(parameter.numel() for parameter in empty.parameters()), base)


def _from_pretrained(model_class: Any, directory: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load the checkpoint at `directory`; only its text part if a package for the other parts is missing."""
    config = options["config"]
    try:
        loaded: tuple[Any, dict[str, Any]] = model_class.from_pretrained(directory, output_loading_info=True, **options)
    except ImportError as missing_package:
        text_config = config.get_text_config(decoder=True)
        text_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None)
        if text_config is config or text_class is None:
            raise
        options = options | {"config": text_config, "key_mapping": _TEXT_TENSOR_NAMES}
        try:
            loaded = text_class.from_pretrained(directory, output_loading_info=True, **options)
        except Exception:
            raise missing_package from None
    return loaded


def text_part(model: Any) -> Any:
    """The part of a multimodal model that generates from text alone, as the whole model does.

    The model itself is returned if it has no other parts, or if there is no such part: if transformers has no class for
    it, or the whole model does something else with a text. Otherwise the other parts are free to be collected.
    """
    config = model.config.get_text_config(decoder=True)
    text_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    head = model.get_output_embeddings()
    if config is model.config or text_class is None or isinstance(model, text_class) or head is None:
        return model
    with torch.device("meta"):
        text = text_class(config)
    text.set_output_embeddings(head)
    for name, child in text.named_children():
        twin = next((module for module in model.modules() if type(module) is type(child)), None)
        if child is not head and twin is not None:
            setattr(text, name, twin)
    if any(tensor.is_meta for tensor in (*text.parameters(), *text.buffers())):
        return model
    text.generation_config = model.generation_config
    text.eval()
    ids = torch.arange(3, 3 + COMPARED_TOKENS, device=model.device)[None]
    with torch.inference_mode():
        whole, part = (each(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for each in (model, text))
    return text if torch.allclose(whole, part, rtol=0, atol=1e-5 * float(whole.abs().max())) else model


def quantization_method(config: Any) -> str:
    """The name of the method by which a checkpoint is quantized; empty if it is not."""
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if not settings:
        return ""
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method) or "quantization")


def auto_class(config: Any, base: Path) -> Any:
    """The class of transformers that loads checkpoints of this configuration.

    Raises:
        TargetError: it is not a model that generates text.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    if type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise TargetError(f"{base} is an encoder-decoder model ({config.model_type}); serve a model that only decodes")
    raise TargetError(f"{base} is a {config.model_type} model, which does not generate text in transformers")


def _load_error(base: Path, device: str | torch.device, quantization: str, error: Exception) -> str:
    """One sentence about why a checkpoint does not load."""
    reason = re.sub(rf"\S*/{LOADING_PREFIX}\w+", lambda _: str(base), " ".join(str(error).split()))
    if quantization:
        named = re.search(r"pip install (?:-\S+ )*[\"'`]*([A-Za-z0-9_.-]+)", reason)
        package, module = QUANTIZATION_PACKAGES.get(quantization, ("", ""))
        if named and isinstance(error, ImportError):
            package = named[1]
        elif module and importlib.util.find_spec(module):
            package = ""
        if package:
            return f"{base} is quantized with {quantization}, which needs the package {package}: pip install {package}"
        return f"{base} is quantized with {quantization} and does not load on {device}: {reason[:300]}"
    return f"{base} does not load on {device}: {reason[:300]}"


def generation_end_ids(generation_config: Any) -> list[int]:
    """Return the tokens that end a text by a model's `generation_config`, which may be None: none, one or several."""
    ids = generation_config.eos_token_id if generation_config else None
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
