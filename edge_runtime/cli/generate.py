"""`edge-runtime generate`: continue one prompt, on a terminal, into a pipe, or as JSON."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.cli.draft_options import resolve_bundle
from edge_runtime.cli.generation_factory import GenerationFactory, add_generation_options
from edge_runtime.cli.settings_options import add_settings, read_settings
from edge_runtime.common.grammar_options import add_grammar_options, read_grammar
from edge_runtime.common.options import add_flag, add_option
from edge_runtime.common.prompt_text import check_text, read_file, read_standard_input
from edge_runtime.common.sampling_options import add_sampling_options, read_sampling
from edge_runtime.common.tasks import background_task
from edge_runtime.common.terminal import print_note
from edge_runtime.protocol.errors import InputError

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    from edge_runtime.decoding import GenerationStatistics
    from edge_runtime.verifier import Fault, VerifierClient

HELP = "continue a prompt"
DESCRIPTION = """\
Continues a prompt: the draft model runs here, the target model on a verifier. On a terminal, accepted draft tokens are
green and the target's own tokens yellow. The text depends only on target, prompt, sampling options and seed.

examples:
  edge-runtime generate "The sea is" --verifier http://127.0.0.1:8500 --max-new-tokens 64
  edge-runtime generate --file prompt.txt --temperature 0.7 --top-p 0.9 --seed 1 --json
  git log -1 | edge-runtime generate --objective balanced --profile raspberry-pi-5 --explain
  edge-runtime generate "The sea is" --num-assistant-tokens 8 --siblings 3
  edge-runtime generate "A book as JSON: " --json-schema book.json
"""

# Interval between checks whether the verifier can be reached.
TROUBLE_CHECK_SECONDS = 2.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("prompt", nargs="?", help="text to continue (default: standard input)")
    add_option(parser, "--file FILE", "read the prompt from a file", type=Path)
    add_settings(parser, "draft.bundle", "draft.threads")
    add_max_new_tokens_option(parser)
    add_sampling_options(parser)
    add_grammar_options(parser)
    add_flag(parser, "--echo", "print the prompt before its continuation")
    add_flag(parser, "--json", "print one JSON object: text, ids, statistics")
    add_flag(parser, "--quiet", "print neither statistics nor link trouble on standard error")
    add_generation_options(parser)
    parser.set_defaults(run=_run)


def add_max_new_tokens_option(parser: argparse.ArgumentParser, default: int = 128) -> None:
    """Add --max-new-tokens, the limit of each answer."""
    add_option(parser, "--max-new-tokens N", "tokens to generate at most", default=default)


async def _run(options: argparse.Namespace) -> int:
    import msgspec
    import psutil

    from edge_runtime.cli.text_stream import TextStream
    from edge_runtime.decoding import decode_continuation
    from edge_runtime.draft import OnnxDraft

    settings = read_settings(options)
    bundle = resolve_bundle(options, settings.draft)
    prompt = _read_prompt(options)
    sampling = read_sampling(options, grammar=read_grammar(options))
    draft = OnnxDraft.load(bundle, threads=settings.draft.threads)
    ids: list[int] = draft.tokenizer.encode(prompt).ids
    factory = GenerationFactory(options, settings, draft)
    async with factory.connect(settings, sampling) as (client, generate):
        generation = generate(ids)
        text = TextStream(draft.tokenizer, sys.stdout, prompt=ids, stop_ids=sampling.stop_ids)
        if options.echo and not options.json:
            text.write_prompt(prompt)
        async with contextlib.nullcontext() if options.quiet else background_task(report_link_trouble(client)):
            async for verified in generation:
                if not options.json:
                    text.write(verified)
    statistics = generation.statistics
    if options.json:
        new_ids = generation.ids[len(ids) :]
        report = {
            "text": decode_continuation(draft.tokenizer, ids, new_ids, sampling.stop_ids),
            "ids": new_ids,
            # What the draft continued alone while no verifier could be reached.
            "unverified": decode_continuation(draft.tokenizer, generation.ids, generation.unverified),
            "finish": generation.finish,
            "version": generation.version,
            "acceptance": statistics.acceptance,
            # Resident memory of this process at the end.
            "memory_bytes": psutil.Process().memory_info().rss,
            "statistics": statistics,
        }
        print(msgspec.json.encode(report).decode())
        return 0
    text.end(generation.unverified)
    if generation.unverified:
        count = len(generation.unverified)
        print_note(f"edge-runtime: the last {count} tokens are unverified: {client.trouble}")
    if not options.quiet:
        print_note(f"{generation.version or 'no verifier'}: {summarize(statistics)}")
    return 0


def _read_prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None and options.file is not None:
        raise InputError("give a prompt or --file, not both")
    if options.file is not None:
        return read_file(options.file)
    if options.prompt is not None:
        return check_text(options.prompt)
    return read_standard_input()


def summarize(statistics: GenerationStatistics) -> str:
    """Return tokens, acceptance and cost of one answer in a line."""
    tokens = max(1, statistics.tokens)
    acceptance = "nothing drafted" if statistics.acceptance is None else f"{statistics.acceptance:.0%} accepted"
    return (
        f"{statistics.tokens} tokens in {statistics.rounds} rounds, {acceptance}, "
        f"{statistics.bytes_total / tokens:.0f} bytes and {1e3 * statistics.seconds / tokens:.1f} ms per token "
        f"(draft {1e3 * statistics.draft_seconds / tokens:.1f}, link {1e3 * statistics.link_seconds / tokens:.1f}, "
        f"verifier {1e3 * statistics.verifier_seconds / tokens:.1f})"
    )


async def report_link_trouble(client: VerifierClient) -> None:
    """Print to standard error why no verifier can be reached; consecutive reports of the same fault only once."""
    from edge_runtime.verifier import HINTS

    reported: Fault | None = None
    while True:
        await asyncio.sleep(TROUBLE_CHECK_SECONDS)
        trouble = client.trouble
        if trouble and trouble.fault != reported:
            reported = trouble.fault
            print_note(f"edge-runtime: no verifier yet ({trouble}): {HINTS[reported]}")
