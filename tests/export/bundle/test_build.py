"""Building bundles: parity, acceptance, reproducible bytes, and atomic output."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import export
from cloud_verifier.draft_models.checkpoint import save_draft
from cloud_verifier.draft_models.layouts import SUPPORTED_MODEL_TYPES, build_draft
from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.protocol.errors import DraftError, InputError
from export.bundle import onnx_graph
from export.bundle.build import BUILD_STEPS, BundleConfig, make_bundle
from export.cli.main import main
from tests.conftest import FAMILY
from tests.models import save_target

TEXT = "for index in range(10):\n    print(index)\n" * 3


def make(target: Path, draft: Path, output: Path, kind: str = "fused", weights: str = "fp32") -> OnnxDraft:
    steps: list[str] = []
    make_bundle(BundleConfig(target, draft, kind, weights, TEXT), output, steps.append)
    assert tuple(steps) == BUILD_STEPS
    return OnnxDraft.load(output, threads=1)


@pytest.mark.slow
# Every architecture as either kind of graph, each once with a tied table, which alternates between the architectures.
@pytest.mark.parametrize(
    ("model_type", "kind", "tied"),
    [
        (model_type, kind, (row + column) % 2 == 0)
        for row, model_type in enumerate(SUPPORTED_MODEL_TYPES)
        for column, kind in enumerate(["fused", "concat"])
    ],
)
def test_every_architecture_matches_pytorch(model_type: str, kind: str, tied: bool, tmp_path: Path) -> None:
    """Compares logits, with rollbacks in between: see `export.bundle.build._onnx_logits`."""
    target = save_target(tmp_path / "target", model_type, tie_word_embeddings=tied)
    manifest = make(target, target, tmp_path / "bundle", kind).manifest
    assert manifest.parity.positions > 50
    assert manifest.parity.greedy_agreement == 1.0
    assert manifest.parity.max_logit_difference < 1e-3
    # A draft that is its own target is always accepted, even when sampling, because the noise is shared.
    assert manifest.acceptance == {"T=0": 1.0, "T=0.7": 1.0, "T=1": 1.0}
    assert manifest.shared.identity.startswith("standalone/0/")


SCALED_ROPES: dict[str, dict[str, Any]] = {
    "llama3": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rope", "kind"), [*((rope, "fused") for rope in SCALED_ROPES), ("llama3", "concat"), ("yarn", "concat")]
)
def test_scaled_rope_matches_pytorch(rope: str, kind: str, tmp_path: Path) -> None:
    """The text is longer than the original context of the scaling."""
    target = save_target(tmp_path / "target", rope_scaling={"rope_type": rope, **SCALED_ROPES[rope]})
    manifest = make(target, target, tmp_path / "bundle", kind).manifest
    assert manifest.parity.positions > 3 * 32
    assert manifest.parity.greedy_agreement == 1.0
    assert manifest.parity.max_logit_difference < 1e-3


def test_a_rope_that_depends_on_the_length_needs_a_bounded_context(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0 + n / 8 for n in range(8)], "long_factor": [4.0] * 8}
    scaling = {"rope_type": "longrope", "factor": 4.0, **factors}
    target = save_target(tmp_path / "target", rope_scaling=scaling, original_max_position_embeddings=64)
    with pytest.raises(InputError, match="--context 64"):
        make(target, target, tmp_path / "bundle")
    config = BundleConfig(target, target, "fused", "fp32", TEXT, context=64)
    parity = make_bundle(config, tmp_path / "bundle", lambda _: None).parity
    assert (parity.positions > 100, parity.greedy_agreement) == (True, 1.0)


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_a_graph_that_is_another_function_is_no_bundle(
    weights: str, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the weights are rounded, so that coarse weights hide nothing."""
    tables = onnx_graph._rotary_tables
    monkeypatch.setattr(onnx_graph, "_rotary_tables", lambda *inputs: [table**2 for table in tables(*inputs)])
    with pytest.raises(DraftError, match="agrees with PyTorch at only"):
        make(tiny_path, tiny_path, tmp_path / "bundle", weights=weights)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_a_quantized_anchor_draft_of_every_architecture(model_type: str, tmp_path: Path) -> None:
    """The usual bundle: new and shared blocks, 8 bits, and a tied table that is both embedding and head."""
    path = save_target(tmp_path / "target", model_type, num_hidden_layers=4, initializer_range=0.1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    draft, plan = build_draft(model, "anchor", new_blocks=1, shared_blocks=1)
    save_draft(draft, plan, path, tmp_path / "draft")
    manifest = make(path, tmp_path / "draft", tmp_path / "bundle", weights="int8").manifest
    assert manifest.architecture.layers == 2
    assert manifest.parity.greedy_agreement > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_an_anchor_draft_has_the_identity_that_its_target_expects(tied: bool, tmp_path: Path) -> None:
    path = save_target(tmp_path / "target", num_hidden_layers=4, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    draft, plan = build_draft(model, "anchor", new_blocks=1, shared_blocks=1)
    save_draft(draft, plan, path, tmp_path / "draft")
    manifest = make(path, tmp_path / "draft", tmp_path / "bundle").manifest
    target = Target(path, device="cpu", dtype=torch.float32)
    assert manifest.shared.identity == target.expected_identity(manifest.shared.identity)
    assert manifest.vocabulary.hash == target.vocabulary
    assert ("lm_head.weight" in manifest.shared.fingerprints) is not tied
    assert "model.layers.3.mlp.up_proj.weight" in manifest.shared.fingerprints


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int4", "mixed", "int8"])
def test_quantized_weights_are_smaller_and_close(weights: str, tmp_path: Path) -> None:
    target = save_target(tmp_path / "target", hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    exact = make(target, target, tmp_path / "fp32").manifest
    small = make(target, target, tmp_path / weights, weights=weights).manifest
    # Random weights are more sensitive than trained ones: on the shipped draft int4 agrees at 86 %.
    bits, agreement = {"int4": (4, 0.15), "mixed": (8, 0.4), "int8": (8, 0.8)}[weights]
    share = small.files["model.onnx.data"].bytes / exact.files["model.onnx.data"].bytes
    # Rotary tables are not quantized, and each block of 32 has a scale.
    assert share < (bits + 2) / 32 + 0.15
    assert small.parity.greedy_agreement > agreement


def arguments(target: Path, output: Path, *options: str) -> list[str]:
    """Of `draft-export`."""
    (output.parent / "text").write_text(TEXT)
    return ["onnx", str(target), str(target), "--text", str(output.parent / "text"), "--output", str(output), *options]


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(tiny_path: Path, tmp_path: Path) -> None:
    """In another directory, in a process with another hash seed and number of threads, from sources that differ.

    Without --text, too: the text that ships does not depend on the sources.
    """
    root, copy = Path(__file__).parents[3], tmp_path / "sources"
    for package in ("edge_runtime", "cloud_verifier", "export", "device_profiles"):
        for source in (root / package).rglob("*"):
            if source.suffix in (".py", ".txt", ".toml") and source.is_file():
                (copy / source.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy / source.relative_to(root))
        with (copy / package / "__init__.py").open("a") as file:
            file.write("\n# An unrelated change.\n")
    lines: dict[str, list[list[str]]] = {}
    for name in ("one", "two"):
        directory = tmp_path / name
        directory.mkdir()
        trim = ("--trim-vocabulary", str(directory / "text"))
        lines[name] = [
            arguments(tiny_path, directory / "fused", *trim, "--weights", "mixed"),
            arguments(tiny_path, directory / "concat", *trim, "--graph", "concat", "--weights", "int4"),
            ["onnx", str(tiny_path), str(tiny_path), "--positions", "200", "--output", str(directory / "shipped-text")],
        ]
    program = "import json, sys; from export.cli.main import main; sys.exit(any(map(main, json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", program, json.dumps(lines["two"])]
    environ = os.environ | {"PYTHONPATH": str(copy), "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "2"}
    with subprocess.Popen(command, cwd=copy, env=environ, stdout=subprocess.DEVNULL) as process:
        assert [main(line) for line in lines["one"]] == [0, 0, 0]
        assert process.wait(300) == 0
    for bundle in ("fused", "concat", "shipped-text"):
        first, second = (
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name / bundle).iterdir()}
            for name in ("one", "two")
        )
        assert first == second
        assert len(first) >= 4
    manifest = read_bundle(tmp_path / "two" / "shipped-text").manifest
    assert manifest.acceptance["T=1"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fused", "concat"])
def test_a_full_disk_leaves_no_files(
    kind: str, tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on file sizes simulates the full disk: the same calls fail, in Python and in native libraries."""
    line = arguments(tiny_path, tmp_path / "bundle", "--graph", kind, "--weights", "fp32")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = main(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert code == 2, message
    assert f"draft-export: cannot make {tmp_path / 'bundle'}: " in message
    assert re.search(r"File too large.* MB are free there", message)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    assert main(line) == 0


@pytest.mark.slow
def test_a_killed_run_leaves_no_bundle_and_the_next_one_cleans_up(tiny_path: Path, tmp_path: Path) -> None:
    output, partial = tmp_path / "bundle", tmp_path / ".bundle.partial"
    line = [sys.executable, "-m", "export.cli", *arguments(tiny_path, output, "--graph", "concat")]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    while not (partial / "tokenizer.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(InputError, match="another process is making"):
        make(tiny_path, tiny_path, output)
    process.kill()
    process.wait()
    assert partial.is_dir()
    assert not output.exists()
    make(tiny_path, tiny_path, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "text"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fused", "concat"])
def test_a_text_longer_than_the_context_is_split(kind: str, tiny_path: Path, tmp_path: Path) -> None:
    config = BundleConfig(tiny_path, tiny_path, kind, "fp32", TEXT, context=32)
    manifest = make_bundle(config, tmp_path / "bundle", lambda _: None)
    assert manifest.parity.positions == len(TEXT)
    assert manifest.parity.greedy_agreement == manifest.acceptance["T=1"] == 1.0
    assert OnnxDraft.load(tmp_path / "bundle").new_context().limit == 32


def test_bad_input_leaves_no_files(tiny_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no concat graph with int3 weights"):
        make(tiny_path, tiny_path, tmp_path / "bundle", "concat", "int3")
    with pytest.raises(InputError, match="positions end at 512"):
        make_bundle(
            BundleConfig(tiny_path, tiny_path, "fused", "fp32", TEXT, context=9999), tmp_path / "bundle", lambda _: None
        )
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_not_overwritten(tiny_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        make(tiny_path, tiny_path, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*/file/bundle: Not a directory"):
        make(tiny_path, tiny_path, tmp_path / "file" / "bundle")


def test_the_command(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bundle"
    line = arguments(tiny_path, output, "--weights", "fp32")
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "100.0% same argmax" in printed
    assert "100.0% at T=1" in printed
    made = json.loads((output / "manifest.json").read_text())["made"]
    assert made["onnxruntime-genai"]
    assert read_bundle(output).manifest.graph.weights == "fp32"
    assert main(line) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["onnx", str(tiny_path), str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 2


@pytest.mark.slow
def test_a_bundle_matches_all_versions_of_its_target(family: Path) -> None:
    bundle = read_bundle(family / "bundle")
    targets = [Target(family / f"target-v{number}", device="cpu", dtype=torch.float32) for number in (1, 2, 3, 4)]
    identity = bundle.manifest.shared.identity
    assert identity.startswith("anchor/0/")
    for target in targets:
        assert target.expected_identity(identity) == identity
        assert target.vocabulary == bundle.manifest.vocabulary.hash
    assert len({target.version for target in targets}) == len(targets)


def test_a_bundle_can_be_rebuilt_from_its_draft(family: Path, tmp_path: Path) -> None:
    shipped = read_bundle(family / "bundle").manifest
    config = BundleConfig(
        *(family / "target-v1", family / "draft-anchor", shipped.graph.kind, shipped.graph.weights, TEXT),
        positions=2,
        acceptance=False,
    )
    manifest = make_bundle(config, tmp_path / "bundle", lambda _: None)
    # Bit for bit; only the measured figures depend on the text.
    assert manifest.files == shipped.files
    assert manifest.shared == shipped.shared


SHIPPED = Path(export.__file__).parent / "example_family"


@pytest.mark.parametrize(("directory", "megabytes"), [(FAMILY, 8), (SHIPPED, 48)], ids=["toy", "example"])
def test_the_weights_in_the_repository_fit_their_budget(directory: Path, megabytes: int) -> None:
    weights = [path for pattern in ("*.safetensors", "*.onnx", "*.onnx.data") for path in directory.rglob(pattern)]
    assert 0 < sum(path.stat().st_size for path in weights) < megabytes * 1_000_000
