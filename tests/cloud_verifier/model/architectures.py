"""Tiny checkpoints of the architectures that transformers generates with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.models import VOCABULARY_SIZE, byte_tokenizer

Settings: TypeAlias = dict[str, Any]

# Windows and chunks of attention, and chunks of recurrence, in tokens: shorter than the longer prompts of the tests.
WINDOW, CHUNK = 16, 8
CONTEXT = 512

_COMMON: Settings = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
_SLIDING: Settings = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MAMBA2: Settings = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": CHUNK}
_EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED_EXPERTS: Settings = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT_ATTENTION: Settings = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_DECODER: Settings = {
    "d_model": 64, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4, "pad_token_id": 1,
}  # fmt: skip
_VISION: Settings = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_VISION: Settings = {
    "depth": 1, "hidden_size": 64, "embed_dim": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64,
    "patch_size": 14,
}  # fmt: skip
_MROPE: Settings = {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}}


def _text(**settings: Any) -> Settings:
    return _COMMON | settings


# By model type: what its configuration needs in addition to `_COMMON`.
TEXT_MODELS: dict[str, Settings] = {
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "cohere": {},
    "cohere2": _SLIDING,
    "ctrl": {"n_positions": CONTEXT, "dff": 128},
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _ROUTED_EXPERTS | _LATENT_ATTENTION,
    "deepseek_v3": _ROUTED_EXPERTS | _LATENT_ATTENTION,
    "diffllama": {},
    "doge": {},
    "dots1": _ROUTED_EXPERTS,
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 32},
    "exaone4": _SLIDING,
    "falcon": {"alibi": True, "multi_query": False, "new_decoder_architecture": False},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "falcon_mamba": {"state_size": 8},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0},
    "gemma3_text": _SLIDING,
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "sliding_window": WINDOW, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY_SIZE,
        "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [128] * 4,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": _ROUTED_EXPERTS,
    "gpt2": {"n_positions": CONTEXT},
    "gpt_bigcode": {"n_positions": CONTEXT},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "num_layers": 2, "num_heads": 4},
    "gpt_neox": {},
    "gpt_oss": _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"n_positions": CONTEXT, "rotary_dim": 8},
    "granite": {},
    "granitemoe": {"num_local_experts": 4},
    "granitemoehybrid": _MAMBA2 | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
        "shared_intermediate_size": 64,
    },
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 64},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2, 2]},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2,
        "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_d_state": 8,
    },
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": WINDOW, "num_local_experts": 2,
        "intermediate_size_mlp": 64, "no_rope_layers": [1, 0],
    },
    "longcat_flash": _LATENT_ATTENTION | {
        "num_layers": 2, "ffn_hidden_size": 64, "n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 2,
        "expert_ffn_hidden_size": 32,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": CHUNK},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "block_size": CHUNK},
    "ministral": _SLIDING,
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4},
    "modernbert-decoder": {"local_attention": WINDOW, "pad_token_id": 1},
    "mpt": {"max_seq_len": CONTEXT, "d_model": 64, "n_heads": 4, "n_layers": 2},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "openai-gpt": {"n_positions": CONTEXT},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": _EXPERTS | {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 32,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": WINDOW, "lru_width": 64},
    "rwkv": {"attention_hidden_size": 64, "context_length": CONTEXT},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": WINDOW},
    "trocr": _DECODER,
    "vaultgemma": {"sliding_window": WINDOW},
    "xglm": {"d_model": 64, "ffn_dim": 128, "attention_heads": 4, "num_layers": 2},
    "zamba": {
        "num_hidden_layers": 4, "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 8, "n_mamba_heads": 2,
        "use_mamba_kernels": False, "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 16,
        "chunk_size": CHUNK, "num_mem_blocks": 1, "attention_head_dim": 32, "use_mem_rope": True,
    },
}  # fmt: skip
# A model of which transformers 4.57 reads no prompt that is longer than a chunk.
XLSTM: Settings = {"embedding_dim": 64, "num_heads": 4, "num_blocks": 2, "qk_dim_factor": 1.0, "chunk_size": 16}
# The whole configuration of models that also take images.
MULTIMODAL_MODELS: dict[str, Settings] = {
    "gemma3": {"text_config": _text(**_SLIDING), "vision_config": _VISION, "mm_tokens_per_image": 4},
    "idefics3": {"text_config": _text(model_type="llama"), "vision_config": _VISION, "scale_factor": 1},
    "llama4": {
        "text_config": _text(**TEXT_MODELS["llama4_text"]),
        "vision_config": _VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "llava": {
        "text_config": _text(model_type="llama"), "vision_config": _VISION | {"model_type": "clip_vision_model"},
        "image_token_index": 5,
    },
    "mistral3": {
        "text_config": _text(model_type="mistral"), "vision_config": _VISION | {"model_type": "pixtral"},
        "image_token_index": 5,
    },
    "paligemma": {
        "text_config": _text(model_type="gemma"),
        "vision_config": _VISION | {"model_type": "siglip_vision_model", "projection_dim": 64}, "projection_dim": 64,
    },
    "qwen2_5_vl": {
        "text_config": _text(**_MROPE, model_type="qwen2_5_vl_text"),
        "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [0]},
    },
}  # fmt: skip
ARCHITECTURES = sorted([*TEXT_MODELS, *MULTIMODAL_MODELS])


def save_architecture(path: Path, model_type: str, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model of `model_type` with random weights, and a tokenizer."""
    if model_type in MULTIMODAL_MODELS:
        settings = MULTIMODAL_MODELS[model_type] | changes
    else:
        settings = _COMMON | TEXT_MODELS.get(model_type, {}) | changes
    if model_type == "falcon":
        # A property of its configuration.
        del settings["head_dim"]
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    factory = AutoModelForImageTextToText if model_type in MULTIMODAL_MODELS else AutoModelForCausalLM
    factory.from_config(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<|endoftext|>").save_pretrained(path)
    return path
