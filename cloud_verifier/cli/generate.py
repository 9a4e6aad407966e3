"""`cloud-verifier generate`: the texts that a target generates alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from edge_runtime.common.grammar_options import add_grammar_options, read_grammar
from edge_runtime.common.options import add_option, whole_number
from edge_runtime.common.program import killed_by_sigint
from edge_runtime.common.prompt_text import MAX_PROMPT_BYTES, check_text, read_standard_input
from edge_runtime.common.sampling_options import add_sampling_options, read_sampling
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling, validate_prompt

DESCRIPTION = """\
Decodes with the target alone, by transformers' own `generate` and the rule of sampling: the reference for every text
that a board gets.

examples:
  cloud-verifier generate family/target-v1 "def main(" --max-new-tokens 32
  cloud-verifier generate family/target-v1 "The sea is" --temperature 0.7 --seed 1
  echo '{"ids": [1, 2, 3], "max_new_tokens": 8}' | cloud-verifier generate family/target-v1 --jobs -
"""


class GenerationJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text to generate, as a line of --jobs."""

    ids: list[int]
    max_new_tokens: Annotated[int, msgspec.Meta(ge=0)]
    sampling: Sampling = Sampling()


def add_parser(commands: Any, model_options: argparse.ArgumentParser) -> None:
    """Add `generate` to argparse's subparsers. `model_options` has the options of how targets are loaded."""
    parser = commands.add_parser(
        "generate",
        parents=[model_options],
        help="decode with the target alone, without a board: the reference for every other text",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target",
        type=Path,
        metavar="TARGET",
        help="directory of a Hugging Face checkpoint or a PEFT adapter, or a GGUF file",
    )
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="one or more prompts (default: standard input)")
    add_option(parser, "--max-new-tokens N", "tokens to generate at most", default=128, type=whole_number(1))
    add_sampling_options(parser)
    add_grammar_options(parser)
    text = (
        'read jobs, JSON lines {"ids": [...], "max_new_tokens": n, "sampling": {...}}, from FILE or "-", and print the '
        "new ids of each as a JSON line"
    )
    add_option(parser, "--jobs FILE", text, type=Path)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with killed_by_sigint():
        import torch
        from tokenizers import Tokenizer

        from cloud_verifier.model.converted_checkpoints import resolve_checkpoint
        from cloud_verifier.model.pretrained import usable_context
        from cloud_verifier.model.reference import generate_reference
        from cloud_verifier.model.target import load_model

    if options.threads:
        torch.set_num_threads(options.threads)
    model, base, end_ids = load_model(
        resolve_checkpoint(options.target), options.device, options.dtype, options.quantize or ""
    )
    config = model.config.get_text_config(decoder=True)
    context = usable_context(config, options.max_context, options.target)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))

    def generate(job: GenerationJob) -> list[int]:
        _check(job, config.vocab_size, context)
        room = min(job.max_new_tokens, context - len(job.ids))
        return generate_reference(model, job.ids, job.sampling, room, end_ids, tokenizer=tokenizer)

    if options.jobs:
        for job in _read_jobs(options.jobs):
            print(json.dumps(generate(job)), flush=True)
        return 0
    sampling = read_sampling(options, grammar=read_grammar(options))
    for prompt in options.prompt or [read_standard_input()]:
        new_ids = generate(GenerationJob(tokenizer.encode(check_text(prompt)).ids, options.max_new_tokens, sampling))
        print(prompt + tokenizer.decode(new_ids))
    return 0


def _read_jobs(path: Path) -> Iterator[GenerationJob]:
    try:
        lines = sys.stdin.buffer if str(path) == "-" else path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    while line := lines.readline(MAX_PROMPT_BYTES):
        try:
            job = msgspec.json.decode(line, type=GenerationJob)
        except msgspec.MsgspecError as error:
            shown = line.strip()[:80].decode(errors="replace")
            raise InputError(f"not a job: {shown} ({error})") from None
        yield job


def _check(job: GenerationJob, vocabulary_size: int, context: int) -> None:
    """Raise InputError for what a verifier would refuse."""
    validate_prompt(job.ids, vocabulary_size)
    if len(job.ids) >= context:
        raise InputError(f"the prompt has {len(job.ids)} tokens, and the longest text {context}; shorten it")
    for name, ids in (("logit_bias", job.sampling.logit_bias), ("stop_ids", job.sampling.stop_ids)):
        if max(ids, default=0) >= vocabulary_size:
            raise InputError(f"{name}: token id {max(ids)} is outside the vocabulary of {vocabulary_size}")
