from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.draft.model import OnnxDraft, Proposal
from edge_runtime.draft.onnx_runner import FusedRunner, make_runner
from edge_runtime.planning.plan import Plan
from edge_runtime.protocol.bundle import Bundle, read_bundle, record_file, write_manifest
from edge_runtime.protocol.errors import BundleCorrupt, BundleMissing, ContextOverflow, DraftError
from edge_runtime.protocol.logits_processing import SequenceProcessor, make_processor
from edge_runtime.protocol.sampling import CoupledSampler, Sampling

PROMPT = [40, 41, 42, 50, 60]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7, seed=3),
    Sampling(temperature=1.0, top_p=0.9, seed=4),
    Sampling(temperature=0.7, seed=3, min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.8, logit_bias={40: 2.0}),
    Sampling(presence_penalty=1.0, min_tokens=5, stop_ids=[61]),
]


def with_siblings(count: int) -> Plan:
    return Plan(1, siblings=count, sibling_confidence=1.0)


# Logits of the token after these ids, by a forward of PyTorch over all of them.
NextLogits = Callable[[list[int]], npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> NextLogits:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32).eval()

    def next_logits(ids: list[int]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = loaded(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
        return logits

    return next_logits


def expected_tokens(model: NextLogits, ids: list[int], sampling: Sampling, count: int) -> list[int]:
    """Draft in PyTorch, recomputing the whole text in PyTorch for every drafted token."""
    ids, prompt = list(ids), len(ids)
    for _ in range(count):
        logits = model(ids)
        processed = SequenceProcessor(sampling, prompt).changes_after(ids).apply(logits)
        ids.append(CoupledSampler(len(logits)).rank(processed, sampling, len(ids)).ids[0])
    return ids[-count:]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_proposals_equal_pytorch(tiny_draft: OnnxDraft, model: NextLogits, sampling: Sampling) -> None:
    context = tiny_draft.new_context()
    proposal = context.propose(PROMPT, 8, sampling, processor=make_processor(sampling, len(PROMPT)))
    assert proposal.tokens == expected_tokens(model, PROMPT, sampling, 8)
    assert len(proposal.confidences) == 8
    assert all(0.0 < confidence <= 1.0 for confidence in proposal.confidences)
    assert context.ids == PROMPT + proposal.tokens[:-1]


@settings(max_examples=25)
@given(data=st.data())
def test_any_walk_of_prefills_and_rollbacks_ends_where_a_fresh_context_does(
    tiny_draft: OnnxDraft, data: st.DataObject
) -> None:
    sampling = Sampling(temperature=1.0, seed=9)
    context = tiny_draft.new_context()
    context.prefill(PROMPT)
    for _ in range(data.draw(st.integers(1, 6))):
        step = data.draw(st.sampled_from(["prefill", "rollback", "propose", "follow"]))
        ids = context.ids
        if step == "prefill":
            context.prefill(data.draw(st.lists(st.integers(1, 250), max_size=20)))
        elif step == "rollback":
            context.rollback(data.draw(st.integers(1, len(ids))))
        elif step == "propose":
            context.propose(ids, data.draw(st.integers(0, 5)), sampling, with_siblings(data.draw(st.integers(0, 3))))
        else:
            context.sync_to([*ids[: data.draw(st.integers(1, len(ids)))], 7, 8])
    ids = context.ids[: data.draw(st.integers(1, len(context.ids)))]
    fresh = tiny_draft.new_context()
    assert context.propose(ids, 4, sampling).tokens == fresh.propose(ids, 4, sampling).tokens


@pytest.mark.parametrize("right", [True, False])
def test_tokens_drafted_ahead_are_reused_iff_the_guess_was_right(tiny_draft: OnnxDraft, right: bool) -> None:
    sampling = Sampling(temperature=1.0, seed=4)
    context, fresh = tiny_draft.new_context(), tiny_draft.new_context()
    proposal = context.propose(PROMPT, 3, sampling, with_siblings(1))
    ahead = context.propose(PROMPT + proposal.tokens, 4, sampling, with_siblings(1), survival=proposal.survival)
    assert ahead.survival == pytest.approx(math.prod(proposal.confidences + ahead.confidences))
    guess = ahead.tokens[0]
    text = PROMPT + proposal.tokens + [guess if right else guess + 1]
    assert context.tokens_to_prefill(text) == (0 if right else 1)
    assert context.tokens_drafted_ahead(text) == (3 if right else 0)
    runs = tiny_draft.run_seconds
    proposal = context.propose(text, 3, sampling, with_siblings(1))
    assert proposal.drafted_ahead == (3 if right else 0)
    assert (tiny_draft.run_seconds == runs) == right
    again = fresh.propose(text, 3, sampling, with_siblings(1))
    assert (proposal.tokens, proposal.siblings) == (again.tokens, again.siblings)


def test_a_proposal_is_cut_to_the_verifiers_limits() -> None:
    proposal = Proposal([1, 2, 3], {0: [4, 5], 1: [6], 2: [7, 8]}, [0.5, 0.4, 0.3], drafted_ahead=3)
    assert proposal.truncate(2) == Proposal([1, 2], {0: [4, 5], 1: [6]}, [0.5, 0.4], drafted_ahead=2)
    assert proposal.limit_nodes(8) == proposal
    assert proposal.limit_nodes(7).siblings == {0: [4, 5], 1: [6]}
    assert proposal.limit_nodes(3).siblings == {}


def test_drafting_stops_on_request_and_below_the_minimum_survival(tiny_draft: OnnxDraft) -> None:
    context = tiny_draft.new_context()
    asked = iter([False, False, True])
    assert len(context.propose(PROMPT, 8, Sampling(), should_stop=lambda: next(asked)).tokens) == 2
    assert len(context.propose(PROMPT, 8, Sampling(), Plan(8, calibration=(0.5,), min_survival=0.2)).tokens) == 3
    plan = Plan(8, calibration=(0.5, 0.5), min_survival=0.2)
    proposal = context.propose(PROMPT, 8, Sampling(), plan, survival=0.5)
    assert (len(proposal.tokens), proposal.survival) == (2, 0.125)


def test_siblings_are_the_next_best_by_coupled_score(tiny_draft: OnnxDraft, model: NextLogits) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    context = tiny_draft.new_context()
    proposal = context.propose(PROMPT, 3, sampling, with_siblings(3))
    ids = list(PROMPT)
    for index, token in enumerate(proposal.tokens):
        logits = model(ids)
        assert [token, *proposal.siblings[index]] == CoupledSampler(300).rank(logits, sampling, len(ids), 4).ids
        ids.append(token)


def test_drafting_stops_after_a_token_of_low_confidence(tiny_draft: OnnxDraft) -> None:
    context = tiny_draft.new_context()
    sure = context.propose(PROMPT, 8, Sampling(), Plan(8, min_confidence=0.0)).confidences
    threshold = sorted(sure)[4]
    stopped = context.propose(PROMPT, 8, Sampling(), Plan(8, min_confidence=threshold)).confidences
    first = next(index for index, confidence in enumerate(sure) if confidence < threshold)
    assert len(stopped) == first + 1


def test_rolling_back_the_fused_graph_copies_nothing(family: Path) -> None:
    draft = OnnxDraft.load(family / "bundle", threads=1)
    runner = make_runner(draft.session, draft.manifest.architecture)
    assert isinstance(runner, FusedRunner)
    runner.append(list(range(100, 180)))
    addresses = [buffer.ctypes.data for buffer in runner._buffers]
    contents = [buffer.copy() for buffer in runner._buffers]
    runner.truncate(10)
    assert runner.length == 10
    assert [buffer.ctypes.data for buffer in runner._buffers] == addresses
    assert all(np.array_equal(now, before) for now, before in zip(runner._buffers, contents, strict=True))


def test_a_long_text_grows_the_buffers_and_changes_nothing(shipped_draft: OnnxDraft) -> None:
    ids = [(7 * index) % 8000 + 2 for index in range(700)]
    at_once, one_by_one = shipped_draft.new_context(), shipped_draft.new_context()
    at_once.prefill(ids)
    for start in range(0, 700, 9):
        one_by_one.prefill(ids[start : start + 9])
    sampling = Sampling(temperature=1.0, seed=1)
    assert at_once.propose(ids, 5, sampling).tokens == one_by_one.propose(ids, 5, sampling).tokens


def test_context_overflow_raises_and_keeps_the_text(tiny_draft: OnnxDraft) -> None:
    context = tiny_draft.new_context()
    context.prefill([5] * 510)
    with pytest.raises(ContextOverflow, match="513 tokens are more than the draft's context of 512"):
        context.prefill([5] * 3)
    assert len(context.ids) == 510
    # 510 known, room for 2, and one more token can be drafted after them.
    assert len(context.propose([5] * 510, 8, Sampling()).tokens) == 3


def test_nothing_to_continue(tiny_draft: OnnxDraft) -> None:
    with pytest.raises(DraftError, match="empty"):
        tiny_draft.new_context().propose([], 1, Sampling())


@pytest.fixture
def copy(family: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(family / "bundle", tmp_path / "bundle"))


def test_a_missing_file(copy: Path) -> None:
    (copy / "model.onnx.data").unlink()
    with pytest.raises(BundleMissing, match=r"lacks model\.onnx\.data.*copy the bundle again"):
        OnnxDraft.load(copy)


def test_a_wrong_hash(copy: Path) -> None:
    file = copy / "model.onnx.data"
    contents = bytearray(file.read_bytes())
    contents[1000] ^= 1
    file.write_bytes(contents)
    with pytest.raises(BundleCorrupt, match="sha256 differs"):
        OnnxDraft.load(copy)


def test_a_truncated_model(copy: Path) -> None:
    file = copy / "model.onnx"
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(BundleCorrupt, match="20000 bytes instead of"):
        OnnxDraft.load(copy)
    # Even with a matching manifest, onnxruntime does not load it.
    bundle = with_files(copy)
    with pytest.raises(DraftError, match="does not load"):
        OnnxDraft(bundle)


def test_a_graph_of_another_kind(copy: Path) -> None:
    bundle = with_files(copy)
    graph = msgspec.structs.replace(bundle.manifest.graph, kind="concat")
    manifest = msgspec.structs.replace(bundle.manifest, graph=graph)
    with pytest.raises(BundleCorrupt, match="is a fused graph, but its manifest says concat"):
        OnnxDraft(Bundle(copy, manifest))


def with_files(path: Path) -> Bundle:
    """Update the manifest at `path` to match its files, and read the bundle."""
    manifest = read_manifest_only(path)
    files = {name: record_file(path / name) for name in manifest.files}
    write_manifest(path, msgspec.structs.replace(manifest, files=files))
    return read_bundle(path)


def read_manifest_only(path: Path):
    from edge_runtime.protocol.bundle import Manifest

    return msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)


@pytest.mark.slow
def test_onnxruntime_telemetry_is_disabled(family: Path, tmp_path: Path) -> None:
    """onnxruntime stores and sends usage events unless ORT_DISABLE_TELEMETRY is set before it is loaded."""
    imports = "from pathlib import Path; from edge_runtime.draft.model import OnnxDraft"
    program = f"{imports}; OnnxDraft.load(Path({str(family / 'bundle')!r})).measure_speed()"
    environ = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environ |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program], env=environ, check=True, timeout=300)
    assert list(tmp_path.rglob("*")) == []
