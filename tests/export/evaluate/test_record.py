"""Recorded acceptance: a trace replays the real decoding loop round by round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloud_verifier.acceptance.measure import read_calibration_text
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Outcome, Plan
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.simulation.recorded_texts import RecordedText, read_texts
from edge_runtime.simulation.simulator import simulate
from edge_runtime.simulation.world import make_world
from edge_runtime.verifier.client import VerifierClient
from export.bundle.build import BundleConfig, make_bundle
from export.cli.main import main
from export.evaluate.record import RecordingConfig, record_acceptance, record_text
from tests.conftest import serving
from tests.models import save_chat_target

TOKENS = 40
PROMPT = "class Connection:\n    def __init__(self, host, port"
PLANS = [
    Plan(0),
    Plan(0, continuation=100),
    Plan(4),
    Plan(8, siblings=3, sibling_confidence=0.8),
    Plan(8, min_survival=0.4),
    Plan(6, min_confidence=0.5, siblings=7, sibling_confidence=1.0),
    Plan(10, min_survival=0.3, calibration=(0.2, 0.4, 0.6, 0.8, 0.97)),
    Plan(3, continuation=4, siblings=2),
]


class ObservingPlanner(FixedPlanner):
    """Records the outcomes that it observes."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.outcomes: list[Outcome] = []

    def observe(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


@pytest.fixture(scope="module")
def draft(family: Path) -> OnnxDraft:
    # Recordings know nothing of earlier texts.
    return OnnxDraft.load(family / "bundle", threads=1, prefix_cache_bytes=0)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_recorded_texts_replay_the_real_loop(
    family: Path, target_v1: Target, draft: OnnxDraft, temperature: float
) -> None:
    # A seed at which no two candidates are nearly as good: int8 kernels round differently when several tokens go
    # through together, and would swap them.
    sampling = Sampling(temperature=temperature, seed=5, ignore_eos=True)
    prompt = draft.tokenizer.encode(PROMPT).ids
    model, _, end_ids = load_model(family / "target-v1", "cpu", "float32")
    new = generate_reference(model, prompt, sampling, TOKENS, end_ids)
    text = record_text(draft, "target-v1", prompt, new, sampling)
    async with serving(target_v1) as server, VerifierClient(server.url) as client:
        for plan in PLANS:
            planner = ObservingPlanner(plan)
            generation = Generation(draft, client, prompt, sampling, max_new_tokens=TOKENS, planner=planner)
            async for _ in generation:
                pass
            simulated = simulate([text], FixedPlanner(plan), make_world("lan", "server", "7b"), log=True)
            real_rounds = [_comparable(outcome) for outcome in planner.outcomes]
            assert real_rounds == [_comparable(outcome) for outcome in simulated.log], plan
            for real, simulated_outcome in zip(planner.outcomes, simulated.log, strict=True):
                # int8 kernels round differently when several tokens go through together.
                assert real.confidences == pytest.approx(simulated_outcome.confidences, abs=0.02)


def _comparable(outcome: Outcome) -> tuple[object, ...]:
    conditions = outcome.conditions
    return (
        (conditions.left, conditions.position, conditions.unread, conditions.ready),
        (outcome.drafted, outcome.accepted, outcome.own_tokens, outcome.offered, outcome.sibling, outcome.ready),
    )


@pytest.mark.slow
def test_a_recording_is_reproducible(family: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(read_calibration_text())
    config = RecordingConfig(
        family / "bundle", (family / "target-v1",), (0.7,), prompts=2, tokens=12, longest=40, texts=(prompts,)
    )
    texts = record_acceptance(config, tmp_path / "a.npz")
    assert [len(text) for text in texts] == [12, 12] and texts[0].seed == 0 and texts[1].seed == 1
    assert all(24 <= text.prompt <= 40 for text in texts)
    assert record_acceptance(config, tmp_path / "b.npz") == texts
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    read: list[RecordedText] = read_texts(tmp_path / "a.npz", target="target-v1", temperature=0.7)
    assert [text.ranks for text in read] == [text.ranks for text in texts]


def test_the_command_records(family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "trace.npz"
    text = tmp_path / "text.txt"
    text.write_text(read_calibration_text())
    arguments = [
        "record",
        str(family / "bundle"),
        "--target",
        str(family / "target-v1"),
        "--output",
        str(output),
    ]
    assert main([*arguments, "--text", str(text), "--prompts", "1", "--tokens", "8", "--temperature", "0"]) == 0
    assert "target-v1 T=0" in capsys.readouterr().out
    assert len(read_texts(output)) == 1
    assert main([*arguments, "--text", str(tmp_path / "absent")]) == InputError.exit_code
    short = tmp_path / "short.txt"
    for content in ("x = 1\n", ""):
        short.write_text(content)
        assert main([*arguments, "--text", str(short)]) == InputError.exit_code
        assert "longer --text" in capsys.readouterr().err


def test_half_of_the_prompts_are_chats(tmp_path: Path) -> None:
    target = save_chat_target(tmp_path / "target", num_hidden_layers=1)
    make_bundle(BundleConfig(target, target, "fused", "fp32", "x = 1\n" * 9), tmp_path / "bundle", lambda _: None)
    text, chats = tmp_path / "text.txt", tmp_path / "chats.jsonl"
    text.write_text("some text " * 20)
    questions = ["Hi", "What is this?", "A longer question than the others"]
    lines = [json.dumps({"messages": [{"role": "user", "content": question}]}) for question in questions]
    chats.write_text("\n".join(lines))
    config = RecordingConfig(
        tmp_path / "bundle",
        (target,),
        (1.0,),
        prompts=6,
        tokens=4,
        shortest=70,
        longest=80,
        texts=(text,),
        chats=(chats,),
    )
    lengths = [recorded.prompt for recorded in record_acceptance(config, tmp_path / "a.npz")]
    template = len("_user\n_\n_assistant\n")
    assert sorted(lengths[::2]) == [template + len(question) for question in questions]
    assert all(70 <= length <= 80 for length in lengths[1::2])
