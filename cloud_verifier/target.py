"""One target model: a Hugging Face directory, loaded by transformers, that scores a token tree in one forward."""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from cloud_verifier.changes import CHANGES, put_changes
from cloud_verifier.checkpoint import (
    base_of,
    check_whole,
    config_of,
    shared_fingerprints,
    tokenizer_of,
    version_hash,
    vocabulary_of,
)
from cloud_verifier.tree import Tree
from edge_runtime.contract.bundle import shared_identity
from edge_runtime.contract.coupling import Chooser
from edge_runtime.contract.errors import TargetError
from edge_runtime.contract.rollback import forgetless_layers, sliding_window

log = logging.getLogger(__name__)

# Forwards are padded to one of these widths, so that few shapes occur. Rounds use the first that holds their tree.
TREE_WIDTHS = (1, 8, 24, 72)
PREFILL_WIDTH = 256

# transformers loads one model at a time: what it switches while it does, it switches for all threads.
_LOADING = threading.Lock()

# Largest difference of a logit, relative to the largest, that the self-test takes for rounding.
SELF_TEST_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class Target:
    """A loaded target.

    Attributes:
        name: the directory's name.
        version: `name@hash`, the hash covering every file that can change an answer.
        vocabulary: hash of the tokenizer's vocabulary, comparable with a bundle's.
        vocabulary_size: number of logits.
        end_ids: tokens that end a text.
        context: longest text in tokens.
    """

    def __init__(self, path: Path, *, device: str, dtype: torch.dtype, context: int | None = None) -> None:
        """Loads the checkpoint or PEFT adapter at `path`.

        Args:
            device: a torch device.
            dtype: type to compute in.
            context: longest text to serve; None for what the model was trained for.

        Raises:
            TargetError: not a loadable checkpoint, or its cache cannot roll back.
        """
        path = path.resolve()
        base = base_of(path)
        config = config_of(base)
        check_whole(base)
        self._path, self._base = path, base
        self.name = path.name
        self.version = f"{path.name}@{version_hash(path, base)}"
        self.context = _usable_context(config, context, path)
        self.vocabulary_size = config.vocab_size
        self.vocabulary = vocabulary_of(tokenizer_of(path, base))
        self.dtype, self.device = dtype, torch.device(device)
        self._layers = config.num_hidden_layers
        self._model, _, self.end_ids = load_model(path, device, dtype)
        self.chooser = Chooser(self.vocabulary_size)
        try:
            self._self_test()
        except TargetError:
            raise
        except Exception as error:
            raise TargetError(f"{path}: this architecture does not run with our cache and masks: {error!r}") from None

    def identity_like(self, identity: str) -> str:
        """What a draft of the same layout as `identity` presents if it fits; empty if there is no such layout here."""
        layout, _, rest = identity.partition("/")
        blocks = rest.partition("/")[0]
        # Checked before anything is read: whoever asks chooses these words.
        known = (
            layout in ("anchor", "prefix", "standalone") and blocks.isascii() and blocks.isdigit() and len(blocks) < 4
        )
        return self.shared_identity(layout, int(blocks)) if known and int(blocks) <= self._layers else ""

    @functools.cache  # noqa: B019 - a process holds few targets, each for its whole life
    def shared_identity(self, layout: str, blocks: int) -> str:
        """What a draft that shares these of our tensors presents (see `SharedTensors.identity`)."""
        fingerprints = shared_fingerprints(self._path, self._base, layout, blocks, self._layers)
        return shared_identity(layout, blocks, fingerprints)

    def new_cache(self) -> DynamicCache:
        """Keys and values of an empty text."""
        return DynamicCache()

    @torch.inference_mode()
    def score(self, tree: Tree, cache: DynamicCache) -> torch.Tensor:
        """Logits behind every node of `tree`, given the text in `cache`.

        Returns (len(tree), V) float32 on the target's device. The cache then holds all nodes, padding included;
        `keep` decides which stay.
        """
        width = next(w for w in TREE_WIDTHS if w >= len(tree))
        visible = torch.from_numpy(tree.visibility(width)).to(self.device)
        return self._forward(tree.ids, tree.positions, visible, cache)[: len(tree)].float()

    def prefill(self, ids: list[int], cache: DynamicCache) -> Generator[None, None, None]:
        """Puts `ids` behind the text in `cache`, one piece of at most PREFILL_WIDTH tokens per step."""
        for start in range(0, len(ids), PREFILL_WIDTH):
            piece = ids[start : start + PREFILL_WIDTH]
            past = cache.get_seq_length()
            # Short pieces, such as the end of a prompt, take a tree's width rather than the whole one.
            width = next((w for w in TREE_WIDTHS if w >= len(piece)), PREFILL_WIDTH)
            visible = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
            with torch.inference_mode():  # as a decorator it would end at the generator's first yield
                self._forward(piece, list(range(past, past + len(piece))), visible, cache, rows=1)
            self.keep(cache, past, list(range(len(piece))))
            yield

    def keep(self, cache: DynamicCache, length: int, rows: list[int]) -> None:
        """Rolls back: of the entries behind the first `length`, keeps `rows`, in that order."""
        straight = rows == list(range(len(rows)))
        for layer in cache.layers:
            if straight:
                layer.keys = layer.keys[:, :, : length + len(rows)]
                layer.values = layer.values[:, :, : length + len(rows)]
            else:
                index = torch.tensor([*range(length), *(length + row for row in rows)], device=self.device)
                layer.keys = layer.keys.index_select(2, index)
                layer.values = layer.values.index_select(2, index)

    def _forward(
        self,
        ids: list[int],
        positions: list[int],
        visible: torch.Tensor,
        cache: DynamicCache,
        rows: int = 0,
    ) -> torch.Tensor:
        """Runs `ids`, padded to the width of `visible`, behind `cache`; logits of the last `rows` (0: all)."""
        width, past = visible.shape[0], cache.get_seq_length()
        padding = width - len(ids)
        mask = torch.zeros(width, past + width, dtype=self.dtype, device=self.device)
        mask[:, past:].masked_fill_(~visible, torch.finfo(self.dtype).min)
        output = self._model(
            input_ids=torch.tensor([ids + [0] * padding], device=self.device),
            position_ids=torch.tensor([positions + [positions[-1]] * padding], device=self.device),
            attention_mask=mask[None, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=rows,
        )
        return output.logits[0]

    def _self_test(self) -> None:
        """Scores a small tree in one forward and token by token, and demands the same logits.

        This is what tells whether the architecture honours our masks, our positions and our roll-back.
        """
        text = [(7 * i + 3) % self.vocabulary_size for i in range(8)]
        tree = Tree(text[3], 4, text[4:6], {1: [text[6]]})
        cache = self.new_cache()
        list(self.prefill(text[:3], cache))
        together = self.score(tree, cache)
        if any(layer.keys.shape[2] != 3 + TREE_WIDTHS[1] for layer in cache.layers):
            raise TargetError(f"{self._path}: its cache drops entries by itself, so rounds cannot be rolled back")
        self.keep(cache, 3, [0, 1, 3])
        after = self.score(Tree(text[7], 7, [], {}), cache)
        expected = []
        alone = self.new_cache()
        for position, token in enumerate([*text[:5], text[6], text[7]]):
            expected.append(self.score(Tree(token, position + 1, [], {}), alone)[0])
        scale = float(torch.stack(expected).abs().max())
        worst = max(
            float((a - b).abs().max())
            for a, b in zip([together[0], together[1], together[3], after[0]], expected[3:], strict=True)
        )
        if not worst <= SELF_TEST_TOLERANCE[self.dtype] * scale:
            raise TargetError(
                f"{self._path}: logits of a token tree differ by {worst:.3g} from those of the same tokens one by one; "
                "this architecture does not take our attention mask or its cache does not roll back"
            )
        log.info("self-test: a tree of 4 nodes and its parts one by one differ by %.2g", worst)


def _usable_context(config: Any, wanted: int | None, path: Path) -> int:
    strange = forgetless_layers(config)
    if strange:
        raise TargetError(
            f"{path} has layers of type {', '.join(strange)}, whose state cannot roll back rejected tokens; "
            "serve a model with plain attention"
        )
    context: int = wanted or config.max_position_embeddings
    if context > config.max_position_embeddings:
        raise TargetError(f"{path} was trained for {config.max_position_embeddings} tokens, not {context}")
    window = sliding_window(config)
    if window and window < context:
        raise TargetError(
            f"{path} attends over a sliding window of {window} tokens, whose cache cannot roll back; "
            f"serve it with --max-context {window}, within which its attention is plain"
        )
    return context


def load_model(path: Path, device: str, dtype: torch.dtype | str) -> tuple[Any, Path, frozenset[int]]:
    """The model at `path`, an adapter merged into its base; the base's directory; and the tokens that end a text.

    Raises:
        TargetError: not a loadable checkpoint.
    """
    base = base_of(path)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    try:
        with _LOADING:
            model, info = AutoModelForCausalLM.from_pretrained(
                base, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
            )
        if info["missing_keys"]:
            raise ValueError(f"its checkpoint lacks {', '.join(sorted(info['missing_keys'])[:3])}")
        if (path / CHANGES).exists():
            put_changes(model, path)
        elif path != base:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        model = model.to(device).eval()
    except Exception as error:
        raise TargetError(f"{path} does not load on {device}: {error}") from None
    ids = model.generation_config.eos_token_id
    if ids is None:
        return model, base, frozenset()
    return model, base, frozenset([ids] if isinstance(ids, int) else ids)
