"""Records acceptance traces for the simulator: a real draft along texts that a real target generates.

Prompts are pieces of files on which no member of the example family was trained, Python and C++ in turn, or pieces of a
given text. `edge_runtime.simulation` replays the traces.
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
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import load_model
from edge_runtime.draft import OnnxDraft
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.simulation import CONTINUATION_TOKENS, MAX_SIBLINGS, RecordedText, write_texts
from export.common.progress import Progress
from export.data.held_out import encode_documents, load_held_out
from export.evaluate.traces import rank_of


@dataclass(frozen=True)
class RecordingConfig:
    """What to record: every target at every temperature on every prompt.

    Attributes:
        bundle: directory of the draft.
        targets: directories of the targets.
        prompts: number of prompts.
        tokens: length of each text.
        shortest, longest: length of a prompt in tokens.
        seed: seed of the choice of prompts; text i is sampled with seed + i.
        text: file that prompts are cut from; None for the example family's held-out files.
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
    text: Path | None = None
    threads: int = 1


def record_acceptance(config: RecordingConfig, output: Path) -> list[RecordedText]:
    """Record into the file `output` and return the texts.

    Raises:
        InputError: the text is too short for prompts.
        BundleError, DraftError, TargetError: draft or target do not load.
    """
    torch.set_num_threads(config.threads)
    draft = OnnxDraft.load(config.bundle, threads=config.threads)
    prompts = list(_choose_prompts(draft.tokenizer, config))
    texts: list[RecordedText] = []
    total = len(config.targets) * len(config.temperatures) * len(prompts)
    with Progress("texts", total) as progress:
        for path in config.targets:
            model, _, end_ids = load_model(path, "cpu", torch.float32)
            for temperature in config.temperatures:
                for index, prompt in enumerate(prompts):
                    sampling = Sampling(
                        temperature=temperature,
                        top_p=config.top_p if temperature else 1.0,
                        seed=config.seed + index,
                        ignore_eos=True,
                    )
                    new = generate_reference(model, prompt, sampling, config.tokens, end_ids)
                    texts.append(record_text(draft, path.name, prompt, new, sampling))
                    progress.update(len(texts), f"{path.name} T={temperature:g} {texts[-1].acceptance:.0%} accepted")
    made: dict[str, Any] = {
        "draft": draft.manifest.shared.identity,
        "draft_graph": {name: record.sha256[:16] for name, record in sorted(draft.manifest.files.items())},
        "prompts": "held-out files of export/data/corpus.py" if config.text is None else config.text.name,
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


def _choose_prompts(tokenizer: Tokenizer, config: RecordingConfig) -> Iterator[list[int]]:
    """Choose `config.prompts` prompts, from the texts in turn."""
    rng = random.Random(config.seed)
    texts = load_held_out([config.text] if config.text is not None else [])
    pools = [
        [ids for ids in encode_documents(tokenizer, documents) if len(ids) > config.shortest]
        for documents in texts.values()
    ]
    if not all(pools):
        raise InputError(f"not enough text for prompts of {config.shortest} tokens: give a longer --text")
    for index in range(config.prompts):
        ids = rng.choice(pools[index % len(pools)])
        length = rng.randint(config.shortest, min(config.longest, len(ids) - 1))
        start = rng.randrange(len(ids) - length)
        yield ids[start : start + length]
