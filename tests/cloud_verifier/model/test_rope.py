"""RoPE whose frequencies depend on the length of the text: each text has its own, in any batch and chunks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.rope import LengthScaledRope
from cloud_verifier.model.target import Target, load_model
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.sampling import CoupledSampler, Sampling
from tests.cloud_verifier.protocol_client import ProtocolClient, running
from tests.models import VOCABULARY_SIZE, save_target

# Texts of more tokens than this use the long factors.
SWITCH = 64
FACTORS = {"short_factor": [1 + index / 10 for index in range(8)], "long_factor": [2.0 + index for index in range(8)]}
LONGROPE = {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": SWITCH}
# Below, at and above the switch; some texts cross it while they are generated.
PROMPTS = [[(37 * index + 11 * length) % 299 + 1 for index in range(length)] for length in (5, 50, 61, 64, 65, 200)]
SAMPLINGS = [Sampling(ignore_eos=True), Sampling(0.9, seed=3, ignore_eos=True)]


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("models") / "phi3", "phi3", **LONGROPE)


@torch.inference_mode()
def generate_without_cache(model: Any, prompt: list[int], sampling: Sampling, count: int) -> list[int]:
    """What `generate` means for texts that cross the switch; that of transformers 5 forgets the text there."""
    sampler, ids = CoupledSampler(VOCABULARY_SIZE), list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].numpy()
        ids.append(sampler.rank(logits, sampling, len(ids)).ids[0])
    return ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_texts_of_all_lengths_in_one_batch_equal_generate(phi3: Path, sampling: Sampling) -> None:
    target = Target(phi3, device="cpu", dtype=torch.float32)
    assert (target.context, target.general_tier_reason) == (512, "")
    model = load_model(phi3, "cpu", "float32")[0]
    expected = [generate_without_cache(model, prompt, sampling, 24) for prompt in PROMPTS]
    for index in (0, 4, 5):
        assert generate_reference(model, PROMPTS[index], sampling, 24, frozenset()) == expected[index]
    assert generate_in_company(target, sampling, expected) == expected


def generate_in_company(target: Target, sampling: Sampling, expected: list[list[int]]) -> list[list[int]]:
    """Generate the texts after all prompts at once through a verifier, with drafts that are partly right."""
    with running(target) as url, ProtocolClient(url) as client, ThreadPoolExecutor(len(PROMPTS)) as threads:

        def generate(index: int) -> list[int]:
            prompt, text = PROMPTS[index], expected[index]
            session = client.open(prompt, sampling, n=1 + index % 3)
            while (done := len(session.ids) - len(prompt)) < len(text):
                draft = [*text[done : done + 5], 7]
                session.run_round(draft=draft, siblings={0: [9], len(draft) - 1: [11]}, n=2)
            return session.ids[len(prompt) :][: len(text)]

        return list(threads.map(generate, range(len(PROMPTS))))


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_a_model_that_keeps_the_keys_of_its_prompt(tmp_path: Path, sampling: Sampling) -> None:
    """Llama with LongRoPE: `generate` continues with long factors after a prompt that has short ones."""
    scaling = LONGROPE["rope_scaling"] | {"factor": 8.0, "original_max_position_embeddings": SWITCH}
    path = save_target(tmp_path / "llama", original_max_position_embeddings=SWITCH, rope_scaling=scaling)
    target = Target(path, device="cpu", dtype=torch.float32)
    assert (target.context, target.general_tier_reason, target.replays_prompt) == (512, "", True)
    model = load_model(path, "cpu", "float32")[0]
    expected = [generate_reference(model, prompt, sampling, 24, frozenset()) for prompt in PROMPTS]
    assert generate_in_company(target, sampling, expected) == expected
    # A session that was lost in the middle, reopened with what it had generated.
    prompt, text = PROMPTS[2], expected[2]
    with running(target) as url, ProtocolClient(url) as client:
        session = client.open([*prompt, *text[:10]], sampling, n=14, generated=10)
    assert session.ids[len(prompt) :] == text


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "linear", "factor": 2.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_other_scaling_is_a_function_of_the_position(tmp_path: Path, scaling: dict[str, Any]) -> None:
    path = save_target(tmp_path / "llama", rope_scaling=scaling)
    target = Target(path, device="cpu", dtype=torch.float32)
    assert (target.context, target.general_tier_reason) == (512, "")


def test_an_unknown_dependence_on_the_length_is_refused(tmp_path: Path) -> None:
    class OddRotaryEmbedding(torch.nn.Module):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return position_ids[..., None] / position_ids.max()

    model = load_model(save_target(tmp_path / "llama"), "cpu", "float32")[0]
    model.model.rotary_emb = OddRotaryEmbedding()
    with pytest.raises(TargetError, match="OddRotaryEmbedding depends on the length of the text"):
        LengthScaledRope(model)
