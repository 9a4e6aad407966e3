"""The process in the cloud: `python -m tests.benchmarks.comparison.cloud KIND [OPTION ...]`.

    verifier       `cloud-verifier` with these options
    probabilities  the same target and runner behind the wire format of `distributions`: TARGET HOST PORT DEVICE

Its forwards take the time of the verifier named by the last `SetPace` on its standard input. What it prints, except for
the replies to that, goes to its standard error. `/readyz` says when it serves.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cloud_verifier.cli.main import main as run_cloud_verifier
from cloud_verifier.model.kv_cache import CachedSequence
from cloud_verifier.model.prefix_cache import CacheScope, PrefixCache
from cloud_verifier.model.runner import TargetRunner
from cloud_verifier.model.target import Target
from cloud_verifier.model.tree import TokenTree
from edge_runtime.common.http_server import HttpServer, ListenOptions
from edge_runtime.protocol.sampling import Sampling
from tests.benchmarks.comparison.distributions import (
    Probabilities,
    ProbabilityOpening,
    ProbabilityReply,
    ProbabilityRound,
    decode_distribution,
    draw,
    encode_distribution,
    judge,
    residual,
    warp,
)
from tests.benchmarks.comparison.isolation import SampleIsolation
from tests.benchmarks.comparison.pacing import PaceCounts
from tests.benchmarks.comparison.verifier_pacing import VerifierPace
from tests.emulator.control import claim_standard_output

POOL_TOKENS = 1 << 15
# Tokens of a prompt in one forward, as in the verifier.
PREFILL_ROWS = TargetRunner.max_prefill_rows


class SetPace(msgspec.Struct):
    """Command: begin a sample, take the time of this verifier (`VerifierPace.set_verifier`), count forwards anew."""

    verifier: str


class ProbabilitySession:
    """One text.

    Attributes:
        ids: the text as far as this end knows it.
        last: the token that both ends know and that no forward has read yet; -1 if the board has yet to draw it.
        replies: answers by number of the round.
    """

    def __init__(self, opening: ProbabilityOpening) -> None:
        self.sequence = CachedSequence()
        self.ids = list(opening.prompt)
        self.temperature = opening.temperature
        self.random = np.random.default_rng([opening.seed, 1])
        self.last = opening.prompt[-1]
        self.replies: dict[int, bytes] = {}


class ProbabilityVerifier:
    """Verifies drafts by their probabilities, one round at a time."""

    def __init__(self, target: Target) -> None:
        self._target = target
        assert isinstance(target.runner, TargetRunner), "the general tier gives no logits"
        self._runner = target.runner
        if replay := getattr(self._runner, "replay", None):
            # On a GPU, forwards for logits are CUDA graphs here, as those are that sample in them.
            self._runner.forward = replay  # type: ignore[method-assign]
        self._pool = target.runner.shape.make_pool(POOL_TOKENS)
        self._prefixes = PrefixCache(self._pool)
        self._sessions: dict[int, ProbabilitySession] = {}
        self._lock = threading.Lock()

    def answer(self, body: bytes) -> bytes:
        request = msgspec.msgpack.decode(body, type=ProbabilityRound)
        with self._lock:
            number = self._open(request.opening) if request.opening else request.session
            session = self._sessions[number]
            if request.round not in session.replies:
                session.replies[request.round] = self._verify(number, session, request)
            return session.replies[request.round]

    def close(self, number: int) -> None:
        with self._lock:
            if session := self._sessions.pop(number, None):
                self._prefixes.close(session.sequence)

    def _open(self, opening: ProbabilityOpening) -> int:
        number = max(self._sessions, default=0) + 1
        session = self._sessions[number] = ProbabilitySession(opening)
        self._target.prepare_cache(session.sequence, len(session.ids))
        known, scope = opening.prompt[:-1], CacheScope("", self._target)
        reused = self._prefixes.open(scope, session.ids, session.sequence) or 0
        for start in range(reused, len(known), PREFILL_ROWS):
            chunk = known[start : start + PREFILL_ROWS]
            self._target.run(self._pool, [self._target.prefill_segment(session.sequence, chunk)])
            self._pool.keep(session.sequence, list(range(len(chunk))))
        return number

    def _verify(self, number: int, session: ProbabilitySession, request: ProbabilityRound) -> bytes:
        started = time.perf_counter()
        tokens = request.tokens
        if session.last < 0:
            # The board has drawn the token after the last rejection, and sends it first.
            session.last, tokens = tokens[0], tokens[1:]
            session.ids.append(session.last)
        sequence = session.sequence
        tree = TokenTree(session.last, sequence.length + 1, tokens, {})
        segment = self._target.tree_segment(sequence, tree, Sampling())
        [logits] = self._runner.logits(self._pool, [segment])
        forward_100us = round(1e4 * (time.perf_counter() - started))
        target: list[Probabilities] = [warp(row, session.temperature) for row in logits.cpu().numpy()]
        draft: list[Probabilities] = []
        if request.traditional:
            draft = [decode_distribution(each, len(target[0])) for each in request.draft_probabilities]
            drafted = np.array([q[token] for q, token in zip(draft, tokens, strict=True)], np.float32)
        else:
            drafted = np.frombuffer(b"".join(request.draft_probabilities), "<f2").astype(np.float32)
        accepted, rejected = judge(tokens, drafted, target, session.random)
        self._pool.keep(sequence, list(range(accepted + 1)))
        distribution, token = b"", -1
        if not rejected:
            token = draw(target[accepted], session.random)
        elif request.traditional:
            token = draw(residual(target[accepted], draft[accepted]), session.random)
        else:
            distribution = encode_distribution(target[accepted])
        session.last = token
        session.ids += [*tokens[:accepted], token] if token >= 0 else tokens[:accepted]
        return msgspec.msgpack.encode(ProbabilityReply(number, accepted, token, forward_100us, distribution))


def make_app(verifier: ProbabilityVerifier) -> Starlette:
    """The HTTP interface of a verifier that receives probabilities."""

    async def answer_round(request: Request) -> Response:
        return Response(await asyncio.to_thread(verifier.answer, await request.body()))

    async def answer_readiness(_request: Request) -> Response:
        return Response()

    async def close_session(request: Request) -> Response:
        await asyncio.to_thread(verifier.close, int(request.path_params["number"]))
        return Response()

    return Starlette(
        routes=[
            Route("/readyz", answer_readiness),
            Route("/rounds", answer_round, methods=["POST"]),
            Route("/sessions/{number:int}", close_session, methods=["DELETE"]),
        ]
    )


async def serve_probabilities(target_path: Path, host: str, port: int, device: str) -> None:
    """Serve until the process ends."""
    torch.set_num_threads(1)
    app = make_app(ProbabilityVerifier(Target(target_path, device=device, dtype=torch.float32)))
    await HttpServer(app, ListenOptions(host=host, port=port)).start()
    await asyncio.Event().wait()


def main() -> None:
    pace, isolation = VerifierPace(), SampleIsolation()
    pace.install()
    isolation.install()
    replies = claim_standard_output()

    def obey() -> None:
        for line in sys.stdin:
            pace.set_verifier(msgspec.json.decode(line, type=SetPace).verifier)
            counts, pace.counts = pace.counts, PaceCounts()
            isolation.sample += 1
            replies.write(msgspec.json.encode(counts) + b"\n")

    kind, *arguments = sys.argv[1:]
    threading.Thread(target=obey, daemon=True).start()
    if kind == "verifier":
        sys.exit(run_cloud_verifier(["serve", *arguments]))
    target, host, port, device = arguments
    asyncio.run(serve_probabilities(Path(target), host, int(port), device))


if __name__ == "__main__":
    main()
