"""A target that is quantized when it is loaded: another version, exact within itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from cloud_verifier.cli.main import build_parser
from cloud_verifier.model import quantization
from cloud_verifier.model.quantization import METHODS, Fp8Linear, Int8Linear, QuantizedLinear, unrounded_inputs
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.engine.recording_target import running_scheduler, submit_opening
from tests.models import save_target

PROMPT, TOKENS = [17, 30, 205, 9, 77], 24


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    return save_target(tmp_path_factory.mktemp("models") / "llama", "llama", **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(ignore_eos=True), Sampling(1.0, seed=4, ignore_eos=True)], ids=str)
async def test_the_text_is_that_of_the_quantized_target(path: Path, sampling: Sampling) -> None:
    plain, target = (Target(path, device="cpu", dtype=torch.float32, quantize=method) for method in ("", "int8"))
    assert target.version == f"{plain.version}-int8"
    assert not target.general_tier_reason
    model, _, end_ids = load_model(path, "cpu", torch.float32, "int8")
    reference = generate_reference(model, PROMPT, sampling, TOKENS, end_ids)
    assert reference != generate_reference(load_model(path, "cpu", "float32")[0], PROMPT, sampling, TOKENS, end_ids)
    async with running_scheduler(target) as scheduler:
        streamed = [submit_opening(scheduler, target, PROMPT, sampling, n=TOKENS)[1] for _ in range(3)]
        drafted = submit_opening(scheduler, target, PROMPT, sampling, draft=reference[:5])[1]
        for reply in streamed:
            assert (await reply.result()).tokens == reference
        frame = await drafted.result()
        assert (frame.accepted, frame.tokens) == (5, reference[5:6])


def test_quantized_weights_take_a_quarter_of_the_memory(path: Path) -> None:
    model, plain = (load_model(path, "cpu", "float32", method)[0] for method in ("int8", ""))
    quantized, before = model.model.layers[0].mlp.up_proj, plain.model.layers[0].mlp.up_proj.weight
    assert quantized.weight.nbytes == before.nbytes // 4
    error = (quantized.weight * quantized.scale[:, None] - before).abs().amax(1)
    # Half a step of 127.
    assert bool((error <= before.abs().amax(1) / 250).all())


def test_the_package_that_is_missing_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(TargetError, match=r"pip install 'flexspec\[quantize\]'"):
        load_model(path, "cpu", "bfloat16", "int4")


def test_a_cpu_refuses_fp8(path: Path) -> None:
    with pytest.raises(TargetError, match="a CPU has int8"):
        load_model(path, "cpu", "bfloat16", "fp8")


def test_float16_has_no_room_for_fp8_products(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_check_device", lambda model, method: None)
    with pytest.raises(TargetError, match="--dtype bfloat16"):
        load_model(path, "cpu", "float16", "fp8")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer_class", [Int8Linear, Fp8Linear])
def test_rows_of_a_quantized_layer_are_close_and_independent(layer_class: type[QuantizedLinear], bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    linear = torch.nn.Linear(64, 48, bias=bias)
    # Rows of very different sizes, and one of zeros; on a GPU in bfloat16.
    inputs = torch.randn(2, 9, 64, generator=generator) * 10.0 ** torch.arange(-4.0, 5.0)[:, None]
    inputs[0, 4] = 0
    with torch.inference_mode():
        expected, layer = linear(inputs), layer_class(linear)
        actual = layer(inputs)
        tolerance = {Int8Linear: 0.01, Fp8Linear: 0.1}[layer_class] * expected.abs().amax(-1, keepdim=True)
        assert bool(((actual - expected).abs() <= tolerance + 1e-6).all())
        torch.testing.assert_close(actual[1, 2], layer(inputs[1, 2:3])[0])


def test_an_fp8_layer_can_leave_its_inputs_unrounded() -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.inference_mode():
        layer, inputs = Fp8Linear(torch.nn.Linear(64, 48)), torch.randn(7, 64, generator=generator)
        weight = layer.weight.float() * layer.scale[:, None]
        expected = torch.nn.functional.linear(inputs, weight, layer.bias)
        rounded = layer(inputs)
        with unrounded_inputs():
            torch.testing.assert_close(layer(inputs), expected)
        assert torch.equal(layer(inputs), rounded) and not torch.allclose(rounded, expected, atol=1e-3)


def test_wrong_products_of_fp8_numbers_are_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_check_device", lambda model, method: None)
    load_model(path, "cpu", "bfloat16", "fp8")
    product = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *given, **named: 1.5 * product(*given, **named))
    with pytest.raises(TargetError, match="products of fp8 numbers are wrong on cpu"):
        load_model(path, "cpu", "bfloat16", "fp8")


def test_the_command_line_has_all_methods() -> None:
    parser = build_parser()
    for method in METHODS:
        for command in ("serve", "generate"):
            assert parser.parse_args([command, "target", "--quantize", method]).quantize == method
