"""Records acceptance: plays a real draft along texts that a real target writes (see `edge_runtime.simulation`).

The prompts are pieces of files that no member of the example family was trained on, Python and C++ in turn; or pieces
of a given text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from cloud_verifier.model.reference import decode_alone
from cloud_verifier.model.target import load_model
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.simulation.recorded_texts import BEHIND, NONE, Text, write_texts
from export.common.progress import Progress
from export.data.held_out import encoded, held_out
from export.evaluate.proposers import Passage, propose_each


@dataclass(frozen=True)
class Recording:
    """What to record: every target with every temperature on every prompt.

    Attributes:
        bundle: directory of the draft.
        targets: directories of the targets.
        temperatures: of the sampling.
        prompts: how many.
        tokens: length of each text.
        shortest, longest: of a prompt, in tokens.
        seed: of the prompts' choice; text i is sampled with seed + i.
        text: what to take prompts from; None for the example family's held-out files.
        threads: of the draft and the target.
    """

    bundle: Path
    targets: tuple[Path, ...]
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    top_p: float = 1.0
    prompts: int = 24
    tokens: int = 128
    shortest: int = 24
    longest: int = 160
    seed: int = 0
    text: Path | None = None
    threads: int = 1


def record(order: Recording, output: Path) -> list[Text]:
    """Records `order` into the file `output` and returns the texts.

    Raises:
        InputError: no prompt is to be had.
        BundleError, DraftError, TargetError: draft or target do not load.
    """
    torch.set_num_threads(order.threads)
    draft = OnnxDraft.load(order.bundle, threads=order.threads)
    prompts = list(_prompts(draft.tokenizer, order))
    texts: list[Text] = []
    total = len(order.targets) * len(order.temperatures) * len(prompts)
    with Progress("texts", total) as progress:
        for path in order.targets:
            model, _, end_ids = load_model(path, "cpu", torch.float32)
            for temperature in order.temperatures:
                for index, prompt in enumerate(prompts):
                    sampling = Sampling(
                        temperature=temperature,
                        top_p=order.top_p if temperature else 1.0,
                        seed=order.seed + index,
                        ignore_eos=True,
                    )
                    new = decode_alone(model, prompt, sampling, order.tokens, end_ids)
                    texts.append(follow(draft, path.name, prompt, new, sampling))
                    progress.update(len(texts), f"{path.name} T={temperature:g} {texts[-1].acceptance:.0%} accepted")
    made: dict[str, Any] = {
        "draft": draft.manifest.shared.identity,
        "draft_graph": {name: record.sha256[:16] for name, record in sorted(draft.manifest.files.items())},
        "prompts": "held-out files of export/data/corpus.py" if order.text is None else order.text.name,
        "seed": order.seed,
        "torch": torch.__version__,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_texts(output, texts, made)
    return texts


def follow(draft: OnnxDraft, target: str, prompt: list[int], new: list[int], sampling: Sampling) -> Text:
    """What `draft` guesses at every position of `new`, given all true ids before it."""
    context = draft.context()
    text = prompt + new
    confidences: list[float] = []
    ranks: list[int] = []
    behind: list[list[float]] = []
    for index, proposal in enumerate(propose_each(context, Passage(text, len(prompt), sampling))):
        candidates = proposal.tokens + proposal.siblings.get(0, [])
        confidences.append(proposal.confidences[0])
        ranks.append(candidates.index(new[index]) if new[index] in candidates else NONE)
        row: list[float] = []
        if ranks[-1]:
            row = context.propose(text[: len(prompt) + index] + proposal.tokens, BEHIND, sampling).confidences
            # At the very end of the draft's context there is less to see.
            row += row[-1:] * (BEHIND - len(row))
        behind.append(row)
    return Text(target, sampling.temperature, sampling.top_p, sampling.seed, len(prompt), confidences, ranks, behind)


def _prompts(tokenizer: Tokenizer, order: Recording) -> Iterator[list[int]]:
    """`order.prompts` prompts, the domains in turn."""
    chance = random.Random(order.seed)
    texts = held_out([order.text] if order.text is not None else [])
    pools = [[ids for ids in encoded(tokenizer, some) if len(ids) > order.shortest] for some in texts.values()]
    if not all(pools):
        raise InputError(f"not enough text for prompts of {order.shortest} tokens: give a longer --text")
    for index in range(order.prompts):
        ids = chance.choice(pools[index % len(pools)])
        length = chance.randint(order.shortest, min(order.longest, len(ids) - 1))
        start = chance.randrange(len(ids) - length)
        yield ids[start : start + length]
