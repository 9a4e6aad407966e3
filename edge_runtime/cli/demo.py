"""`edge-runtime demo`: generate with a verifier on this machine, and compare with the target decoding alone."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_runtime.cli.draft_options import EXAMPLE_FAMILY
from edge_runtime.cli.generate import add_max_new_tokens_option
from edge_runtime.cli.planner_options import add_planner_options, make_planner
from edge_runtime.cli.settings_options import add_settings, read_settings
from edge_runtime.common.options import add_option
from edge_runtime.protocol.errors import InputError, VerifierUnreachable

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    from rich.table import Table

    from edge_runtime.decoding import Generation
    from edge_runtime.protocol.sampling import Sampling

HELP = "start a verifier here, generate with it, and check that the text is exact"
DESCRIPTION = """\
Starts a verifier on this machine for each target, generates a few texts with the draft model and that verifier, and
checks that each text equals the one that the target decodes alone, token by token. Needs flexspec[cloud].

examples:
  edge-runtime demo
  edge-runtime demo --target target-v1 --num-assistant-tokens 8 --max-new-tokens 64
"""

# Chosen: importing torch and loading the target take seconds; a busy or slow machine takes ten times as long.
VERIFIER_START_SECONDS = 120.0

COLUMNS = ("target", "sampling", "tokens", "rounds", "accepted", "bytes/token", "ms/token", "exact")
# Label, sampling parameters, prompt.
PROMPTS: list[tuple[str, dict[str, Any], str]] = [
    ("greedy", {}, 'def read_config(path):\n    """Read'),
    ("T=0.7", {"temperature": 0.7, "seed": 1}, "class Connection:\n    def __init__(self, host, port"),
    ("T=1 p=.95", {"temperature": 1.0, "top_p": 0.95, "seed": 2}, "import unittest\n\nclass Test"),
]


class DemoText(NamedTuple):
    """One generated text."""

    label: str
    prompt_ids: list[int]
    new_ids: list[int]
    generation: Generation
    sampling: Sampling


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_settings(parser, "draft.bundle", default="$FLEXSPEC_BUNDLE, else the bundle shipped with a source checkout")
    add_settings(parser, "draft.threads")
    add_max_new_tokens_option(parser)
    text = "directory of the targets (default: the model family shipped with a source checkout)"
    parser.add_argument("--family", type=Path, default=EXAMPLE_FAMILY, metavar="DIR", help=text)
    text = "target in the family; may be repeated (default: target-v1, then target-v2, with the same frozen draft)"
    add_option(parser, "--target NAME", text, action="append", dest="targets")
    # The demo shows drafting; a planner may find that with a verifier on the same machine it does not pay.
    add_planner_options(parser, default_policy="fixed")
    parser.set_defaults(run=_run)


async def _run(options: argparse.Namespace) -> int:
    """Run the demo. Returns 0 if every text is exact, else 1."""
    from rich.console import Console
    from rich.table import Table

    from edge_runtime.cli.text_stream import TextStream
    from edge_runtime.decoding import Generation
    from edge_runtime.draft import OnnxDraft
    from edge_runtime.protocol.sampling import Sampling
    from edge_runtime.verifier import VerifierClient

    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("cloud_verifier") is None:
        raise InputError('the demo runs the verifier here too: pip install "flexspec[cloud]", or use `make demo`')
    console = Console(highlight=False)
    # Without --config, these are the defaults and the command line.
    settings = read_settings(options)
    bundle = settings.draft.bundle or Path(os.environ.get("FLEXSPEC_BUNDLE") or EXAMPLE_FAMILY / "bundle")
    draft = OnnxDraft.load(bundle, threads=settings.draft.threads)
    planner = make_planner(options, settings.planner, draft)
    all_exact = True
    table = Table(*COLUMNS, box=None)
    for name in options.targets or ["target-v1", "target-v2"]:
        target = options.family / name
        if not target.is_dir():
            raise InputError(f"no target at {target}; choose another with --family and --target")
        texts = []
        async with _run_verifier(target) as url, VerifierClient(url) as client:
            for label, parameters, prompt in PROMPTS:
                sampling = Sampling(**parameters)
                ids = draft.tokenizer.encode(prompt).ids
                generation = Generation(
                    draft, client, ids, sampling, max_new_tokens=options.max_new_tokens, planner=planner
                )
                stream = TextStream(draft.tokenizer, sys.stdout)
                console.rule(f"{name}, {label}", align="left")
                stream.write_legend()
                stream.write_prompt(prompt)
                async for verified in generation:
                    stream.write(verified)
                stream.end()
                texts.append(DemoText(label, ids, generation.ids[len(ids) :], generation, sampling))
        with console.status(f"{name} decodes alone, token by token, for comparison"):
            references = await _decode_alone(target, texts, options.max_new_tokens)
        for text, reference in zip(texts, references, strict=True):
            exact = text.new_ids == reference
            all_exact = all_exact and exact
            _add_row(table, name, text, exact)
    console.print(table)
    console.print(f"exact: {'yes' if all_exact else 'NO'} (compared with the targets decoding alone, token by token)")
    return 0 if all_exact else 1


def _add_row(table: Table, target: str, text: DemoText, exact: bool) -> None:
    statistics = text.generation.statistics
    tokens = max(1, statistics.tokens)
    acceptance = statistics.acceptance
    cells = (
        target,
        text.label,
        str(statistics.tokens),
        str(statistics.rounds),
        "-" if acceptance is None else f"{acceptance:.0%}",
        f"{statistics.bytes_total / tokens:.0f}",
        f"{1e3 * statistics.seconds / tokens:.1f}",
        "yes" if exact else "NO",
    )
    table.add_row(*cells)


@contextlib.asynccontextmanager
async def _run_verifier(target: Path) -> AsyncIterator[str]:
    """Run a verifier process for `target` on a free port of this machine; yield its URL."""
    process = await _start_cloud_verifier("serve", str(target), "--port", "0")
    assert process.stdout is not None
    try:
        try:
            async with asyncio.timeout(VERIFIER_START_SECONDS):
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


async def _decode_alone(target: Path, texts: list[DemoText], max_new_tokens: int) -> list[list[int]]:
    """Return the ids that `target` generates for the same prompts in a process without sessions, trees or drafts."""
    import msgspec

    process = await _start_cloud_verifier("generate", str(target), "--jobs", "-")
    jobs = [{"ids": text.prompt_ids, "max_new_tokens": max_new_tokens, "sampling": text.sampling} for text in texts]
    output, _ = await process.communicate(b"".join(msgspec.json.encode(job) + b"\n" for job in jobs))
    return [msgspec.json.decode(line, type=list[int]) for line in output.splitlines()]


async def _start_cloud_verifier(*arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cloud_verifier.cli", *arguments, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
    )
