"""Text that a target wrote itself: what its draft will meet at work, and no corpus holds."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from export.common.progress import Progress
from export.data.token_stream import Ids
from export.data.tokenizer import END_OF_TEXT_ID, PADDING_ID
from export.draft.base_target import Text


@dataclass(frozen=True)
class SamplePlan:
    """How much to sample: `batches` of `rows` texts of `length` tokens, the first `prompt` of them from a corpus."""

    batches: int
    rows: int
    prompt: int
    length: int
    seed: int = 0


def sample(
    target: PreTrainedModel,
    prompts: Text,
    plan: SamplePlan,
    *,
    end_id: int = END_OF_TEXT_ID,
    padding_id: int = PADDING_ID,
) -> Ids:
    """Samples at temperature 1 and returns one stream, an end-of-text id after each sample; shape (tokens,)."""
    # In the type that serves: the samples are then what a verifier would have said.
    model = copy.deepcopy(target)
    if target.device.type == "cuda":
        model.to(torch.bfloat16)
    # Fresh settings, for the saved ones stop at the end of a text: here the next text may follow, as in training.
    # transformers keeps only the 50 likeliest tokens unless told otherwise.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    model.generation_config.pad_token_id = padding_id
    kind = np.uint16 if target.config.vocab_size <= 1 << 16 else np.uint32
    torch.manual_seed(plan.seed)
    pieces = []
    with Progress("samples", plan.batches) as progress, torch.inference_mode():
        for batch in range(plan.batches):
            ids = prompts.windows(plan.rows, plan.prompt, np.random.default_rng([plan.seed, batch]))
            texts = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=plan.length - plan.prompt)
            ends = torch.full_like(texts[:, :1], end_id)
            pieces.append(torch.cat([texts, ends], dim=1).flatten().cpu().numpy().astype(kind))
            progress.update(batch + 1, f"{sum(map(len, pieces))} tokens")
    return np.concatenate(pieces)
