"""Drafts with a trimmed head: the same logits, the noise of the true ids, and the target's text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from edge_runtime.bundles.self_test import check_draft
from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.protocol.bundle import read_bundle, read_head_ids, record_file, write_manifest
from edge_runtime.protocol.errors import BundleCorrupt, BundleMissing, InputError
from edge_runtime.protocol.sampling import CoupledSampler, Sampling
from edge_runtime.verifier.client import VerifierClient
from export.bundle.build import HEAD_FILE, BundleConfig, make_bundle
from export.bundle.vocab_trim import select_head_ids
from export.cli.main import main
from tests.conftest import serving
from tests.models import VOCABULARY_SIZE, byte_tokenizer, save_target

TEXT = "for index in range(10):\n    print(index)\n" * 3
PROMPT = [40, 41, 42, 50, 60]
SAMPLINGS = [Sampling(), Sampling(temperature=0.7, seed=3), Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=4)]


@pytest.fixture(scope="module", params=["fused", "concat"])
def config(request: pytest.FixtureRequest, tiny_path: Path) -> BundleConfig:
    return BundleConfig(tiny_path, tiny_path, request.param, "fp32", TEXT, head_text=TEXT)


@pytest.fixture(scope="module")
def bundle(config: BundleConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trimmed") / "bundle"
    make_bundle(config, path, lambda step: None)
    return path


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32).eval()


def test_head_ids_are_those_of_the_text_and_the_special_ones() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(select_head_ids(tokenizer, "banana", VOCABULARY_SIZE).tolist()) == "abn"
    assert tokenizer.decode(select_head_ids(tokenizer, "banana!", VOCABULARY_SIZE, max_ids=2).tolist()) == "an"
    tokenizer.add_special_tokens(["<|endoftext|>"])
    assert select_head_ids(tokenizer, "banana!", VOCABULARY_SIZE, max_ids=3)[0] == 0
    for text in ("", "aaaa"):
        with pytest.raises(InputError, match="fewer than two different tokens"):
            select_head_ids(byte_tokenizer(), text, VOCABULARY_SIZE)


def test_parity_and_acceptance_of_a_trimmed_head(bundle: Path) -> None:
    manifest = read_bundle(bundle).manifest
    ids = read_head_ids(read_bundle(bundle))
    assert ids is not None and 10 < len(ids) < 40
    assert manifest.files[HEAD_FILE].bytes < 500
    assert manifest.parity.greedy_agreement == 1.0
    assert manifest.parity.max_logit_difference < 1e-3
    # A random target chooses any id; those that are in the head, the draft chooses too.
    assert 0.0 < manifest.acceptance["T=1"] < 0.5


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_proposes_the_best_of_the_remaining_ids(bundle: Path, model: torch.nn.Module, sampling: Sampling) -> None:
    draft = OnnxDraft.load(bundle, threads=1)
    head = read_head_ids(read_bundle(bundle))
    context = draft.new_context()
    proposal = context.propose(PROMPT, 8, sampling, Plan(8, siblings=2, sibling_confidence=1.0))
    assert set(proposal.tokens) <= set(head.tolist())
    ids = list(PROMPT)
    for index, token in enumerate(proposal.tokens):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
        only = np.full(VOCABULARY_SIZE, np.float32(-1e30))
        only[head] = logits[head]
        ranked = CoupledSampler(VOCABULARY_SIZE).rank(only, sampling, len(ids), 3).ids
        named = [token, *proposal.siblings.get(index, [])]
        # top-p may leave fewer candidates.
        assert named == ranked[: len(named)]
        ids.append(token)
    context.rollback(len(PROMPT) - 1)
    assert context.propose(PROMPT, 8, sampling).tokens == proposal.tokens


@pytest.mark.slow
async def test_the_text_is_the_targets(bundle: Path, tiny_path: Path, tiny: Target) -> None:
    draft = OnnxDraft.load(bundle, threads=1)
    reference, _, end_ids = load_model(tiny_path, "cpu", "float32")
    async with serving(tiny) as server, VerifierClient(server.url) as client:
        for sampling in SAMPLINGS:
            planner = FixedPlanner(Plan(4, siblings=2))
            generation = Generation(draft, client, PROMPT, sampling, max_new_tokens=40, planner=planner)
            pieces = [piece async for piece in generation]
            text = [token for piece in pieces for token in piece.accepted + piece.own]
            assert text == generate_reference(reference, PROMPT, sampling, 40, end_ids)


def test_a_trimmed_bundle_passes_the_self_test(bundle: Path) -> None:
    assert check_draft(bundle).tokens


@pytest.mark.slow
def test_a_damaged_head_file_is_an_error(bundle: Path, tmp_path: Path) -> None:
    whole = read_bundle(bundle)

    def with_head(ids: np.ndarray | bytes) -> Path:
        path = tmp_path / "changed"
        path.mkdir(exist_ok=True)
        for name in whole.manifest.files:
            (path / name).unlink(missing_ok=True)
            (path / name).write_bytes((bundle / name).read_bytes())
        if isinstance(ids, bytes):
            (path / HEAD_FILE).write_bytes(ids)
        else:
            np.save(path / HEAD_FILE, ids)
        files = whole.manifest.files | {HEAD_FILE: record_file(path / HEAD_FILE)}
        write_manifest(path, msgspec.structs.replace(whole.manifest, files=files))
        return path

    head = read_head_ids(whole)
    with pytest.raises(BundleCorrupt, match=f"logits of {len(head)} ids, but its manifest says {len(head) - 1}"):
        OnnxDraft.load(with_head(head[1:]))
    for wrong in (head[::-1].copy(), head + VOCABULARY_SIZE, head.astype(np.int64), head[:0], head[None]):
        with pytest.raises(BundleCorrupt, match="does not hold ascending ids below 300"):
            OnnxDraft.load(with_head(wrong))
    for garbage in (b"", b"ids", b"\x93NUMPY\x01\x00"):
        with pytest.raises(BundleCorrupt, match="is not a list of ids"):
            OnnxDraft.load(with_head(garbage))
    (tmp_path / "changed" / HEAD_FILE).unlink()
    with pytest.raises(BundleMissing, match=f"lacks {HEAD_FILE}"):
        read_bundle(tmp_path / "changed")
    files = {name: record for name, record in whole.manifest.files.items() if name != HEAD_FILE}
    write_manifest(tmp_path / "changed", msgspec.structs.replace(whole.manifest, files=files))
    with pytest.raises(BundleCorrupt, match=f"records no hash for {HEAD_FILE}"):
        read_bundle(tmp_path / "changed")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4-k", "fp16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_trimmed_head_is_quantized_like_a_whole_one(weights: str, tied: bool, tmp_path: Path) -> None:
    """Also if the embedding that the head was tied to stays whole."""
    target = save_target(tmp_path / "target", tie_word_embeddings=tied)
    config = BundleConfig(target, target, "fused", weights, TEXT, head_text=TEXT)
    trimmed = make_bundle(config, tmp_path / "trimmed", lambda step: None)
    whole = make_bundle(dataclasses.replace(config, head_text=None), tmp_path / "whole", lambda step: None)
    assert trimmed.parity.max_logit_difference <= whole.parity.max_logit_difference * 1.2
    if not tied:
        assert trimmed.files["model.onnx.data"].bytes < whole.files["model.onnx.data"].bytes
    assert len(OnnxDraft.load(tmp_path / "trimmed").new_context().propose([65, 66], 4, Sampling()).tokens) == 4


def test_the_command(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(TEXT)
    arguments = ["onnx", str(tiny_path), str(tiny_path), "--weights", "int8", "--no-acceptance", "--text"]
    arguments += [str(tmp_path / "text"), "--trim-vocabulary", str(tmp_path / "text"), "--head-size", "12"]
    assert main([*arguments, "--output", str(tmp_path / "bundle")]) == 0
    assert "acceptance by the target on given text: not measured" in capsys.readouterr().out
    bundle = read_bundle(tmp_path / "bundle")
    assert len(read_head_ids(bundle)) == 12
    assert bundle.manifest.acceptance == {}
    assert main([*arguments[:-4], "--trim-vocabulary", str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 2
    assert "cannot read the text" in capsys.readouterr().err
