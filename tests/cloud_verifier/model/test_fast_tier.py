"""Which models the fast tier takes, what it finds in them, and that a model which it refuses is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cloud_verifier.model.batch import FULL_SPAN, AttentionSpan
from cloud_verifier.model.fast_tier import PagedAttention
from cloud_verifier.model.kv_cache import KVCacheShape
from cloud_verifier.model.runner import TargetRunner
from cloud_verifier.model.self_test import TOLERANCE, SelfTest
from cloud_verifier.model.target import load_model, make_runner
from edge_runtime.protocol.errors import TargetError
from tests.models import save_target

CONTEXT = 256
WINDOW = AttentionSpan(100)
MLA = {
    "head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12, "num_key_value_heads": 4, "first_k_dense_replace": 2,
}  # fmt: skip


def load(path: Path, model_type: str, **changes: Any) -> Any:
    """A loaded model, as transformers makes it."""
    return load_model(save_target(path / model_type, model_type, **changes), "cpu", "float32")[0]


@pytest.mark.parametrize(
    ("model_type", "changes", "spans"),
    [
        ("llama", {}, [FULL_SPAN, FULL_SPAN]),
        ("mistral", {"sliding_window": 100}, [WINDOW, WINDOW]),
        ("mistral", {"sliding_window": 3}, [AttentionSpan(3)] * 2),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}, [FULL_SPAN, WINDOW]),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, [FULL_SPAN, FULL_SPAN]),
        ("gemma2", {"sliding_window": 100}, [WINDOW, FULL_SPAN]),
        ("llama4_text", {"attention_chunk_size": 100, "num_local_experts": 2}, [AttentionSpan(100, chunked=True)] * 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_spans_of_layers(tmp_path: Path, model_type: str, changes: dict[str, Any], spans: list[AttentionSpan]) -> None:
    model = load(tmp_path, model_type, **changes)
    window = getattr(model.config, "sliding_window", None)
    PagedAttention(model)
    assert [layer.self_attn.attention_span for layer in model.model.layers] == spans
    assert getattr(model.config, "sliding_window", None) == window


@pytest.mark.parametrize(
    ("model_type", "changes", "heads", "head_size"),
    [
        ("llama", {}, 2, 16),
        # Keys have 8 + 16 elements, values 12.
        ("deepseek_v2", MLA, 4, 24),
        # Its layers repeat the KV heads in what they pass on (transformers 4); the cache holds each once.
        ("stablelm", {}, 2, 16),
    ],
)
def test_shape_of_the_cache(
    tmp_path: Path, model_type: str, changes: dict[str, Any], heads: int, head_size: int
) -> None:
    shape = PagedAttention(load(tmp_path, model_type, **changes)).shape
    assert shape == KVCacheShape(2, heads, head_size, torch.float32, torch.device("cpu"))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # Its attention mask depends on the values.
    ("doge", {}, "has a mask that is neither causal, nor a sliding window, nor chunks"),
    # It has no attention at all, or not in all layers.
    ("mamba", {}, "of its 2 layers are attention"),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, "1 of its 2 layers are attention"),
    # Recurrent layers beside attention.
    (
        "falcon_h1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16},
        "needs more of its cache than keys and values",
    ),
]
if transformers.__version__.startswith("4."):
    # Layers read keys and values that other layers have cached, if there is a cache.
    REFUSED.append(
        (
            "gemma3n_text",
            {
                "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 300,
                "activation_sparsity_pattern": [0.0] * 4,
            },
            "do not follow from the positions given",
        )
    )  # fmt: skip
else:
    # Queries are scaled by the number of rows before them.
    REFUSED.append(
        ("llama4_text", {"num_local_experts": 2, "floor_scale": 8, "num_hidden_layers": 4}, "follow from the positions")
    )


@pytest.mark.parametrize(("model_type", "changes", "reason"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused_models_are_left_as_transformers_made_them(
    tmp_path: Path, model_type: str, changes: dict[str, Any], reason: str
) -> None:
    model = load(tmp_path, model_type, **changes)
    ids = torch.arange(1, 40)[None]
    before, names = model(input_ids=ids).logits, set(vars(model))
    with pytest.raises(TargetError, match=reason):
        make_runner(model, CONTEXT, tested=True)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert set(vars(model)) == names
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_obstacle_is_found_without_changing_the_model(tmp_path: Path) -> None:
    model = load(tmp_path, "doge")
    implementation = model.config._attn_implementation
    with pytest.raises(TargetError, match="DogeAttention has a mask"):
        PagedAttention(model)
    assert model.config._attn_implementation == implementation


def run_self_test(model: Any, change: Any) -> None:
    """Run the self-test after `change` has spoiled the prepared model."""
    attention = PagedAttention(model)
    test = SelfTest(model, attention, CONTEXT)
    change()
    test.run(TargetRunner(model, attention))


@pytest.mark.parametrize("size", [0, 9, 11])
def test_the_self_test_finds_a_wrong_window(tmp_path: Path, size: int) -> None:
    model = load(tmp_path, "mistral", sliding_window=10)

    def change() -> None:
        model.model.layers[1].self_attn.attention_span = AttentionSpan(size)

    with pytest.raises(TargetError, match="differ by"):
        run_self_test(model, change)


def test_the_self_test_finds_lost_sinks(tmp_path: Path) -> None:
    model = load(tmp_path, "gpt_oss", num_local_experts=2, num_experts_per_tok=1)

    def change() -> None:
        model.model.layers[0].self_attn.sinks.data += 1

    with torch.no_grad(), pytest.raises(TargetError, match="differ by"):
        run_self_test(model, change)


def test_the_self_test_passes_with_long_windows(tmp_path: Path) -> None:
    model = load(tmp_path, "mistral", sliding_window=4096, max_position_embeddings=8192)
    run_self_test(model, lambda: None)
    assert model.model.layers[0].self_attn.attention_span == AttentionSpan(4096)


def test_the_self_test_allows_for_what_forwards_of_transformers_differ_by(tmp_path: Path) -> None:
    model = load(tmp_path, "llama")
    attention = PagedAttention(model)
    test = SelfTest(model, attention, CONTEXT)
    tolerance = TOLERANCE[torch.float32] * float(test._expected_text.abs().max())
    known = [test._expected_text, test._expected_branch, test._expected_other]

    def run(difference: float, spread: float) -> None:
        test._expected_text, test._expected_branch, test._expected_other = (each + difference for each in known)
        test._spread = spread
        test.run(TargetRunner(model, attention))

    run(2 * tolerance, spread=1.2 * tolerance)
    for difference, spread in ((2 * tolerance, 0.5 * tolerance), (6 * tolerance, 100 * tolerance)):
        with pytest.raises(TargetError, match="differ by"):
            run(difference, spread)


def test_layers_may_have_different_numbers_of_heads(tmp_path: Path) -> None:
    model = load(tmp_path, "llama")
    layer = model.model.layers[1].self_attn
    layer.num_key_value_groups = 1
    layer.k_proj, layer.v_proj = (torch.nn.Linear(64, 4 * 16, bias=False) for _ in range(2))
    run_self_test(model, lambda: None)
    attention = PagedAttention(model)
    assert (attention.shape.heads, attention.group) == (4, 2)
