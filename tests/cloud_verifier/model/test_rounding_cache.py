"""A KV cache in fewer bits: what is rounded, and where it is refused. `test_simulated_gpu` compares it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloud_verifier.cli.main import main
from cloud_verifier.model.kv_cache import CACHE_FORMATS, round_to
from cloud_verifier.model.rounding_cache import RoundingCache
from cloud_verifier.model.target import Target, load_model
from edge_runtime.protocol.errors import TargetError
from tests.models import save_target

FP8 = CACHE_FORMATS["fp8"]


def test_large_numbers_become_the_largest() -> None:
    values = torch.tensor([1e6, -1e6, 449.0, 0.3, 0.0])
    rounded = round_to(values, FP8)
    assert rounded.dtype.itemsize == 1
    assert rounded.float().tolist() == [448, -448, 448, 0.3125, 0]
    assert round_to(values, torch.float32) is values


def test_a_model_attends_to_rounded_keys_and_values_from_the_beginning(tmp_path: Path) -> None:
    model = load_model(save_target(tmp_path / "model"), "cpu", "float32")[0]
    ids = torch.tensor([[5, 9, 3, 80, 41, 7]])
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        whole, parts = RoundingCache(model, FP8), RoundingCache(model, FP8)
        rounded = model(input_ids=ids, past_key_values=whole).logits
        last = [model(input_ids=ids[:, index : index + 1], past_key_values=parts).logits for index in range(6)][-1]
    assert not torch.allclose(rounded, plain, atol=1e-3)
    assert torch.allclose(last[0, -1], rounded[0, -1], atol=1e-4)


def test_a_cpu_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_target(tmp_path / "model")
    assert main(["serve", str(path), "--kv-cache-dtype", "fp8"]) != 0
    assert "--kv-cache-dtype fp8 needs --device cuda" in capsys.readouterr().err
    with pytest.raises(TargetError, match="only a GPU has a KV cache in another dtype"):
        Target(path, device="cpu", dtype=torch.float32, cache_format="fp8")


def test_a_registry_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--registry", str(tmp_path), "--device", "cuda", "--kv-cache-dtype", "fp8"]) != 0
    assert "--kv-cache-dtype is for a TARGET" in capsys.readouterr().err
