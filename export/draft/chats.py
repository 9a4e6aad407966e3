"""Self-written chats: training text for the draft of a chat model, written by its target alone.

The target writes the user's turns too: its chat template is rendered up to the start of a user's message, and the model
writes on. No data set is needed, and the text is of the distribution that the draft meets in service. A draft trained
on other text instead (documentation) accepted .20 of positions of chat answers, on self-written chats .68 (T=0).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import AttentionInterface, AutoTokenizer, GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cloud_verifier.model.pretrained import generation_end_ids
from edge_runtime.protocol.errors import InputError
from export.common.progress import Progress
from export.data.token_stream import TokenIds

# Temperatures of the answers, in turn by chat, so that the draft learns from text of every setting in use. Half of them
# are 1, the hardest to match; the user's turns always are.
ANSWER_TEMPERATURES = (0.0, 1.0, 0.7, 1.0, 0.7, 1.0)
# How everyday questions begin. Half of the chats start with one, because a model left to itself favors the kinds of
# its training data (rewriting a long text, for example).
OPENINGS = (
    *("What is", "What are", "What's the best way to", "What does", "How do I", "How does", "How can I", "How many"),
    *("Why do", "Why is", "When did", "Where can I", "Which", "Who was", "Can you explain", "Can you help me", "Could"),
    *("Explain", "Write a", "Write a short", "Give me", "Tell me about", "Describe", "List", "Summarize", "Translate"),
    *(
        "I need",
        "I want to",
        "I have",
        "My",
        "Is it",
        "Should I",
        "Help me",
        "Compare",
        "Suggest",
        "Create a",
        "Hi",
        "Name",
    ),
)
OPENED_SHARE = 0.5
MAX_USER_TOKENS = 96
# Longest prompt that `write_questions` leads to, in tokens.
MAX_QUESTION_TOKENS = 224
# Stands for the user's text in a rendered template, to find what precedes it.
PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"
# Chosen: more rows than this gain nothing on one GPU (a step of 4096 rows takes 1.5 times one of 1024).
MAX_ROWS = 4096
# Share of free GPU memory that the KV cache of a batch may take; the rest is logits and copies.
CACHE_MEMORY_SHARE = 0.5
CPU_ROWS = 32


def attend_in_groups(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend from one new token per row, with the query heads that share keys as several queries of one head.

    transformers' own function copies keys and values for each query head if there is a mask, which takes most of the
    time of large batches: a step of 4096 rows takes 3 times as long.

    Args:
        query: (rows, query heads, tokens, head size).
        key, value: (rows, key heads, context, head size).
        attention_mask: broadcast to (rows, 1, tokens, context).
    """
    rows, query_heads, tokens, head_size = query.shape
    if tokens > 1:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return attended
    groups = key.shape[1]
    grouped = functional.scaled_dot_product_attention(
        query.reshape(rows, groups, query_heads // groups, head_size),
        key,
        value,
        attn_mask=attention_mask,
        scale=options.get("scaling"),
    )
    return grouped.reshape(rows, 1, query_heads, head_size), None


GROUPED = "flexspec-groups"
AttentionInterface.register(GROUPED, attend_in_groups)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


class RowTemperatures(LogitsProcessor):
    """Scales the logits of each row by a temperature of its own; at temperature 0 only the largest stays possible."""

    def __init__(self, temperatures: Sequence[float], device: torch.device) -> None:
        column = torch.tensor(temperatures, device=device)[:, None]
        self._is_greedy, self._temperatures = column == 0, column.where(column > 0, 1.0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits, (rows, vocabulary), to sample from at temperature 1."""
        below_largest = scores < scores.max(-1, keepdim=True).values
        return (scores / self._temperatures).masked_fill(self._is_greedy & below_largest, -torch.inf)


@contextlib.contextmanager
def _grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that attends with PyTorch's function use `attend_in_groups` for a while."""
    config: Any = model.config
    previous = config._attn_implementation
    if previous == "sdpa":
        config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = previous


@dataclass(frozen=True)
class ChatConfig:
    """What to write.

    Attributes:
        count: number of chats.
        length: longest chat in tokens, template included.
        temperatures: of the answers, in turn by chat.
        second_turns: share of the batches whose chats have a second question and answer.
        seed: seed of all choices.
    """

    count: int
    length: int = 448
    temperatures: tuple[float, ...] = ANSWER_TEMPERATURES
    second_turns: float = 0.4
    seed: int = 0


@dataclass(frozen=True)
class Chats:
    """Chats as token ids. The last answer of chat i is the tokens from `starts[i]` on.

    Attributes:
        ids: tokens of all chats, one after the other, shape (tokens,).
        lengths, starts: tokens of each chat, and its first token of the last answer, shape (chats,).
    """

    ids: TokenIds
    lengths: npt.NDArray[np.uint32]
    starts: npt.NDArray[np.uint32]

    def rows(self) -> list[tuple[list[int], int]]:
        """Return (ids, first token of the last answer) of each chat."""
        ends = np.cumsum(self.lengths)
        return [
            (self.ids[end - length : end].tolist(), int(start))
            for end, length, start in zip(ends, self.lengths, self.starts, strict=True)
        ]

    def save(self, path: Path) -> None:
        """Write the chats to a compressed `.npz` file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, ids=self.ids, lengths=self.lengths, starts=self.starts)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Chats:
        """Read what `save` wrote. Raises InputError if the file is damaged."""
        try:
            with np.load(path) as file:
                return cls(file["ids"], file["lengths"], file["starts"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} does not hold chats ({error}): remove it and run the command again") from None

    @classmethod
    def join(cls, parts: Sequence[Chats]) -> Chats:
        """Concatenate several."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "lengths", "starts")))


class ChatWriter:
    """A target with its tokenizer and chat template.

    Args:
        target: a transformers causal language model, in eval mode; a GPU should hold it in bfloat16.
        directory: where its tokenizer is.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    def __init__(self, target: PreTrainedModel, directory: Path) -> None:
        self._target = target
        self._tokenizer: Any = AutoTokenizer.from_pretrained(  # type: ignore[no-untyped-call]  # transformers annotates few methods
            directory, local_files_only=True
        )
        if not self._tokenizer.chat_template:
            raise InputError(f"{directory} has no chat template, so that it cannot write chats: give text with --text")
        own_ends = generation_end_ids(target.generation_config)
        # A user's turn ends with any special token: templates differ in which.
        self._special_ids = sorted({*own_ends, *self._tokenizer.all_special_ids})
        self._end_ids = own_ends or self._special_ids
        self._vocabulary_size = int(target.config.vocab_size)

    def write(self, config: ChatConfig, directory: Path | None = None, *, backwards: bool = False) -> Chats:
        """Write chats in large batches.

        Args:
            directory: where each batch is saved, to resume from after an interruption; None saves nothing.
            backwards: start with the last batch, so that another process that shares `directory` meets this one.
        """
        rows = min(config.count, self._rows_at_once(config.length))
        batches = -(-config.count // rows)
        written: dict[int, Chats] = {}
        label = "-".join(f"{temperature:g}" for temperature in dict.fromkeys(config.temperatures))
        with Progress("chats", config.count) as progress:
            for batch in reversed(range(batches)) if backwards else range(batches):
                count = min(rows, config.count - batch * rows)
                temperatures = [
                    config.temperatures[number % len(config.temperatures)]
                    for number in range(batch * rows, batch * rows + count)
                ]
                name = f"seed{config.seed}-{batch:04d}-{count}x{config.length}-T{label}.npz"
                path = directory and directory / name
                if path and path.is_file():
                    written[batch] = Chats.load(path)
                else:
                    # Spread over the batches: batch b has a second turn when the running share passes a whole number.
                    second = int((batch + 1) * config.second_turns) > int(batch * config.second_turns)
                    random = np.random.default_rng([config.seed, batch])
                    torch.manual_seed(int(random.integers(1 << 31)))
                    written[batch] = self._write_batch(temperatures, 1 + second, config.length, random)
                    if path:
                        written[batch].save(path)
                tokens = sum(len(part.ids) for part in written.values())
                progress.update(sum(len(part.lengths) for part in written.values()), f"{tokens} tokens")
        return Chats.join([written[batch] for batch in range(batches)])

    def _write_batch(
        self, temperatures: Sequence[float], turns: int, length: int, random: np.random.Generator
    ) -> Chats:
        """Write a chat for each of the temperatures, which is that of its answers."""
        messages: list[list[dict[str, str]]] = [[] for _ in temperatures]
        prompts: list[list[int]] = []
        answers: list[list[int]] = []
        for turn in range(turns):
            self._write_user_turns(messages, length // 2 if turn == 0 else length * 3 // 4, random)
            prompts = [self.encode_prompt(chat) for chat in messages]
            share = length if turn == turns - 1 else length * 5 // 8
            room = max(16, share - max(map(len, prompts)))
            answers = self._generate(prompts, temperatures, room, self._end_ids)
            for chat, answer in zip(messages, answers, strict=True):
                chat.append(
                    {"role": "assistant", "content": self._tokenizer.decode(answer, skip_special_tokens=True).strip()}
                )
        return Chats(
            np.concatenate([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]).astype(
                np.uint32
            ),
            np.array([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], dtype=np.uint32),
            np.array([len(prompt) for prompt in prompts], dtype=np.uint32),
        )

    def write_questions(self, count: int, seed: int) -> list[list[dict[str, str]]]:
        """Write the first user's message of `count` chats, as messages."""
        random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        messages: list[list[dict[str, str]]] = [[] for _ in range(count)]
        self._write_user_turns(messages, MAX_QUESTION_TOKENS, random)
        return messages

    def encode_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the ids of a chat, up to where the model answers."""
        return self._encode(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _write_user_turns(
        self, messages: list[list[dict[str, str]]], longest: int, random: np.random.Generator
    ) -> None:
        """Append a user's message to every chat; a chat has then up to about `longest` tokens."""
        opened = [not chat and random.random() < OPENED_SHARE for chat in messages]
        openings = [str(random.choice(OPENINGS)) if own else "" for own in opened]
        prefixes = [
            self._encode(self._before_user_text(chat) + opening)
            for chat, opening in zip(messages, openings, strict=True)
        ]
        room = max(1, min(MAX_USER_TOKENS, longest - max(map(len, prefixes))))
        texts = self._generate(prefixes, [1.0] * len(prefixes), room, self._special_ids)
        for chat, opening, text in zip(messages, openings, texts, strict=True):
            spoken = self._tokenizer.decode(text, skip_special_tokens=True)
            chat.append({"role": "user", "content": (opening + spoken).strip() or "Hello"})

    def _before_user_text(self, messages: list[dict[str, str]]) -> str:
        """Return the rendered chat up to the first character of a further user's message."""
        rendered: str = self._tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": PLACEHOLDER}], tokenize=False, add_generation_prompt=False
        )
        before, found, _ = rendered.rpartition(PLACEHOLDER)
        if not found:
            raise InputError("the chat template drops the user's text, so that it cannot write chats: give --text")
        return before

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def _generate(
        self, prompts: list[list[int]], temperatures: Sequence[float], count: int, end_ids: list[int]
    ) -> list[list[int]]:
        """Sample up to `count` tokens after each prompt at its temperature; the first of `end_ids` is included."""
        width = max(map(len, prompts))
        padding = self._end_ids[0]
        ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampled = max(temperatures) > 0
        sampling = (
            {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
        )
        device = self._target.device
        generate: Any = self._target.generate
        with _grouped_attention(self._target):
            texts = generate(
                ids.to(device),
                attention_mask=mask.to(device),
                generation_config=GenerationConfig(  # type: ignore[no-untyped-call]  # transformers annotates no constructor
                    max_new_tokens=count,
                    bos_token_id=self._tokenizer.bos_token_id,
                    eos_token_id=end_ids,
                    pad_token_id=padding,
                    **sampling,
                ),
                logits_processor=[RowTemperatures(temperatures, device)] if sampled else None,
            )
        ends = set(end_ids)
        written = []
        for row in texts[:, width:].tolist():
            stop = next((index for index, token in enumerate(row) if token in ends), len(row) - 1)
            written.append(row[: stop + 1])
        return written

    def _rows_at_once(self, length: int) -> int:
        """Return how many chats fit into memory at once."""
        device = self._target.device
        if device.type != "cuda":
            return CPU_ROWS
        config = self._target.config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = (
            2 * config.num_hidden_layers * config.num_key_value_heads * head_size * self._target.dtype.itemsize
        )
        # Logits in float32, and the copies that sampling makes of them.
        row_bytes = length * token_bytes + 6 * 4 * self._vocabulary_size
        free = torch.cuda.mem_get_info(device)[0] * CACHE_MEMORY_SHARE
        return max(1, min(MAX_ROWS, int(free // row_bytes)))
