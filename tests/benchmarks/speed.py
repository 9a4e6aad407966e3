"""Overheads of FlexSpec, measured within one run: `python -m tests.benchmarks run speed`.

draft step      fp32 fused graph, one thread, relative to reading its weights once at the measured bandwidth
loop            Python time per round outside onnxruntime and the HTTP client
client          CPU time of the HTTP client per round
verifier        HTTP and scheduling on top of the verifier's forward, with a bare socket on loopback
cold start      from process start to the first draft token
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import numpy as np

from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.draft.onnx_runner import make_runner
from edge_runtime.planning.plan import FixedPlanner, Outcome, Plan
from edge_runtime.protocol import messages
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from export.bundle.build import BundleConfig, make_bundle
from tests.benchmarks.harness.benchmark import Benchmark, Measure, Quantity, Scenario, Values
from tests.models import save_target
from tests.toy_family import FAMILY

PROMPT = "class Connection:\n    def __init__(self, host, port"
COLD_START = """
import time
from pathlib import Path
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.draft.model import OnnxDraft
context = OnnxDraft.load(Path({bundle!r})).new_context()
context.propose([5, 6, 7], 1, Sampling())
"""


def measure_read_bandwidth(size: int = 256 << 20) -> float:
    """Return the bytes per second at which one thread reads memory: the best of several methods and repetitions."""
    data = np.ones(size // 4, np.float32)
    methods: tuple[Callable[[], object], ...] = (data.sum, data.max, lambda: data.view(np.uint64).max())
    return max(size / time_seconds(method) for method in methods for _ in range(4))


def time_seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_draft_step(directory: Path) -> tuple[float, float]:
    """Return the seconds of a decode step of a 60M draft, which exceeds CPU caches, and of reading its weights."""
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 64}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = save_target(directory / "model", **shape, **heads, initializer_range=0.02)
    make_bundle(BundleConfig(model, model, "fused", "fp32", "speed " * 20), directory / "bundle", lambda step: None)
    draft = OnnxDraft.load(directory / "bundle", threads=1)
    runner = make_runner(draft.session, draft.manifest.architecture)
    runner.append(list(range(100)))
    times = [time_seconds(lambda: runner.append([7])) for _ in range(200)]
    return statistics.median(times), draft.manifest.files["model.onnx.data"].bytes / measure_read_bandwidth()


@contextmanager
def run_verifier(target: Path, *options: str) -> Iterator[str]:
    """Run a verifier process; yields its URL."""
    command = [sys.executable, "-m", "cloud_verifier.cli", "serve", str(target), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


class OutcomeRecorder(FixedPlanner):
    """A fixed plan that records the outcomes of all rounds."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.outcomes: list[Outcome] = []

    def observe(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


async def measure_loop(url: str, draft: OnnxDraft, sampling: Sampling) -> tuple[float, float]:
    """Return the median seconds per round of (the loop's own Python, CPU time of the HTTP client)."""
    own, client_cpu = [], []
    ids = draft.tokenizer.encode(PROMPT).ids
    async with VerifierClient(url) as client:
        for seed in range(12):
            recorder = OutcomeRecorder(Plan(5, siblings=3))
            run, cpu, started = draft.run_seconds, time.process_time(), time.perf_counter()
            generation = Generation(
                draft,
                client,
                ids,
                Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed, ignore_eos=True),
                max_new_tokens=64,
                planner=recorder,
            )
            async for _ in generation:
                pass
            rounds = len(recorder.outcomes)
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
            run = draft.run_seconds - run
            exchange = sum(outcome.exchange_seconds for outcome in recorder.outcomes)
            python = wall - exchange - run
            own.append(python / rounds)
            client_cpu.append((cpu - run - python) / rounds)
    return statistics.median(own), statistics.median(client_cpu)


def measure_verifier_overhead(url: str, rounds: int = 300) -> float:
    """Return the median seconds of a round minus the reported forward time, with a bare HTTP/1.1 socket."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def post(path: str, message: messages.Message, session: str = "") -> bytes:
            body = messages.encode(message, messages.MSGPACK, session)
            head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: {messages.MSGPACK}\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(65536)
            head_bytes, _, answer = received.partition(b"\r\n\r\n")
            lines = head_bytes.lower().split(b"\r\n")
            length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
            while len(answer) < length:
                answer += connection.recv(65536)
            return answer

        first = messages.RoundRequest(messages.PROTOCOL_VERSION, 0, 100)
        key, prompt = f"speed-{time.time_ns()}", list(range(100, 200))
        opening = messages.OpenRequest(messages.PROTOCOL_VERSION, key, prompt, first, Sampling(ignore_eos=True))
        opened = messages.decode(post("/v1/sessions", opening), messages.OpenReply, messages.MSGPACK)
        position, overheads = 100 + len(opened.first.tokens), []
        for number in range(1, rounds):
            request = messages.RoundRequest(messages.PROTOCOL_VERSION, number, position, [5, 6, 7, 8])
            started = time.perf_counter()
            reply = post(f"/v1/sessions/{opened.session}/rounds", request, opened.session)
            frame = messages.decode(reply, messages.Frame, messages.MSGPACK, opened.session)
            overheads.append(time.perf_counter() - started - frame.forward_100us / 1e4)
            position += frame.accepted + len(frame.tokens)
    return statistics.median(overheads)


def measure_cold_start() -> float:
    """Return the seconds from process start to the first draft token."""
    program = COLD_START.format(bundle=str(FAMILY / "bundle"))
    return time_seconds(lambda: subprocess.run([sys.executable, "-c", program], check=True))


STEP = Quantity("draft step, in times of reading its weights", goal=1.25)
PYTHON = Quantity("the loop's own Python per round", "ms", goal=0.5)
CLIENT = Quantity("CPU time of the HTTP client per round", "ms")
OVERHEAD = Quantity("HTTP and scheduling of the verifier per round", "ms", goal=1.5)
COLD_START_TIME = Quantity("process start to the first draft token", "s", goal=2.0)
SAMPLINGS = {
    "greedy": Sampling(),
    "T=1": Sampling(temperature=1.0),
    "T=0.7, top-p 0.9": Sampling(temperature=0.7, top_p=0.9),
}
LOOP = "K=5, 3 siblings, "


@asynccontextmanager
async def running() -> AsyncIterator[Measure]:
    draft = OnnxDraft.load(FAMILY / "bundle", threads=1)
    with run_verifier(FAMILY / "target-v1", "--threads", "1") as url, tempfile.TemporaryDirectory() as scratch:

        async def measure(scenario: Scenario, repetition: int) -> Values:
            if STEP in scenario.quantities:
                step, floor = measure_draft_step(Path(scratch) / str(repetition))
                return {STEP.name: step / floor}
            if PYTHON in scenario.quantities:
                own, client = await measure_loop(url, draft, SAMPLINGS[scenario.key.removeprefix(LOOP)])
                return {PYTHON.name: 1e3 * own, CLIENT.name: 1e3 * client}
            if OVERHEAD in scenario.quantities:
                return {OVERHEAD.name: 1e3 * await asyncio.to_thread(measure_verifier_overhead, url)}
            return {COLD_START_TIME.name: await asyncio.to_thread(measure_cold_start)}

        yield measure


BENCHMARK = Benchmark(
    name="speed",
    title="Overheads of FlexSpec",
    scenarios=(
        Scenario({"of": "60M draft, fp32, one thread"}, (STEP,)),
        *(Scenario({"of": LOOP + name}, (PYTHON, CLIENT)) for name in SAMPLINGS),
        Scenario({"of": "bare socket"}, (OVERHEAD,)),
        Scenario({"of": "cold start"}, (COLD_START_TIME,)),
    ),
    running=running,
    repetitions=5,
    quick_repetitions=1,
)
