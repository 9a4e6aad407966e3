"""Decoder layers compile once for forwards of all sizes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cloud_verifier.model.layer_compilation import compile_layers, decoder_layers, keep_compiled_code
from cloud_verifier.model.target import load_model
from tests.models import VOCABULARY_SIZE, save_target

# More sizes than Dynamo's default limit of recompilations.
SIZES = (8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 500)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_one_compilation_serves_all_layers_and_sizes(tmp_path: Path, model_type: str) -> None:
    path = save_target(tmp_path / "model", model_type, num_hidden_layers=4)
    expected, model = (load_model(path, "cpu", "float32")[0] for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config: Any = torch._dynamo.config
    with torch.inference_mode(), config.patch(fail_on_recompile_limit_hit=True, recompile_limit=config.recompile_limit):
        # What Inductor makes of a graph is its own matter: how many graphs there are does not depend on it.
        layers = compile_layers(model, backend="aot_eager")
        assert len(layers) == 4
        for size in SIZES:
            ids = torch.arange(size)[None] % VOCABULARY_SIZE
            arguments = {"input_ids": ids, "position_ids": torch.arange(size)[None], "use_cache": False}
            actual = model(**arguments).logits
            torch.testing.assert_close(actual, expected(**arguments).logits, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_a_model_without_a_list_of_layers_is_not_compiled(tiny_path: Path) -> None:
    model = load_model(tiny_path, "cpu", "float32")[0]
    assert len(decoder_layers(model)) == model.config.num_hidden_layers
    model.config.num_hidden_layers += 1
    assert compile_layers(model) == []


def test_the_environment_says_where_compiled_code_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    keep_compiled_code(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
