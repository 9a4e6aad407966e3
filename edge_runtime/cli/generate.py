"""`edge-runtime generate`: one answer on a terminal, into a pipe, or as JSON."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

import msgspec
import psutil

from edge_runtime.cli.memory import memory_of
from edge_runtime.cli.planner_options import planner_of, watching
from edge_runtime.cli.text_stream import TextStream
from edge_runtime.cli.verifier_options import client_arguments
from edge_runtime.decoding.generation import Generation
from edge_runtime.decoding.statistics import Statistics
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.link_faults import HINTS, Fault

# Between two looks whether the verifier is there.
TROUBLE_SECONDS = 2.0


class Report(msgspec.Struct):
    """What `--json` prints.

    Attributes:
        text, ids: what the target said.
        unverified: what the draft alone says comes behind it, for want of a verifier.
        memory_bytes: the process's resident memory at the end.
    """

    text: str
    ids: list[int]
    unverified: str
    finish: str
    version: str
    acceptance: float | None
    memory_bytes: int
    statistics: Statistics


def sampling_of(temperature: float, top_k: int, top_p: float, seed: int, ignore_eos: bool = False) -> Sampling:
    """Sampling from a user's numbers. Raises InputError."""
    try:
        return Sampling(temperature, top_k, top_p, seed, ignore_eos)
    except ValueError as error:
        raise InputError(str(error)) from None


def summary(statistics: Statistics) -> str:
    """The statistics in one line."""
    tokens = max(1, statistics.tokens)
    acceptance = "nothing drafted" if statistics.acceptance is None else f"{statistics.acceptance:.0%} accepted"
    return (
        f"{statistics.tokens} tokens in {statistics.rounds} rounds, {acceptance}, "
        f"{statistics.bytes_total / tokens:.0f} bytes and {1e3 * statistics.seconds / tokens:.1f} ms per token "
        f"(draft {1e3 * statistics.draft_seconds / tokens:.1f}, link {1e3 * statistics.link_seconds / tokens:.1f}, "
        f"verifier {1e3 * statistics.verifier_seconds / tokens:.1f})"
    )


async def generate(options: argparse.Namespace, prompt: str) -> int:
    """Runs the command. Returns the exit code; raises FlexSpecError."""
    sampling = sampling_of(options.temperature, options.top_k, options.top_p, options.seed, options.ignore_eos)
    draft = OnnxDraft.load(options.bundle, threads=options.threads)
    ids: list[int] = draft.tokenizer.encode(prompt).ids
    planner = planner_of(options, draft)
    async with (
        VerifierClient(**client_arguments(options)) as client,
        watching(client.meter) as surroundings,
    ):
        generation = Generation(
            draft,
            client,
            ids,
            sampling,
            max_new_tokens=options.max_new_tokens,
            planner=planner,
            model=options.model,
            surroundings=surroundings,
            on_link_loss=options.on_link_loss,
            memory=memory_of(options, draft.manifest),
        )
        text = TextStream(draft.tokenizer, sys.stdout)
        if options.echo and not options.json:
            text.prompt(prompt)
        async with _telling_trouble(client, quiet=options.quiet):
            async for piece in generation:
                if not options.json:
                    text.piece(piece)
    if options.json:
        new = generation.ids[len(ids) :]
        report = Report(
            draft.tokenizer.decode(new),
            new,
            draft.tokenizer.decode(generation.unverified),
            generation.finish,
            generation.version,
            generation.statistics.acceptance,
            psutil.Process().memory_info().rss,
            generation.statistics,
        )
        print(msgspec.json.encode(report).decode())
    else:
        text.end(generation.unverified)
        if generation.unverified:
            print(
                f"edge-runtime: the last {len(generation.unverified)} tokens are unverified: {client.trouble}",
                file=sys.stderr,
            )
        if not options.quiet:
            print(f"{generation.version or 'no verifier'}: {summary(generation.statistics)}", file=sys.stderr)
    return 0


@contextlib.asynccontextmanager
async def _telling_trouble(client: VerifierClient, *, quiet: bool) -> AsyncIterator[None]:
    """Says on standard error why nothing comes, each reason once."""

    async def watch() -> None:
        told: Fault | None = None
        while True:
            await asyncio.sleep(TROUBLE_SECONDS)
            trouble = client.trouble
            if trouble and trouble.fault != told:
                told = trouble.fault
                print(f"edge-runtime: no verifier yet ({trouble}): {HINTS[told]}", file=sys.stderr)

    watching_it = None if quiet else asyncio.create_task(watch())
    try:
        yield
    finally:
        if watching_it:
            watching_it.cancel()
