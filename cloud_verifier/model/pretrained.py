"""Loading a checkpoint with transformers: its text part, quantized or not, without running any code of it."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM

from cloud_verifier.registry.checkpoint import load_config
from edge_runtime.protocol.errors import TargetError

# transformers loads one model at a time: while loading it changes global state that affects all threads.
_LOAD_LOCK = threading.Lock()
# The longest text of a model that names no limit, such as a recurrent one. Chosen: enough for a long chat.
UNLIMITED_CONTEXT = 1 << 15
# Where configurations name the length of text that a model was trained for.
_CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "context_length",
)  # fmt: skip
# Packages that read a quantization method, where transformers does not name them.
_QUANTIZATION_PACKAGES = {"awq": "autoawq", "gptq": "gptqmodel", "bitsandbytes": "bitsandbytes"}


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
        with _LOAD_LOCK:
            model, info = _auto_class(config, base).from_pretrained(base, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise ValueError(f"its checkpoint lacks {', '.join(sorted(info['missing_keys'])[:3])}")
        if not quantization:
            model = model.to(device)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(_load_error(base, device, quantization, error)) from None
    return model.eval()


def text_part(model: Any) -> Any:
    """The part of a multimodal model that generates from text alone, or the model itself if there is no such part.

    The other parts are free to be collected.
    """
    config = model.config.get_text_config(decoder=True)
    text_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if config is model.config or text_class is None or isinstance(model, text_class):
        return model
    with torch.device("meta"):
        text = text_class(config)
    decoder = next((module for module in model.modules() if type(module) is type(text.base_model)), None)
    head = model.get_output_embeddings()
    if decoder is None or decoder is model or head is None:
        return model
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(head)
    if any(parameter.is_meta for parameter in text.parameters()) or any(buffer.is_meta for buffer in text.buffers()):
        return model
    text.generation_config = model.generation_config
    return text.eval()


def quantization_method(config: Any) -> str:
    """The name of the method by which a checkpoint is quantized; empty if it is not."""
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if not settings:
        return ""
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method) or "quantization")


def _auto_class(config: Any, base: Path) -> Any:
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
    reason = " ".join(str(error).split())
    if quantization:
        named = re.search(r"pip install (?:-\S+ )*[\"'`]*([A-Za-z0-9_.-]+)", reason)
        package = named[1] if named else _QUANTIZATION_PACKAGES.get(quantization, "")
        if isinstance(error, ImportError | ModuleNotFoundError) and package:
            return f"{base} is quantized with {quantization}, which needs the package {package}: pip install {package}"
        return f"{base} is quantized with {quantization} and does not load on {device}: {reason[:300]}"
    return f"{base} does not load on {device}: {reason[:300]}"
