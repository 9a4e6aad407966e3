"""The base target of the toy family: a small Llama that is trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from export.draft.base_target import TextSource, next_token_loss, to_device
from export.draft.training import TrainingSchedule, fit
from tests.toy_family.tokenizer import END_OF_TEXT_ID, PADDING_ID


@dataclass(frozen=True)
class TargetShape:
    """Dimensions of a Llama target; `context` is in tokens."""

    vocabulary: int
    hidden: int
    blocks: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int

    def config(self) -> LlamaConfig:
        """Return the Hugging Face configuration; embedding and head are tied."""
        return LlamaConfig(  # type: ignore[no-untyped-call]  # transformers annotates no constructor
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.blocks,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=END_OF_TEXT_ID,
            eos_token_id=END_OF_TEXT_ID,
            pad_token_id=PADDING_ID,
        )


def pretrain(
    shape: TargetShape,
    text: TextSource,
    schedule: TrainingSchedule,
    device: torch.device,
    *,
    compiled: bool,
) -> PreTrainedModel:
    """Train a new target on `text`; return it in float32 on `device`."""
    torch.manual_seed(schedule.seed)
    model = to_device(LlamaForCausalLM(shape.config()), device)  # type: ignore[no-untyped-call]  # as above
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # as above
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=PADDING_ID
    )
    fit(model, next_token_loss(model, text, compiled=compiled), schedule, label="target v1")
    return model
