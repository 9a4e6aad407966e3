"""Samples training text from a target: the distribution that its draft meets in service, which no corpus has."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from export.common.progress import Progress
from export.data.token_stream import TokenIds
from export.draft.base_target import TextSource, to_device


@dataclass(frozen=True)
class SampleConfig:
    """Sample `batches` of `rows` texts of `length` tokens, whose first `prompt` tokens come from a corpus."""

    batches: int
    rows: int
    prompt: int
    length: int
    seed: int = 0


def sample_texts(
    target: PreTrainedModel,
    prompts: TextSource,
    config: SampleConfig,
    *,
    end_id: int,
    padding_id: int,
) -> TokenIds:
    """Sample at temperature 1; return one stream, shape (tokens,), with `end_id` after each sample."""
    # bfloat16 on a GPU, as in a verifier, so that the samples have the same distribution.
    model = copy.deepcopy(target)
    if target.device.type == "cuda":
        to_device(model, torch.bfloat16)
    # The saved configuration stops at the end of a text; here the next text may follow, as in the training data.
    # top_k=0 because transformers keeps only the 50 most likely tokens by default.
    generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers annotates no constructor
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=padding_id
    )
    model.generation_config = generation_config
    generate: Any = model.generate
    dtype = np.uint16 if target.config.vocab_size <= 1 << 16 else np.uint32
    torch.manual_seed(config.seed)
    samples = []
    with Progress("samples", config.batches) as progress, torch.inference_mode():
        for batch in range(config.batches):
            ids = prompts.random_windows(config.rows, config.prompt, np.random.default_rng([config.seed, batch]))
            texts = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=config.length - config.prompt)
            ends = torch.full_like(texts[:, :1], end_id)
            samples.append(torch.cat([texts, ends], dim=1).flatten().cpu().numpy().astype(dtype))
            progress.update(batch + 1, f"{sum(map(len, samples))} tokens")
    return np.concatenate(samples)
