"""`edge-runtime demo`: a verifier on loopback, a few answers, and the proof that each is the target's own text."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from edge_runtime.cli.planner_options import planner_of
from edge_runtime.cli.text_stream import TextStream
from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.errors import InputError, VerifierUnreachable
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient

START_SECONDS = 120.0

PROMPTS = [
    ("greedy", Sampling(), 'def read_config(path):\n    """Read'),
    ("T=0.7", Sampling(temperature=0.7, seed=1), "class Connection:\n    def __init__(self, host, port"),
    ("T=1 p=.95", Sampling(temperature=1.0, top_p=0.95, seed=2), "import unittest\n\nclass Test"),
]


class Run(msgspec.Struct):
    """One demonstrated answer."""

    target: str
    label: str
    prompt: list[int]
    new: list[int]
    generation: Generation
    sampling: Sampling


async def demo(options: argparse.Namespace) -> int:
    """Runs the command. Returns 0 if every text was exact, else 1; raises FlexSpecError."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("cloud_verifier") is None:
        raise InputError('the demo runs the verifier here too: pip install "flexspec[cloud]", or use `make demo`')
    console = Console(highlight=False)
    draft = OnnxDraft.load(options.bundle, threads=options.threads)
    planner = planner_of(options, draft)
    exact = True
    table = Table("target", "sampling", "tokens", "rounds", "accepted", "bytes/token", "ms/token", "exact", box=None)
    for name in options.targets or ["target-v1", "target-v2"]:
        target = options.family / name
        if not target.is_dir():
            raise InputError(f"no target at {target}; --family and --target choose another")
        runs = []
        async with _verifier(target) as url, VerifierClient(url) as client:
            for label, sampling, prompt in PROMPTS:
                ids = draft.tokenizer.encode(prompt).ids
                generation = Generation(
                    draft, client, ids, sampling, max_new_tokens=options.max_new_tokens, planner=planner
                )
                text = TextStream(draft.tokenizer, sys.stdout)
                console.rule(f"{name}, {label}", align="left")
                text.legend()
                text.prompt(prompt)
                async for piece in generation:
                    text.piece(piece)
                text.end()
                runs.append(Run(name, label, ids, generation.ids[len(ids) :], generation, sampling))
        with console.status(f"{name} alone, one token after the other, to compare"):
            alone = await _alone(target, runs, options.max_new_tokens)
        for run, expected in zip(runs, alone, strict=True):
            same = run.new == expected
            exact = exact and same
            _add_row(table, run, same)
    console.print(table)
    console.print(f"exact: {'yes' if exact else 'NO'} (compared with the targets writing alone, token by token)")
    return 0 if exact else 1


def _add_row(table: Table, run: Run, same: bool) -> None:
    statistics = run.generation.statistics
    tokens = max(1, statistics.tokens)
    acceptance = statistics.acceptance
    table.add_row(
        run.target,
        run.label,
        str(statistics.tokens),
        str(statistics.rounds),
        "-" if acceptance is None else f"{acceptance:.0%}",
        f"{statistics.bytes_total / tokens:.0f}",
        f"{1e3 * statistics.seconds / tokens:.1f}",
        "yes" if same else "NO",
    )


@contextlib.asynccontextmanager
async def _verifier(target: Path) -> AsyncIterator[str]:
    """A verifier process serving `target` on a free port of this machine; its URL."""
    process = await _cloud("serve", str(target), "--port", "0")
    assert process.stdout is not None
    try:
        try:
            async with asyncio.timeout(START_SECONDS):
                line = (await process.stdout.readline()).decode()
        except TimeoutError:
            line = ""
        if " on http" not in line:
            raise VerifierUnreachable(f"the verifier for {target} did not start; run `cloud-verifier serve {target}`")
        yield line.rsplit(" ", 1)[1].strip()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def _alone(target: Path, runs: list[Run], max_new_tokens: int) -> list[list[int]]:
    """What `target` writes by itself for the same prompts: another process, without sessions, trees or drafts."""
    process = await _cloud("generate", str(target), "--jobs", "-")
    jobs = [{"ids": run.prompt, "max_new_tokens": max_new_tokens, "sampling": run.sampling} for run in runs]
    output, _ = await process.communicate(b"".join(msgspec.json.encode(job) + b"\n" for job in jobs))
    return [msgspec.json.decode(line, type=list[int]) for line in output.splitlines()]


async def _cloud(*arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cloud_verifier.cli", *arguments, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
    )
