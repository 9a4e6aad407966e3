"""Every architecture through the engine: the text equals that of transformers' `generate`, whatever is drafted.

`python -m tests.cloud_verifier.model.test_conformance` prints the table of the README, which these tests prove; with
`--device cuda` it proves the same on a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.model.general_tier import GeneralRunner
from cloud_verifier.model.pretrained import load_pretrained
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target
from edge_runtime.protocol.messages import PROTOCOL_VERSION, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.engine.recording_target import running_scheduler, submit_opening
from tests.cloud_verifier.model.architectures import ARCHITECTURES, CHUNK, CONTEXT, WINDOW, save_architecture
from tests.models import VOCABULARY_SIZE

README = Path("cloud_verifier/README.md")
FAST, GENERAL = "fast", "general"
# Tokens generated for each prompt, and how many more of the reference a round's draft and its tokens may reach into.
NEW_TOKENS, MARGIN = 8, 9
# Shorter and longer than windows and chunks, and longer than a chunk of the fast tier's prefill. Not 1: RecurrentGemma
# in transformers cannot generate from one token. Each with one of the samplings in turn.
PROMPT_LENGTHS = (2, CHUNK - 2, WINDOW + 5, 150)
SAMPLINGS = (
    Sampling(ignore_eos=True),
    Sampling(0.8, seed=3, ignore_eos=True),
    Sampling(1.0, top_p=0.9, seed=4, ignore_eos=True, repetition_penalty=1.2, frequency_penalty=0.4),
)
# transformers 5 reads more models in one forward.
TABLE_VERSION = 4


class TargetText(NamedTuple):
    """A prompt and how `generate` continues it."""

    prompt: list[int]
    sampling: Sampling
    continuation: list[int]


class ProvenArchitecture(NamedTuple):
    """A row of the table."""

    tier: str
    notes: str


def notes_of(target: Target) -> str:
    if not isinstance(target.runner, GeneralRunner):
        return "batched"
    return "a draft in one forward" if target.runner.chunk_limit else "a draft token by token"


def texts_of(model: Any) -> list[TargetText]:
    texts = []
    for index, length in enumerate(PROMPT_LENGTHS):
        prompt = [(37 * index + 11 * i * i + 7 * i + 3) % VOCABULARY_SIZE for i in range(length)]
        sampling = SAMPLINGS[index % len(SAMPLINGS)]
        continuation = generate_reference(model, prompt, sampling, NEW_TOKENS + MARGIN, frozenset())
        texts.append(TargetText(prompt, sampling, continuation))
    return texts


async def assert_text_equal(scheduler: Scheduler, target: Target, text: TargetText, seed: int) -> None:
    """Decode `text` in rounds whose drafts are partly right, with siblings, and compare every token."""
    random = Random(seed)
    generated: list[int] = []
    session = None
    while len(generated) < NEW_TOKENS:
        draft = text.continuation[len(generated) :][: random.choice([0, 2, 5])]
        siblings: dict[int, list[int]] = {}
        if draft and random.random() < 0.8:
            wrong = random.randrange(len(draft))
            right = draft[wrong]
            draft[wrong] = (right + 1) % VOCABULARY_SIZE
            if random.random() < 0.5:
                siblings = {wrong: [(right + 2) % VOCABULARY_SIZE, right]}
        contents: dict[str, Any] = {"draft": draft, "siblings": siblings, "n": random.choice([1, 1, 3])}
        if session is None:
            session, reply = submit_opening(scheduler, target, text.prompt, text.sampling, **contents)
        else:
            position = len(text.prompt) + len(generated)
            request = RoundRequest(PROTOCOL_VERSION, reply.request.round + 1, position, **contents)
            reply = session.begin_round(request)
            scheduler.submit(session, reply)
        frame = await reply.result()
        generated += draft[: frame.accepted] + frame.tokens
        assert generated == text.continuation[: len(generated)], f"prompt of {len(text.prompt)}, {text.sampling}"
    assert session is not None
    scheduler.release(session)


async def prove(path: Path, device: str = "cpu") -> ProvenArchitecture:
    """Compare the texts of the checkpoint at `path`, alone and in company, with those of `generate`."""
    target = Target(path, device=device, dtype=torch.float32)
    texts = texts_of(load_pretrained(path, device, torch.float32))
    async with running_scheduler(target, window=0.0, cache_tokens=1 << 14) as scheduler:
        await assert_text_equal(scheduler, target, texts[-1], seed=0)
        await asyncio.gather(*(assert_text_equal(scheduler, target, text, i) for i, text in enumerate(texts)))
    assert target.context == CONTEXT or not hasattr(target.runner.model.config, "max_position_embeddings")
    return ProvenArchitecture(GENERAL if target.general_tier_reason else FAST, notes_of(target))


def render_table(proven: dict[str, ProvenArchitecture]) -> list[str]:
    """The lines of the table: one for all architectures of equal tier and notes."""
    groups: dict[ProvenArchitecture, list[str]] = defaultdict(list)
    for name, row in proven.items():
        groups[row].append(name)
    rows = [f"| {', '.join(sorted(groups[row]))} | {row.tier} | {row.notes} |" for row in sorted(groups)]
    return ["| architecture | tier | notes |", "|---|---|---|", *rows]


def read_table(lines: Iterable[str]) -> dict[str, ProvenArchitecture]:
    """The architectures of the table in the README."""
    proven: dict[str, ProvenArchitecture] = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|\n ").split("|")]
        if line.startswith("|") and len(cells) == 3 and cells[1] in (FAST, GENERAL):
            proven |= {name.strip(): ProvenArchitecture(cells[1], cells[2]) for name in cells[0].split(",")}
    return proven


@functools.cache
def readme_table() -> dict[str, ProvenArchitecture]:
    return read_table(README.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
async def test_the_text_is_that_of_generate(model_type: str, tmp_path: Path) -> None:
    proven = await prove(save_architecture(tmp_path / "model", model_type))
    if int(transformers.__version__.partition(".")[0]) == TABLE_VERSION:
        assert readme_table()[model_type] == proven


def test_the_table_of_the_readme_has_the_proven_architectures() -> None:
    table = readme_table()
    assert sorted(table) == ARCHITECTURES
    assert len(table) >= 40
    assert "\n".join(render_table(table)) in README.read_text()


def main() -> None:
    """Print the table, and on another device than the CPU also what fails there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, metavar="ARCHITECTURE")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable()
    torch.set_num_threads(1)
    proven, failed = {}, False
    for name in options.architectures:
        with tempfile.TemporaryDirectory() as directory:
            try:
                path = save_architecture(Path(directory) / "model", name)
                proven[name] = asyncio.run(prove(path, options.device))
            except Exception as error:
                failed = True
                print(f"{name}: {error!r}", file=sys.stderr)
    print(*render_table(proven), sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
