"""A target whose keys and values are rounded in the KV cache: another version, exact within itself."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch

from cloud_verifier.cli.main import main
from cloud_verifier.model.kv_cache import CACHE_FORMATS, round_to
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.messages import ModelList
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.engine.test_scheduler import running_scheduler, submit_opening
from tests.cloud_verifier.model.architectures import save_architecture
from tests.cloud_verifier.protocol_client import ProtocolClient, command_service, running_service

# Longer than a chunk of a prompt.
PROMPT, TOKENS = [(17 * index + index * index) % 250 + 3 for index in range(140)], 32


def make_target(path: Path, cache_format: str = "fp8") -> Target:
    return Target(path, device="cpu", dtype=torch.float32, cache_format=cache_format)


# Plain, with windows and a soft cap, and with sinks.
@pytest.mark.parametrize(
    ("model_type", "sampling"),
    [
        ("llama", Sampling(ignore_eos=True)),
        ("llama", Sampling(1.0, seed=4, ignore_eos=True)),
        ("gemma2", Sampling(2.0, seed=1, ignore_eos=True)),
        ("gpt_oss", Sampling(1.0, seed=4, ignore_eos=True)),
    ],
    ids=["llama, greedy", "llama", "gemma2", "gpt_oss"],
)
async def test_the_text_is_that_of_generate_with_rounded_keys_and_values(
    tmp_path: Path, model_type: str, sampling: Sampling
) -> None:
    path = save_architecture(tmp_path / "model", model_type)
    target = make_target(path)
    model, _, end_ids = load_model(path, "cpu", torch.float32)
    reference, unrounded = (
        generate_reference(model, PROMPT, sampling, TOKENS, end_ids, cache_format=cache_format)
        for cache_format in ("fp8", "")
    )
    assert reference != unrounded
    async with running_scheduler(target) as scheduler:
        streamed = [submit_opening(scheduler, target, PROMPT, sampling, n=TOKENS)[1] for _ in range(2)]
        drafted = submit_opening(scheduler, target, PROMPT, sampling, draft=[*reference[:5], 1])[1]
        for reply in streamed:
            assert (await reply.result()).tokens == reference
        frame = await drafted.result()
        assert (frame.accepted, frame.tokens) == (5, reference[5:6])


def test_the_format_is_a_part_of_the_version_and_takes_less_memory(tmp_path: Path) -> None:
    path = save_architecture(tmp_path / "model", "llama")
    rounded, plain = make_target(path), make_target(path, "")
    assert rounded.version == f"{plain.version}-kv-fp8"
    assert 4 * rounded.runner.shape.bytes_per_token == plain.runner.shape.bytes_per_token
    # Rounding makes larger differences of what differs in the last bit.
    assert rounded.close_call_margin > plain.close_call_margin


def test_a_target_of_the_general_tier_has_no_such_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_architecture(tmp_path / "model", "mamba")
    with pytest.raises(TargetError, match="no KV cache in fp8"):
        make_target(path)
    assert main(["generate", str(path), "text", "--kv-cache-dtype", "fp8"]) != 0
    assert "no KV cache in fp8" in capsys.readouterr().err


def test_large_numbers_become_the_largest() -> None:
    values = torch.tensor([1e6, -1e6, 449.0, 0.3, 0.0])
    rounded = round_to(values, CACHE_FORMATS["fp8"])
    assert rounded.dtype.itemsize == 1
    assert rounded.float().tolist() == [448, -448, 448, 0.3125, 0]
    assert round_to(values, torch.float32) is values


def test_a_registry_has_no_such_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--registry", str(tmp_path), "--kv-cache-dtype", "fp8"]) != 0
    assert "--kv-cache-dtype is for a TARGET" in capsys.readouterr().err


@pytest.mark.slow
def test_serve_and_generate_give_the_same_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_architecture(tmp_path / "model", "llama")
    jobs = tmp_path / "jobs.jsonl"
    sampling = Sampling(1.0, seed=6, ignore_eos=True)
    jobs.write_bytes(msgspec.json.encode({"ids": PROMPT, "max_new_tokens": TOKENS, "sampling": sampling}))
    options = ["--threads", "1", "--kv-cache-dtype", "fp8"]
    assert main(["generate", str(path), "--jobs", str(jobs), *options]) == 0
    reference = json.loads(capsys.readouterr().out)
    with running_service(command_service(path, *options)) as url, ProtocolClient(url) as client:
        session = client.open(list(PROMPT), sampling, n=TOKENS)
        assert session.ids == PROMPT + reference
        [model] = client.decode_reply(client.http.get("/v1/models"), ModelList).data
        assert model.version.endswith("-kv-fp8")
