"""Server-side speculation: the same text, in fewer forwards than it has tokens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from cloud_verifier.api.app import VerifierLimits, VerifierService
from cloud_verifier.cli.main import main
from cloud_verifier.engine.own_drafts import OwnDraftPlanner
from cloud_verifier.model.onnx_speculation import OnnxSpeculation
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.speculation import OwnDraft, Speculation
from cloud_verifier.model.target import Target, load_model
from cloud_verifier.model.torch_speculation import TorchSpeculation
from edge_runtime.planning.plan import Plan
from edge_runtime.protocol import messages
from edge_runtime.protocol.bundle import MANIFEST_NAME, Manifest
from edge_runtime.protocol.errors import BundleMissing, FlexSpecError, InputError, TargetError
from edge_runtime.protocol.messages import MSGPACK, Frame, FrameSplitter, ModelList, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from export.bundle.build import BundleConfig, make_bundle
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import (
    PROMPT,
    ClientSession,
    ObservedTarget,
    ProtocolClient,
    command_service,
    running_service,
)
from tests.models import save_target

ENDLESS = Sampling(ignore_eos=True)
SAMPLINGS = {
    "greedy": ENDLESS,
    "T=0.7": Sampling(0.7, seed=1, ignore_eos=True),
    "top-p": Sampling(1.0, top_p=0.9, seed=3, ignore_eos=True),
    "penalties": Sampling(
        0.7, seed=1, ignore_eos=True, min_p=0.02, repetition_penalty=1.2, frequency_penalty=0.5, logit_bias={7: 4.0}
    ),
}
PENALIZED = Sampling(ignore_eos=True, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.1)
# The tiny target repeats no token in the first tokens of this text.
VARIED = Sampling(1.5, seed=5, ignore_eos=True)
CALIBRATION_TEXT = "the quick brown fox jumps over the lazy dog"

MakeBundle = Callable[[Path], Path]


@pytest.fixture(autouse=True)
def always_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft as many tokens as possible: beside a target as small as these, a draft costs more than it saves."""

    def plan(*_: Any, longest: int, **__: Any) -> Plan:
        return Plan(longest, siblings=3, sibling_confidence=1)

    monkeypatch.setattr(OwnDraftPlanner, "plan", plan)


@pytest.fixture
def learned_drafts(monkeypatch: pytest.MonkeyPatch) -> list[OwnDraft]:
    """The drafts that planners have learned from."""
    drafts: list[OwnDraft] = []
    learn = OwnDraftPlanner.learn_draft

    def spy(planner: OwnDraftPlanner, *arguments: Any, **named: Any) -> int:
        drafts.append(arguments[-1])
        return learn(planner, *arguments, **named)

    monkeypatch.setattr(OwnDraftPlanner, "learn_draft", spy)
    return drafts


class SpeculatingVerifier:
    """A verifier with server-side speculation, and a client of it."""

    def __init__(self, client: ProtocolClient, target: ObservedTarget, service: VerifierService) -> None:
        self.client = client
        self.target = target
        self.service = service

    def session_draft(self, session: ClientSession) -> object:
        return self.service.sessions.get(session.id).draft


def serve_with_bundle(
    target: Target, bundle: Path, max_draft_tokens: int = 5
) -> contextlib.AbstractContextManager[SpeculatingVerifier]:
    return serve_speculating(
        target, lambda it: OnnxSpeculation(bundle, it, max_draft_tokens=max_draft_tokens, threads=1)
    )


@contextlib.contextmanager
def serve_speculating(
    target: Target, load_speculation: Callable[[Target], Speculation]
) -> Iterator[SpeculatingVerifier]:
    observed = ObservedTarget(target)
    service = VerifierService(lambda: observed, VerifierLimits(), load_speculation=load_speculation)
    with running_service(service) as url, ProtocolClient(url) as client:
        yield SpeculatingVerifier(client, observed, service)


@pytest.fixture(scope="module")
def make_tiny_bundle(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """`make_tiny_bundle(model)`: a bundle of the model as a draft of the tiny target."""

    def make(model: Path) -> Path:
        output = tmp_path_factory.mktemp("bundles") / "bundle"
        make_bundle(BundleConfig(tiny_path, model, "fused", "fp32", CALIBRATION_TEXT), output, lambda step: None)
        return output

    return make


@pytest.fixture(scope="module")
def perfect_bundle(make_tiny_bundle: MakeBundle, tiny_path: Path) -> Path:
    """The tiny target as its own draft: every draft token is accepted."""
    return make_tiny_bundle(tiny_path)


@pytest.fixture(scope="module")
def imperfect_bundle(make_tiny_bundle: MakeBundle, imperfect_model: Path) -> Path:
    return make_tiny_bundle(imperfect_model)


@pytest.fixture(scope="module")
def imperfect_model(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with noise on its weights, so that about half of its draft tokens are accepted."""
    model = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.06 * weights.std() * torch.randn_like(weights) if weights.ndim > 1 else 0
    path = tmp_path_factory.mktemp("models") / "imperfect"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["perfect_bundle", "imperfect_bundle", "torch"])
def verifier(tiny: Target, request: pytest.FixtureRequest) -> Iterator[SpeculatingVerifier]:
    """The tiny target with a perfect or imperfect draft, as a bundle on the CPU or in PyTorch."""
    if request.param == "torch":
        model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue("imperfect_model"))
        with serve_speculating(tiny, lambda it: TorchSpeculation(model, it, max_draft_tokens=5)) as verifier:
            yield verifier
        return
    with serve_with_bundle(tiny, request.getfixturevalue(request.param)) as verifier:
        yield verifier


def stream_frames(client: ProtocolClient, session: ClientSession, request: RoundRequest) -> list[Frame]:
    response = client.post(session.path, request)
    assert response.headers["content-type"] == messages.STREAM_MEDIA_TYPES[MSGPACK]
    return [messages.decode(body, Frame, MSGPACK, session.id) for body in FrameSplitter(MSGPACK).feed(response.content)]


def run_round(verifier: SpeculatingVerifier, session: ClientSession, request: RoundRequest) -> Frame:
    """Run a round, streamed or not; return its whole result as one frame."""
    if not request.stream:
        session.apply_frame(request, verifier.client.decode_reply(verifier.client.post(session.path, request), Frame))
        return session.frame
    frames = stream_frames(verifier.client, session, request)
    assert [frame.more for frame in frames] == [True] * (len(frames) - 1) + [False]
    assert not any(frame.accepted for frame in frames[1:])
    tokens = [token for frame in frames for token in frame.tokens]
    session.apply_frame(request, msgspec.structs.replace(frames[-1], accepted=frames[0].accepted, tokens=tokens))
    return session.frame


@pytest.mark.slow
# Every pair of values occurs.
@pytest.mark.parametrize(
    ("stream", "width", "n"),
    [(False, 0, 4), (False, 4, 32), (True, 0, 32), (True, 4, 4)],
    ids=["whole, K=0, n=4", "whole, K=4, n=32", "streamed, K=0, n=32", "streamed, K=4, n=4"],
)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_the_text_equals_reference_decoding(
    verifier: SpeculatingVerifier, reference_text: ReferenceText, sampling: Sampling, n: int, width: int, stream: bool
) -> None:
    reference = reference_text(PROMPT, 120, sampling)
    session = verifier.client.open(sampling=sampling, n=n)
    verifier.target.forwards = 0
    rounds = further = 0
    while (known := len(session.ids) - len(PROMPT)) < 70:
        draft = reference[known : known + width]
        # Index of the first rejected token; `width` if all are accepted.
        rejected = (3 * rounds) % (width + 1)
        draft[rejected:] = [(token + 1) % 300 for token in draft[rejected:]]
        frame = run_round(verifier, session, session.next_round(draft=draft, n=n, stream=stream))
        assert (frame.accepted, len(frame.tokens)) == (rejected, n)
        assert frame.forward_100us > 0
        rounds += 1
        further += frame.further
    assert session.ids[len(PROMPT) :] == reference[: len(session.ids) - len(PROMPT)]
    assert verifier.target.forwards == rounds + further < rounds * n


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_the_text_does_not_depend_on_the_plans(
    verifier: SpeculatingVerifier, reference_text: ReferenceText, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(7)

    def plan(*_: Any, longest: int, **__: Any) -> Plan:
        siblings, confidence, survival = random.randint(0, 7), random.random(), random.random() ** 3
        return Plan(random.randint(0, longest), siblings=siblings, sibling_confidence=confidence, min_survival=survival)

    monkeypatch.setattr(OwnDraftPlanner, "plan", plan)
    session = verifier.client.open(sampling=sampling, n=100)
    assert session.ids == PROMPT + reference_text(PROMPT, 100, sampling)


def test_the_planner_learns_how_much_the_draft_had_to_read(
    verifier: SpeculatingVerifier, learned_drafts: list[OwnDraft]
) -> None:
    prompt = [*PROMPT, *range(20, 40)]
    verifier.client.open(prompt, ENDLESS, n=30)
    # The first forward has generated a token.
    assert learned_drafts[0].read == len(prompt) + 1
    assert len(learned_drafts) > 2 and max(draft.read for draft in learned_drafts[1:]) <= 6


def test_the_next_turn_reads_only_what_is_new(
    tiny: Target, perfect_bundle: Path, learned_drafts: list[OwnDraft]
) -> None:
    with serve_with_bundle(tiny, perfect_bundle) as verifier:
        prompt = list(range(20, 60))
        for _ in range(2):
            session = verifier.client.open(prompt, ENDLESS, n=12)
            verifier.client.http.delete(f"/v1/sessions/{session.id}")
            prompt = [*session.ids, 7, 8]
    assert [draft.read for draft in learned_drafts if draft.read > 6] == [41]


def test_siblings_of_its_own_save_forwards(
    tiny: Target, imperfect_bundle: Path, reference_text: ReferenceText, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling, forwards = SAMPLINGS["T=0.7"], []
    for count in (0, 7):

        def plan(*_: Any, longest: int, count: int = count, **__: Any) -> Plan:
            return Plan(longest, siblings=count, sibling_confidence=1)

        monkeypatch.setattr(OwnDraftPlanner, "plan", plan)
        with serve_with_bundle(tiny, imperfect_bundle) as verifier:
            session = verifier.client.open(sampling=sampling, n=100)
            assert session.ids == PROMPT + reference_text(PROMPT, 100, sampling)
            forwards.append(verifier.target.forwards)
    assert forwards[1] < forwards[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "sampling"), [(1, ENDLESS), (3, ENDLESS), (7, ENDLESS), (32, ENDLESS), (7, PENALIZED)]
)
def test_forwards_with_a_perfect_draft(
    tiny: Target, perfect_bundle: Path, reference_text: ReferenceText, tokens: int, sampling: Sampling
) -> None:
    """n tokens cost the first forward, and one for each K + 1 of the rest; the round returns exactly n."""
    reference = reference_text(PROMPT, 150, sampling)
    with serve_with_bundle(tiny, perfect_bundle, tokens) as verifier:
        session = verifier.client.open(sampling=sampling)
        for n in range(1, 16):
            verifier.target.forwards = 0
            assert len(session.run_round(n=n).tokens) == n
            assert verifier.target.forwards == 1 + -(-(n - 1) // (tokens + 1))
    assert session.ids == PROMPT + reference[: len(session.ids) - len(PROMPT)]


def test_siblings_of_the_board_count_as_without_speculation(
    verifier: SpeculatingVerifier, reference_text: ReferenceText
) -> None:
    reference = reference_text(PROMPT, 40, ENDLESS)
    session = verifier.client.open(sampling=ENDLESS)
    for n, expected in ((1, 2), (2, 2), (3, 3), (8, 8)):
        known = len(session.ids) - len(PROMPT)
        draft = [(reference[known] + 1) % 300, 5]
        frame = session.run_round(draft=draft, siblings={0: [reference[known]]}, n=n)
        assert (frame.accepted, len(frame.tokens)) == (0, expected)
    assert session.ids == PROMPT + reference[: len(session.ids) - len(PROMPT)]


@pytest.mark.parametrize("length", range(1, 15))
def test_an_end_token_anywhere_in_speculated_tokens_ends_the_text(
    verifier: SpeculatingVerifier, reference_text: ReferenceText, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """The end may be the first token, a draft token in the middle or at the end, or the bonus token after them."""
    text = reference_text(PROMPT, length, VARIED)
    assert text[-1] not in text[:-1]
    monkeypatch.setattr(verifier.target, "end_ids", frozenset(text[-1:]))
    session = verifier.client.open(sampling=msgspec.structs.replace(VARIED, ignore_eos=False), n=512)
    assert (session.frame.finish, session.ids) == ("stop", PROMPT + text)


@pytest.mark.parametrize("prompt_length", range(500, 512))
def test_the_context_may_end_anywhere_in_speculated_tokens(
    verifier: SpeculatingVerifier, reference_text: ReferenceText, prompt_length: int
) -> None:
    prompt = [(11 * index) % 299 + 1 for index in range(prompt_length)]
    session = verifier.client.open(prompt, ENDLESS, n=512)
    assert (session.frame.finish, len(session.ids)) == ("length", 512)
    assert session.ids == prompt + reference_text(prompt, 512 - prompt_length, ENDLESS)


@pytest.mark.slow
def test_concurrent_sessions_keep_their_own_drafts(
    verifier: SpeculatingVerifier, reference_text: ReferenceText
) -> None:
    """Each session draft follows its own text, while rounds alternate and boards send drafts in between."""

    def generate(seed: int) -> list[int]:
        session = verifier.client.open([5, seed + 1], Sampling(1.0, seed=seed, ignore_eos=True), n=12)
        session.run_round(draft=[1, 2, 3], n=7)
        session.run_round(n=9)
        return session.ids[2:]

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(generate, range(8)))
    for seed, ids in enumerate(texts):
        assert ids == reference_text([5, seed + 1], 28, Sampling(1.0, seed=seed, ignore_eos=True))


def test_the_next_turn_takes_the_cache_of_the_verifiers_own_draft(
    tiny: Target, perfect_bundle: Path, reference_text: ReferenceText
) -> None:
    with serve_with_bundle(tiny, perfect_bundle) as verifier:
        speculation = verifier.service.scheduler.speculation
        assert isinstance(speculation, OnnxSpeculation)
        kept = speculation._draft.prefix_cache
        prompt, sizes = list(PROMPT), []
        for _ in range(3):
            session = verifier.client.open(prompt, n=12)
            sizes.append(len(kept))
            assert session.ids[len(prompt) :] == reference_text(prompt, 12)
            verifier.client.http.delete(f"/v1/sessions/{session.id}")
            prompt = [*session.ids, 7, 8]
        # The cache of the turn before was there, and is in use.
        assert sizes == [0, 0, 0]
        verifier.client.open([9])
        assert [cached.ids[: len(session.ids) - 6] for cached in kept._kept] == [session.ids[:-6]]


def test_short_rounds_create_no_session_draft(verifier: SpeculatingVerifier) -> None:
    """Two tokens cost two forwards, with or without a draft."""
    session = verifier.client.open(n=2)
    session.run_round(draft=[1, 2], n=2)
    assert verifier.session_draft(session) is None
    session.run_round(n=3)
    assert verifier.session_draft(session) is not None


@pytest.mark.slow
def test_the_target_continues_alone_past_the_drafts_context(
    tiny: Target,
    make_tiny_bundle: MakeBundle,
    reference_text: ReferenceText,
    tmp_path: Path,
    learned_drafts: list[OwnDraft],
) -> None:
    short = save_target(tmp_path / "short", max_position_embeddings=64)
    with serve_with_bundle(tiny, make_tiny_bundle(short)) as verifier:
        session = verifier.client.open(sampling=ENDLESS, n=100)
        assert session.ids == PROMPT + reference_text(PROMPT, 100, ENDLESS)
        assert 44 < verifier.target.forwards < 100
        assert all(draft.tokens for draft in learned_drafts)
        long = [(7 * index) % 299 + 1 for index in range(300)]
        assert verifier.client.open(long, ENDLESS, n=20).ids == long + reference_text(long, 20, ENDLESS)


@pytest.mark.slow
def test_the_target_continues_alone_after_a_draft_failure(
    tiny: Target,
    make_tiny_bundle: MakeBundle,
    reference_text: ReferenceText,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    learned_drafts: list[OwnDraft],
) -> None:
    """The manifest claims a longer context than the graph has positions, so that onnxruntime refuses a step."""
    bundle = make_tiny_bundle(save_target(tmp_path / "short", max_position_embeddings=64))
    manifest = msgspec.json.decode((bundle / MANIFEST_NAME).read_bytes(), type=Manifest)
    longer = msgspec.structs.replace(manifest.architecture, context=512)
    (bundle / MANIFEST_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, architecture=longer)))
    with serve_with_bundle(tiny, bundle) as verifier:
        session = verifier.client.open(sampling=ENDLESS, n=100)
        session.run_round(n=100)
    assert session.ids == PROMPT + reference_text(PROMPT, 200, ENDLESS)
    assert [record.message for record in caplog.records if record.name == "cloud_verifier.model.onnx_speculation"] == [
        "drafting failed; this session continues without server-side speculation"
    ]
    # The failed one, and none after it.
    assert [bool(draft.tokens) for draft in learned_drafts].count(False) == 1


def test_the_model_list_reports_server_side_speculation(verifier: SpeculatingVerifier, client: ProtocolClient) -> None:
    for each, speculates in ((verifier.client, True), (client, False)):
        [model] = each.decode_reply(each.http.get("/v1/models"), ModelList).data
        assert model.speculates is speculates


def test_a_draft_with_another_vocabulary_is_refused(tiny: Target, family: Path) -> None:
    with pytest.raises(TargetError, match="export a draft from this target or leave out --draft"):
        OnnxSpeculation(family / "bundle", tiny, max_draft_tokens=5)


@pytest.mark.parametrize("tokens", [0, -1, 72])
def test_more_draft_tokens_than_a_forward_verifies_are_refused(tiny: Target, perfect_bundle: Path, tokens: int) -> None:
    with pytest.raises(InputError, match="give 1 to 71"):
        OnnxSpeculation(perfect_bundle, tiny, max_draft_tokens=tokens)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--draft", "FAMILY"], TargetError.exit_code, "has the vocabulary"),
        (["--draft", "nowhere"], BundleMissing.exit_code, "nowhere"),
        (["--draft", "FAMILY", "--draft-tokens", "100"], FlexSpecError.exit_code + 1, "give 1 to 71"),
    ],
    ids=["other vocabulary", "no bundle", "too many tokens"],
)
def test_serve_with_an_invalid_draft_reports_an_error(
    tiny_path: Path, family: Path, options: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [option.replace("FAMILY", str(family / "bundle")) for option in options]
    assert main(["serve", str(tiny_path), "--port", "0", *options]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_serve_with_a_draft(tiny_path: Path, perfect_bundle: Path, reference_text: ReferenceText) -> None:
    options = ("--threads", "1", "--draft", perfect_bundle, "--draft-tokens", "3", "--draft-threads", "1")
    with running_service(command_service(tiny_path, *options)) as url, ProtocolClient(url) as client:
        assert client.decode_reply(client.http.get("/v1/models"), ModelList).data[0].speculates
        assert client.open(sampling=ENDLESS, n=30).ids == PROMPT + reference_text(PROMPT, 30, ENDLESS)


def test_no_server_side_drafts_with_more_than_max_rounds(
    tiny: Target, perfect_bundle: Path, reference_text: ReferenceText
) -> None:
    with serve_speculating(
        tiny, lambda it: OnnxSpeculation(perfect_bundle, it, max_draft_tokens=5, threads=1, max_rounds=1)
    ) as verifier:
        sessions = [verifier.client.open([7, seed + 1], ENDLESS) for seed in range(2)]
        verifier.target.hold()
        with ThreadPoolExecutor(2) as pool:
            rounds = [pool.submit(session.run_round, n=30) for session in sessions]
            assert verifier.target.reached.wait(300)
            while len(verifier.service.admission) < 2:
                time.sleep(0.01)
            verifier.target.release()
            for round_ in rounds:
                round_.result()
        # As long as there were two rounds, each forward generated one token per round.
        assert verifier.target.forwards > 20
        for seed, session in enumerate(sessions):
            assert session.ids[2:] == reference_text([7, seed + 1], 31, ENDLESS)


@pytest.mark.slow
def test_serve_with_the_shipped_draft_in_torch(family: Path) -> None:
    model, _, end_ids = load_model(family / "target-v1", "cpu", "float32")
    prompt = Tokenizer.from_file(str(family / "bundle" / "tokenizer.json")).encode("def main(").ids
    service = command_service(family / "target-v1", "--threads", "1", "--draft", family / "draft-anchor")
    with running_service(service) as url, ProtocolClient(url) as client:
        sampling = Sampling(0.7, seed=1, ignore_eos=True)
        session = client.open(prompt, sampling, n=64)
        assert session.ids == prompt + generate_reference(model, prompt, sampling, 64, end_ids)
        metrics = client.http.get("/metrics").text
    counted = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(counted["flexspec_forward_seconds_count"]) > 0
    drafts, drafted, accepted = (
        float(counted[f"flexspec_own_draft_{name}"]) for name in ("length_count", "length_sum", "accepted_tokens_total")
    )
    assert drafts > 0 and accepted <= drafted


@pytest.mark.slow
def test_the_shipped_draft_saves_more_than_half_of_the_forwards(family: Path, target_v1: Target) -> None:
    model, _, end_ids = load_model(family / "target-v1", "cpu", "float32")
    tokenizer = Tokenizer.from_file(str(family / "bundle" / "tokenizer.json"))
    tokens = forwards = 0
    with serve_with_bundle(target_v1, family / "bundle") as verifier:
        for text in ("def main(", "import os\n", "class Stack:\n"):
            prompt = tokenizer.encode(text).ids
            for sampling in (Sampling(), Sampling(0.7, seed=1), Sampling(1.0, top_p=0.9, seed=2)):
                verifier.target.forwards = 0
                session = verifier.client.open(prompt, sampling, n=48)
                reference = generate_reference(model, prompt, sampling, 48, end_ids)
                assert session.ids == prompt + reference
                forwards += verifier.target.forwards
                tokens += len(reference)
    assert forwards < 0.5 * tokens
