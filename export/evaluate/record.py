"""Records acceptance traces for the simulator: a real draft along texts that a real target generates.

Prompts are chats and pieces of source code in turn (`export.evaluate.prompts`), or those of given files. A text ends
where the target ends it. `edge_runtime.simulation` replays the traces.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from cloud_verifier.acceptance.measure import TEMPERATURES, Passage, propose_tokens
from cloud_verifier.model.target import load_model
from cloud_verifier.registry.checkpoint import base_directory
from edge_runtime.draft import OnnxDraft
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.simulation import CONTINUATION_TOKENS, MAX_SIBLINGS, RecordedText, write_texts
from export.common.progress import Progress
from export.evaluate.prompts import load_prompts
from export.evaluate.proposers import TargetWriter
from export.evaluate.traces import rank_of


@dataclass(frozen=True)
class RecordingConfig:
    """What to record: every target at every temperature on every prompt.

    Attributes:
        bundle: directory of the draft.
        tokens: length of each text.
        shortest, longest: length of a prompt in tokens.
        seed: seed of the choice of prompts; text i is sampled with seed + i.
        texts, chats: files of prompts; see `export.evaluate.prompts`.
        threads: CPU threads of draft and target.
    """

    bundle: Path
    targets: tuple[Path, ...]
    temperatures: tuple[float, ...] = TEMPERATURES
    top_p: float = 1.0
    prompts: int = 24
    tokens: int = 128
    shortest: int = 24
    longest: int = 160
    seed: int = 0
    texts: tuple[Path, ...] = ()
    chats: tuple[Path, ...] = ()
    threads: int = 1


def record_acceptance(config: RecordingConfig, output: Path) -> list[RecordedText]:
    """Record into the file `output` and return the texts.

    Raises:
        InputError: the text is too short for prompts.
        BundleError, DraftError, TargetError: draft or target do not load.
    """
    torch.set_num_threads(config.threads)
    draft = OnnxDraft.load(config.bundle, threads=config.threads)
    prompts = list(_choose_prompts(draft.tokenizer, base_directory(config.targets[0]), config))
    texts: list[RecordedText] = []
    total = len(config.targets) * len(config.temperatures) * len(prompts)
    with Progress("texts", total) as progress:
        for path in config.targets:
            target = TargetWriter(load_model(path, "cpu", torch.float32)[0])
            for temperature in config.temperatures:
                top_p = config.top_p if temperature else 1.0
                samplings = [
                    Sampling(temperature=temperature, top_p=top_p, seed=config.seed + index)
                    for index in range(len(prompts))
                ]
                written = target.generate(prompts, samplings, config.tokens)
                for prompt, new, sampling in zip(prompts, written, samplings, strict=True):
                    texts.append(record_text(draft, path.name, prompt, new, sampling))
                    progress.update(len(texts), f"{path.name} T={temperature:g} {texts[-1].acceptance:.0%} accepted")
    made: dict[str, Any] = {
        "draft": draft.manifest.shared.identity,
        "draft_graph": {name: record.sha256[:16] for name, record in sorted(draft.manifest.files.items())},
        "prompts": [path.name for path in (*config.texts, *config.chats)] or "held-out chats and code",
        "seed": config.seed,
        "torch": torch.__version__,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_texts(output, texts, made)
    return texts


def record_text(draft: OnnxDraft, target: str, prompt: list[int], new: list[int], sampling: Sampling) -> RecordedText:
    """Record what `draft` proposes at every position of `new`, given all true ids before it.

    Args:
        target: the target's name.
        new: the target's continuation of `prompt` with `sampling`.
    """
    context = draft.new_context()
    text = prompt + new
    confidences: list[float] = []
    ranks: list[int] = []
    continuations: list[list[float]] = []
    proposals = propose_tokens(context, Passage(text, len(prompt), sampling), siblings=MAX_SIBLINGS)
    for index, proposal in enumerate(proposals):
        confidences.append(proposal.confidences[0])
        ranks.append(rank_of(new[index], proposal.tokens + proposal.siblings.get(0, [])))
        continuation: list[float] = []
        if ranks[-1]:
            prefix = text[: len(prompt) + index] + proposal.tokens
            continuation = context.propose(prefix, CONTINUATION_TOKENS, sampling).confidences
            # At the end of the draft's context it is shorter: repeat the last confidence.
            continuation += continuation[-1:] * (CONTINUATION_TOKENS - len(continuation))
        continuations.append(continuation)
    return RecordedText(
        target=target,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        prompt=len(prompt),
        confidences=confidences,
        ranks=ranks,
        continuations=continuations,
    )


def _choose_prompts(tokenizer: Tokenizer, base: Path, config: RecordingConfig) -> Iterator[list[int]]:
    """Choose `config.prompts` prompts, from the texts in turn; chats and code have equal shares if there are both."""
    rng = random.Random(config.seed)
    texts = load_prompts(tokenizer, base, config.texts, config.chats)
    for name, prompts in texts.items():
        if not prompts:
            raise InputError(f"there is nothing in {name}: give a longer --text, or more chats")
    chats = [prompt for prompts in texts.values() for prompt in prompts if isinstance(prompt, list)]
    pools = [ids for ids in texts.values() if not isinstance(ids[0], list)]
    if not all(len(ids) > config.longest for ids in pools):
        raise InputError(f"not enough text for prompts of {config.longest} tokens: give a longer --text")
    rng.shuffle(chats)
    for index in range(config.prompts):
        if chats and (index % 2 == 0 or not pools):
            yield chats[index // (1 + bool(pools)) % len(chats)]
            continue
        ids = pools[index // (1 + bool(chats)) % len(pools)]
        length = rng.randint(config.shortest, config.longest)
        start = rng.randrange(len(ids) - length)
        yield ids[start : start + length]
