"""A draft beside the target: the same text, in fewer forwards than it has tokens."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch
from anyio.from_thread import start_blocking_portal
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from cloud_verifier.api.app import VerifierLimits, Service
from cloud_verifier.api.server import Server
from cloud_verifier.cli import main
from cloud_verifier.model import attention
from cloud_verifier.model.reference import decode_alone
from cloud_verifier.model.speculation import Speculation
from cloud_verifier.model.target import Target, load_model
from cloud_verifier.model.torch_speculation import Drafting
from edge_runtime.common.http_server import Listening
from edge_runtime.protocol import messages
from edge_runtime.protocol.bundle import MANIFEST, Manifest
from edge_runtime.protocol.errors import BundleMissing, FlexSpecError, InputError, TargetError
from edge_runtime.protocol.messages import MSGPACK, Frame, FrameSplitter, ModelList, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from export.bundle.build import BundleOrder, make_bundle
from tests.cloud_verifier.conftest import Alone
from tests.cloud_verifier.protocol_client import PROMPT, Session, Talker, Watched
from tests.models import save_target

ENDLESS = Sampling(ignore_eos=True)
SAMPLINGS = {
    "greedy": ENDLESS,
    "T=0.7": Sampling(0.7, seed=1, ignore_eos=True),
    "top-p": Sampling(1.0, top_p=0.9, seed=3, ignore_eos=True),
}
# Its text repeats no token for a while.
VARIED = Sampling(1.5, seed=5, ignore_eos=True)
TEXT = "the quick brown fox jumps over the lazy dog"

Bundle = Callable[[Path], Path]


class Beside:
    """A verifier of `target` with a draft beside it, and a client."""

    def __init__(self, talker: Talker, target: Watched, service: Service) -> None:
        self.talker = talker
        self.target = target
        self.service = service

    def guesses_of(self, session: Session) -> object:
        return self.service.sessions.get(session.id).guesses


def beside(target: Target, bundle: Path, tokens: int = 5) -> contextlib.AbstractContextManager[Beside]:
    return besides(target, lambda it: Speculation(bundle, it, tokens, threads=1))


@contextlib.contextmanager
def besides(target: Target, speculate: Callable[[Target], Speculation]) -> Iterator[Beside]:
    watched = Watched(target)
    service = Service(lambda: watched, VerifierLimits(), speculate)

    @contextlib.asynccontextmanager
    async def listening():  # type: ignore[no-untyped-def]
        server = Server(service, Listening(port=0))
        await server.start()
        try:
            yield server
        finally:
            await server.stop()

    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(listening()) as server,
        Talker(server.url) as talker,
    ):
        while talker.http.get("/readyz").status_code != 200:
            assert service.engine.failure is None
        yield Beside(talker, watched, service)


@pytest.fixture(scope="module")
def bundle_of(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`bundle_of(model)`: the model as a draft of the tiny target."""

    def make(model: Path) -> Path:
        output = tmp_path_factory.mktemp("bundles") / "bundle"
        make_bundle(BundleOrder(tiny_path, model, "fused", "fp32", TEXT), output, lambda step: None)
        return output

    return make


@pytest.fixture(scope="module")
def perfect(bundle_of: Bundle, tiny_path: Path) -> Path:
    """The tiny target itself."""
    return bundle_of(tiny_path)


@pytest.fixture(scope="module")
def middling(bundle_of: Bundle, middling_model: Path) -> Path:
    return bundle_of(middling_model)


@pytest.fixture(scope="module")
def middling_model(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target, disturbed so that about half of its guesses are right."""
    model = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.06 * weights.std() * torch.randn_like(weights) if weights.ndim > 1 else 0
    path = tmp_path_factory.mktemp("models") / "middling"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["perfect", "middling", "in torch"])
def helped(tiny: Target, request: pytest.FixtureRequest) -> Iterator[Beside]:
    """The tiny target beside a draft that is always right, or one that often is, as a board has it or in PyTorch."""
    if request.param == "in torch":
        model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue("middling_model"))
        model.set_attn_implementation(attention.NAME)
        with besides(tiny, lambda it: Drafting(model, it, 5)) as verifier:
            yield verifier
        return
    with beside(tiny, request.getfixturevalue(request.param)) as verifier:
        yield verifier


def streamed(talker: Talker, session: Session, request: RoundRequest) -> list[Frame]:
    response = talker.post(session.path, request)
    assert response.headers["content-type"] == messages.STREAMS[MSGPACK]
    return [messages.decode(body, Frame, MSGPACK, session.id) for body in FrameSplitter(MSGPACK).feed(response.content)]


def play(verifier: Beside, session: Session, request: RoundRequest) -> Frame:
    """Plays a round, streamed or not; the whole of its answer."""
    if not request.stream:
        session.take(request, verifier.talker.told(verifier.talker.post(session.path, request), Frame))
        return session.frame
    frames = streamed(verifier.talker, session, request)
    assert [frame.more for frame in frames] == [True] * (len(frames) - 1) + [False]
    assert not any(frame.accepted for frame in frames[1:])
    tokens = [token for frame in frames for token in frame.tokens]
    session.take(request, msgspec.structs.replace(frames[-1], accepted=frames[0].accepted, tokens=tokens))
    return session.frame


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("width", [0, 4], ids=["K=0", "K=4"])
@pytest.mark.parametrize("n", [4, 32])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_the_text_is_the_targets_own(
    helped: Beside, alone: Alone, sampling: Sampling, n: int, width: int, stream: bool
) -> None:
    truth = alone(PROMPT, 120, sampling)
    session = helped.talker.open(sampling=sampling, n=n)
    helped.target.forwards = 0
    rounds = further = 0
    while (known := len(session.ids) - len(PROMPT)) < 70:
        draft = truth[known : known + width]
        slip = (3 * rounds) % (width + 1)  # `width`: all are right
        draft[slip:] = [(token + 1) % 300 for token in draft[slip:]]
        frame = play(helped, session, session.next(draft=draft, n=n, stream=stream))
        assert (frame.accepted, len(frame.tokens)) == (slip, n)
        assert frame.forward_100us > 0
        rounds += 1
        further += frame.further
    assert session.ids[len(PROMPT) :] == truth[: len(session.ids) - len(PROMPT)]
    assert helped.target.forwards == rounds + further < rounds * n


@pytest.mark.parametrize("tokens", [1, 3, 7, 32])
def test_forwards_that_a_perfect_draft_saves(tiny: Target, perfect: Path, alone: Alone, tokens: int) -> None:
    """n own tokens cost the first forward, and one for each K + 1 of the rest; never is one token too many said."""
    truth = alone(PROMPT, 150, ENDLESS)
    with beside(tiny, perfect, tokens) as verifier:
        session = verifier.talker.open(sampling=ENDLESS)
        for n in range(1, 16):
            verifier.target.forwards = 0
            assert len(session.play(n=n).tokens) == n
            assert verifier.target.forwards == 1 + -(-(n - 1) // (tokens + 1))
    assert session.ids == PROMPT + truth[: len(session.ids) - len(PROMPT)]


def test_a_sibling_of_the_boards_counts_as_ever(helped: Beside, alone: Alone) -> None:
    truth = alone(PROMPT, 40, ENDLESS)
    session = helped.talker.open(sampling=ENDLESS)
    for n, said in ((1, 2), (2, 2), (3, 3), (8, 8)):
        known = len(session.ids) - len(PROMPT)
        draft = [(truth[known] + 1) % 300, 5]
        frame = session.play(draft=draft, siblings={0: [truth[known]]}, n=n)
        assert (frame.accepted, len(frame.tokens)) == (0, said)
    assert session.ids == PROMPT + truth[: len(session.ids) - len(PROMPT)]


@pytest.mark.parametrize("length", range(1, 15))
def test_an_end_of_text_inside_a_speculated_stretch(
    helped: Beside, alone: Alone, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """The first token, one in mid-stretch, a stretch's last draft token, the target's own behind it: any may end it."""
    text = alone(PROMPT, length, VARIED)
    assert text[-1] not in text[:-1]
    monkeypatch.setattr(helped.target, "end_ids", frozenset(text[-1:]))
    session = helped.talker.open(sampling=msgspec.structs.replace(VARIED, ignore_eos=False), n=512)
    assert (session.frame.finish, session.ids) == ("stop", PROMPT + text)


@pytest.mark.parametrize("prompt_length", range(500, 512))
def test_the_end_of_the_context_inside_a_speculated_stretch(helped: Beside, alone: Alone, prompt_length: int) -> None:
    prompt = [(11 * index) % 299 + 1 for index in range(prompt_length)]
    session = helped.talker.open(prompt, ENDLESS, n=512)
    assert (session.frame.finish, len(session.ids)) == ("length", 512)
    assert session.ids == prompt + alone(prompt, 512 - prompt_length, ENDLESS)


def test_many_boards_at_once(helped: Beside, alone: Alone) -> None:
    """Each draft context follows its own text, while rounds take turns and drafts of boards come in between."""

    def answer(seed: int) -> list[int]:
        session = helped.talker.open([5, seed + 1], Sampling(1.0, seed=seed, ignore_eos=True), n=12)
        session.play(draft=[1, 2, 3], n=7)
        session.play(n=9)
        return session.ids[2:]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, range(8)))
    for seed, ids in enumerate(answers):
        assert ids == alone([5, seed + 1], 28, Sampling(1.0, seed=seed, ignore_eos=True))


def test_nothing_is_read_or_drafted_where_there_is_nothing_to_gain(helped: Beside) -> None:
    """Two own tokens are two forwards, whoever drafts."""
    session = helped.talker.open(n=2)
    session.play(draft=[1, 2], n=2)
    assert helped.guesses_of(session) is None
    session.play(n=3)
    assert helped.guesses_of(session) is not None


def test_a_draft_whose_context_is_shorter_leaves_the_rest_to_the_target(
    tiny: Target, bundle_of: Bundle, alone: Alone, tmp_path: Path
) -> None:
    short = save_target(tmp_path / "short", max_position_embeddings=64)
    with beside(tiny, bundle_of(short)) as verifier:
        session = verifier.talker.open(sampling=ENDLESS, n=100)
        assert session.ids == PROMPT + alone(PROMPT, 100, ENDLESS)
        assert 44 < verifier.target.forwards < 100
        long = [(7 * index) % 299 + 1 for index in range(300)]
        assert verifier.talker.open(long, ENDLESS, n=20).ids == long + alone(long, 20, ENDLESS)


def test_a_draft_that_fails_leaves_the_rest_to_the_target(
    tiny: Target, bundle_of: Bundle, alone: Alone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its manifest promises a longer context than its graph has positions for, so that onnxruntime refuses a step."""
    bundle = bundle_of(save_target(tmp_path / "short", max_position_embeddings=64))
    manifest = msgspec.json.decode((bundle / MANIFEST).read_bytes(), type=Manifest)
    longer = msgspec.structs.replace(manifest.architecture, context=512)
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, architecture=longer)))
    with beside(tiny, bundle) as verifier:
        session = verifier.talker.open(sampling=ENDLESS, n=100)
        session.play(n=100)
    assert session.ids == PROMPT + alone(PROMPT, 200, ENDLESS)
    assert [record.message for record in caplog.records if record.name == "cloud_verifier.model.speculation"] == [
        "the target goes on alone in this session"
    ]


def test_the_list_of_models_says_whether_it_speculates(helped: Beside, talker: Talker) -> None:
    for client, speculates in ((helped.talker, True), (talker, False)):
        [model] = client.told(client.http.get("/v1/models"), ModelList).data
        assert model.speculates is speculates


def test_a_draft_of_another_vocabulary_is_refused_at_the_start(tiny: Target, family: Path) -> None:
    with pytest.raises(TargetError, match="export a draft from this target or leave out --draft"):
        Speculation(family / "bundle", tiny, 5)


@pytest.mark.parametrize("tokens", [0, -1, 72])
def test_a_width_that_no_forward_has_is_refused(tiny: Target, perfect: Path, tokens: int) -> None:
    with pytest.raises(InputError, match="give 1 to 71"):
        Speculation(perfect, tiny, tokens)


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--draft", "FAMILY"], TargetError.exit_code, "has the vocabulary"),
        (["--draft", "nowhere"], BundleMissing.exit_code, "nowhere"),
        (["--draft", "FAMILY", "--draft-tokens", "100"], FlexSpecError.exit_code + 1, "give 1 to 71"),
    ],
    ids=["other vocabulary", "no bundle", "too many tokens"],
)
def test_serve_with_a_bad_draft_ends_with_a_sentence(
    tiny_path: Path, family: Path, options: list[str], code: int, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [option.replace("FAMILY", str(family / "bundle")) for option in options]
    assert main.main(["serve", str(tiny_path), "--port", "0", *options]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert sentence in err
    assert "Traceback" not in err


def test_serve_with_a_draft(tiny_path: Path, perfect: Path, alone: Alone) -> None:
    command = [sys.executable, "-m", "cloud_verifier.cli", "serve", str(tiny_path), "--port", "0", "--threads", "1"]
    command += ["--draft", str(perfect), "--draft-tokens", "3", "--draft-threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            with Talker(process.stdout.readline().split()[-1]) as talker:
                assert talker.told(talker.http.get("/v1/models"), ModelList).data[0].speculates
                assert talker.open(sampling=ENDLESS, n=30).ids == PROMPT + alone(PROMPT, 30, ENDLESS)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def test_with_many_rounds_at_once_the_boards_draft(tiny: Target, perfect: Path, alone: Alone) -> None:
    with besides(tiny, lambda it: Speculation(perfect, it, 5, threads=1, most_rounds=1)) as verifier:
        sessions = [verifier.talker.open([7, seed + 1], ENDLESS) for seed in range(2)]
        verifier.target.hold()
        with ThreadPoolExecutor(2) as pool:
            plays = [pool.submit(session.play, n=30) for session in sessions]
            verifier.target.reached.wait(20)
            while len(verifier.service.in_flight) < 2:
                pass
            verifier.target.release()
            for play in plays:
                play.result()
        # Together they took one forward a token, as long as there were two.
        assert verifier.target.forwards > 20
        for seed, session in enumerate(sessions):
            assert session.ids[2:] == alone([7, seed + 1], 31, ENDLESS)


def test_serve_with_the_shipped_draft_in_torch(family: Path) -> None:
    model, _, end_ids = load_model(family / "target-v1", "cpu", "float32")
    prompt = Tokenizer.from_file(str(family / "bundle" / "tokenizer.json")).encode("def main(").ids
    command = [sys.executable, "-m", "cloud_verifier.cli", "serve", str(family / "target-v1"), "--port", "0"]
    command += ["--threads", "1", "--draft", str(family / "draft-anchor")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            with Talker(process.stdout.readline().split()[-1]) as talker:
                sampling = Sampling(0.7, seed=1, ignore_eos=True)
                session = talker.open(prompt, sampling, n=64)
                assert session.ids == prompt + decode_alone(model, prompt, sampling, 64, end_ids)
                metrics = talker.http.get("/metrics").text
        finally:
            process.kill()
    counted = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(counted["flexspec_forward_seconds_count"]) > 0


def test_the_shipped_family_takes_less_than_half_a_forward_a_token(family: Path, target_v1: Target) -> None:
    model, _, end_ids = load_model(family / "target-v1", "cpu", "float32")
    tokenizer = Tokenizer.from_file(str(family / "bundle" / "tokenizer.json"))
    tokens = forwards = 0
    with beside(target_v1, family / "bundle") as verifier:
        for text in ("def main(", "import os\n", "class Stack:\n"):
            prompt = tokenizer.encode(text).ids
            for sampling in (Sampling(), Sampling(0.7, seed=1), Sampling(1.0, top_p=0.9, seed=2)):
                verifier.target.forwards = 0
                session = verifier.talker.open(prompt, sampling, n=48)
                truth = decode_alone(model, prompt, sampling, 48, end_ids)
                assert session.ids == prompt + truth
                forwards += verifier.target.forwards
                tokens += len(truth)
    assert forwards < 0.5 * tokens
