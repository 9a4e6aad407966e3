"""Merges a PEFT adapter into its base, and verifies that the result computes what the adapter does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from cloud_verifier.registry.adapter import adapter_tensor_names, check_adapter
from cloud_verifier.registry.version_files import list_own_files, loading_directory
from edge_runtime.protocol.errors import TargetError

# Length of the text on which the merged model is compared with the adapter beside its base.
COMPARED_TOKENS = 16
# By dtype: the largest difference of a logit, relative to the largest logit, that counts as rounding. 16-bit weights
# are rounded once more when an adapter is merged.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@torch.no_grad()
def merge_adapter(model: Any, path: Path) -> Any:
    """Merge the adapter at `path` into `model`, and return the merged model.

    Raises:
        TargetError: it cannot be merged exactly, or does not fit the model.
    """
    files = list_own_files(path)
    check_adapter(path)
    if getattr(model, "hf_quantizer", None) is not None:
        raise TargetError(f"{path} is an adapter of a quantized base, which would round it: name an unquantized base")
    # Imported here: peft takes a second.
    from peft import PeftConfig, PeftModel

    device = model.device
    with loading_directory(files) as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(str(directory))
        config.inference_mode = True
        if not getattr(config, "ensure_weight_tying", False):
            _untie_head(model, path)
        wrapped = PeftModel(model, config)
        loaded = wrapped.load_adapter(str(directory), "default", torch_device=str(device))
    if loaded.unexpected_keys or loaded.missing_keys:
        names = sorted([*loaded.unexpected_keys, *loaded.missing_keys])
        what = "has tensors that its base has no place for" if loaded.unexpected_keys else "lacks tensors"
        raise TargetError(f"the adapter at {path} {what}: {', '.join(names[:3])}; name the base it was trained on")
    wrapped = wrapped.eval()
    vocabulary_size = model.config.get_text_config(decoder=True).vocab_size
    # Spread over the vocabulary.
    ids = (torch.arange(COMPARED_TOKENS, device=device)[None] * 7919 + 3) % vocabulary_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = wrapped(**inputs).logits.float()
    merged: Any = wrapped.merge_and_unload().eval()
    error = float((merged(**inputs).logits.float() - expected).abs().max() / expected.abs().max())
    # Written so that NaN fails.
    if not error <= TOLERANCE.get(merged.dtype, TOLERANCE[torch.float32]):
        raise TargetError(f"the adapter at {path} cannot be merged into its base: its logits change by {error:.2g}")
    return merged


def _untie_head(model: Any, path: Path) -> None:
    """Give the head of `model` a weight of its own if an adapter changes it, or the embedding, but not both."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    names = [name for name, module in model.named_modules() if module in (head, embedding)]
    if any(key.startswith(f"{name}.") for key in adapter_tensor_names(path) for name in names):
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
