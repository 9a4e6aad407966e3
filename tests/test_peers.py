"""The engines of the benchmark `peers`, and what others read of ours: a bundle is a draft for onnxruntime-genai."""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import load_model
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.draft.onnx_runner import make_runner
from edge_runtime.protocol.bundle import Bundle, read_bundle
from edge_runtime.protocol.sampling import Sampling
from tests.benchmarks.peers import conversion, engines
from tests.benchmarks.peers.stopwatch import first_token_seconds, seconds_per_token, tokens_per_second
from tests.clients_environment import require_python
from tests.toy_family import FAMILY

TARGET, PROMPT, TOKENS = FAMILY / "target-v1", [7, 300, 20, 11, 450, 90], 32


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(FAMILY / "bundle")


@pytest.fixture(scope="module")
def draft_checkpoint(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("draft")
    conversion.write_draft(bundle, TARGET, directory)
    return directory


@pytest.fixture(scope="module")
def expected_text() -> list[int]:
    """What transformers' `generate` writes."""
    model, _, _ = load_model(TARGET, "cpu", torch.float32)
    return generate_reference(model, PROMPT, Sampling(ignore_eos=True), TOKENS, frozenset())


def make_options(**fields: Any) -> argparse.Namespace:
    """Options for an engine, as `peers` gives them, for one stream."""
    options = {"prompts": [PROMPT], "tokens": TOKENS, "threads": 1, "draft_tokens": 4, "target": TARGET}
    options |= {"device": "cpu", "dtype": "float32"}
    return argparse.Namespace(**dict.fromkeys(engines.PATHS, Path()) | options | fields)


@pytest.mark.slow
def test_a_bundle_is_a_draft_for_onnxruntime_genai(bundle: Bundle, expected_text: list[int], tmp_path: Path) -> None:
    python = require_python()
    conversion.build_genai_target(TARGET, tmp_path / "genai", tmp_path / "scratch")
    conversion.add_genai_draft(bundle, tmp_path / "genai")
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "genai" / "draft" / file).read_bytes() == (bundle.path / file).read_bytes()
    options = json.dumps(vars(make_options(genai=tmp_path / "genai")), default=str)
    command = [python, engines.__file__, "onnxruntime-genai, drafting", options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    [text] = result["texts"]
    assert text[:TOKENS] == expected_text
    statistics = result["statistics"]
    # The draft that our board runs has as much accepted of this text.
    assert statistics["draft_tokens_accepted"] > 0.5 * statistics["draft_tokens_evaluated"]
    assert statistics["target_forward_passes"] < 0.7 * TOKENS


def test_a_draft_for_transformers_is_that_of_the_bundle(bundle: Bundle, draft_checkpoint: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(draft_checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].numpy()
    expected = make_runner(OnnxDraft(bundle, threads=1).session, bundle.manifest.architecture).append(PROMPT)
    # The board's products are with activations in eight bits.
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()
    assert logits.argmax() == expected.argmax()


@pytest.mark.parametrize("name", ["transformers, static", "transformers, drafting"])
@pytest.mark.slow
def test_transformers_writes_the_same_text(name: str, draft_checkpoint: Path, expected_text: list[int]) -> None:
    [text] = engines.SINGLE_STREAM[name](make_options(draft=draft_checkpoint))["texts"]
    assert text[:TOKENS] == expected_text


def test_processor_time_is_read_of_one_stream_on_a_cpu_alone() -> None:
    def processor_time() -> float:
        return 0.0

    assert engines.find_clock(make_options(), processor_time) is processor_time
    assert engines.find_clock(make_options(device="cuda"), processor_time) is time.perf_counter
    assert engines.find_clock(make_options(prompts=[PROMPT, PROMPT]), processor_time) is time.perf_counter


def test_figures_of_streams() -> None:
    # Seconds, processor seconds, tokens: two streams, whose last tokens arrive together.
    arrivals = [[(1.0, 0.5, 1), (1.5, 0.75, 1), (2.5, 1.0, 2)], [(2.0, 1.0, 1), (3.0, 1.5, 4)]]
    assert first_token_seconds(arrivals) == [1.0, 2.0]
    assert seconds_per_token(arrivals) == [0.5, 0.5, 0.5, *4 * [0.25]]
    assert tokens_per_second(arrivals) == 7 / 2.0
