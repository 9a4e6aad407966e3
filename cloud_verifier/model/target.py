"""One target model: a Hugging Face directory, loaded by transformers, that scores token trees in one forward."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from cloud_verifier.model import attention
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import CachedSequence, KVCachePool
from cloud_verifier.model.lora import LoRAWeights, is_plain_lora
from cloud_verifier.model.rollback import layers_without_rollback, sliding_window
from cloud_verifier.model.runner import TargetRunner
from cloud_verifier.model.sampling import SampledTokens
from cloud_verifier.model.tree import TokenTree
from cloud_verifier.registry.checkpoint import (
    base_directory,
    check_weights,
    load_config,
    load_tokenizer,
    shared_fingerprints,
    tokenizer_vocabulary_hash,
    version_hash,
)
from cloud_verifier.registry.delta import CHANGES_FILE, apply_changes
from edge_runtime.protocol.bundle import draft_identity
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.sampling import Sampling

if TYPE_CHECKING:
    from cloud_verifier.model.tensor_parallel import TensorParallelGroup

log = logging.getLogger(__name__)

GREEDY = Sampling()

# Capacity per sequence of the self-test's pool: a few pages on any device.
SELF_TEST_TOKENS = 512

# transformers loads one model at a time: while loading it changes global state that affects all threads.
_LOAD_LOCK = threading.Lock()

# By dtype: the largest difference of a logit, relative to the largest logit, that the self-test accepts as rounding.
SELF_TEST_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class Target:
    """A loaded target version.

    Attributes:
        name: the directory's name, unless another was given.
        version: `name@hash`; the hash covers every file that can change an answer.
        vocabulary: hash of the tokenizer's vocabulary, comparable with a bundle's.
        vocabulary_size: number of logits.
        end_ids: end-of-text tokens.
        context: longest text in tokens.
        runner: the runner of its model; versions that are adapters of one base share it.
        adapter_slot: slot of the version's LoRA adapter in the runner; 0 is none.
    """

    runner: TargetRunner
    end_ids: frozenset[int]

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        dtype: torch.dtype,
        context: int | None = None,
        name: str = "",
        exact: bool = False,
        compiled: bool = False,
        group: TensorParallelGroup | None = None,
        share_with: Sequence[Target] | None = None,
    ) -> None:
        """Load the checkpoint or PEFT adapter at `path`.

        Args:
            device: a torch device.
            dtype: dtype to compute in.
            context: longest text to serve, in tokens; None for the length that the model was trained for.
            name: name of the target; empty for the directory's name.
            exact, compiled, group: on CUDA, see `cuda_graphs.GraphRunner`.
            share_with: loaded targets to share memory with. Versions of one base run through one model, to which
                `attach_adapter` adds an adapter; any other version keeps only the tensors in which it differs from a
                loaded target of the same shape. None: this is the only target, and an adapter is merged into its base.

        Raises:
            TargetError: not a loadable checkpoint, or its cache cannot roll back.
        """
        path = path.resolve()
        base = base_directory(path)
        config = load_config(base)
        check_weights(base)
        self._path, self._base = path, base
        self._identities: dict[tuple[str, int], str] = {}
        self.name = name or path.name
        self.version = f"{self.name}@{version_hash(path, base)}"
        self.context = _usable_context(config, context, path)
        self.vocabulary_size = config.vocab_size
        self.vocabulary = tokenizer_vocabulary_hash(load_tokenizer(path, base))
        self.dtype, self.device = dtype, torch.device(device)
        self._layers = config.num_hidden_layers
        self.adapter_slot = 0
        self._adapter_weights: LoRAWeights | None = None
        unmerged = share_with is not None and is_plain_lora(path)
        # Whether the runner's model is the unchanged base.
        self._on_base = unmerged or path == base
        host = next((other for other in share_with or () if other.runs_base(base, self.dtype, self.device)), None)
        if host and self._on_base:
            self.runner, self.end_ids = host.runner, host.end_ids
        else:
            model, _, self.end_ids = load_model(
                base if unmerged else path, device, dtype, attention=attention.IMPLEMENTATION_NAME
            )
            self.runner = make_runner(model, self.context, exact=exact, compiled=compiled, group=group)
            for other in share_with or ():
                if other.runner.shape == self.runner.shape:
                    share_equal_tensors(model, other.runner.model)
            if group is None or group.rank == 0:
                self._check_architecture()
        if unmerged:
            self._adapter_weights = self.runner.adapters.load(path)

    def expected_identity(self, identity: str) -> str:
        """The identity that a draft of the same layout as `identity` has if it fits; empty for an impossible layout."""
        layout, _, rest = identity.partition("/")
        blocks = rest.partition("/")[0]
        # Checked before anything is read: the client chooses this string.
        valid = (
            layout in ("anchor", "prefix", "standalone") and blocks.isascii() and blocks.isdigit() and len(blocks) < 4
        )
        return self.shared_identity(layout, int(blocks)) if valid and int(blocks) <= self._layers else ""

    def shared_identity(self, layout: str, blocks: int) -> str:
        """Identity of the tensors that a draft of this layout shares with the target (see `SharedTensors.identity`)."""
        known = self._identities.get((layout, blocks))
        if known is None:
            fingerprints = shared_fingerprints(self._path, self._base, layout, blocks, self._layers)
            known = self._identities[layout, blocks] = draft_identity(layout, blocks, fingerprints)
        return known

    @property
    def base(self) -> Path:
        """Directory of the checkpoint that the version is, or is based on."""
        return self._base

    def runs_base(self, base: Path, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the runner's model is the unchanged checkpoint `base`, so that adapters of it can be added."""
        return self._on_base and (self._base, self.dtype, self.device) == (base, dtype, device)

    def attach_adapter(self) -> None:
        """Add the version's unmerged adapter, if it has one, to the runner. Call between forwards only."""
        if self._adapter_weights is not None:
            self.adapter_slot = self.runner.adapters.add(self._adapter_weights)
            self._adapter_weights = None

    def detach_adapter(self) -> None:
        """Remove the version's adapter, which no sequence uses any more. Call between forwards only."""
        if self.adapter_slot:
            self.runner.adapters.remove(self.adapter_slot)
            self.adapter_slot = 0

    def run(self, pool: KVCachePool, segments: Sequence[Segment]) -> list[SampledTokens | None]:
        """Run one forward of segments of this version, and of others on the same runner; see `TargetRunner.run`."""
        return self.runner.run(pool, segments)

    def tree_segment(self, sequence: CachedSequence, tree: TokenTree, sampling: Sampling = GREEDY) -> Segment:
        """A segment in which this version scores `tree` after `sequence`."""
        return Segment.from_tree(sequence, tree, sampling, self.adapter_slot)

    def prefill_segment(self, sequence: CachedSequence, ids: list[int]) -> Segment:
        """A segment that prefills `ids` after `sequence`."""
        return Segment.from_tokens(sequence, ids, adapter_slot=self.adapter_slot)

    def _check_architecture(self) -> None:
        try:
            self._self_test()
        except TargetError:
            raise
        except Exception as error:
            raise TargetError(f"{self._path}: this architecture does not run with our attention: {error!r}") from None

    def _self_test(self) -> None:
        """Score a small tree in one forward and token by token, and require equal logits.

        This verifies that the architecture honors the masks, the positions and the rollback.
        """
        ids = [(7 * i + 3) % self.vocabulary_size for i in range(8)]
        pool, batched, single = KVCachePool(self.runner.shape, 4 * SELF_TEST_TOKENS), CachedSequence(), CachedSequence()
        # `logits` uses no CUDA graph: one of this temporary pool would stay, and only the leader of a tensor-parallel
        # group has this pool.
        self.runner.logits(pool, [self.prefill_segment(batched, ids[:3])])
        pool.keep(batched, [0, 1, 2])
        tree = self.tree_segment(batched, TokenTree(ids[3], 4, ids[4:6], {1: [ids[6]]}))
        logits = [*self.runner.logits(pool, [tree])[0].clone()]
        pool.keep(batched, [0, 1, 3])
        logits += self.runner.logits(pool, [self.tree_segment(batched, TokenTree(ids[7], 7, [], {}))])[0].clone()
        expected: list[torch.Tensor] = []
        for position, token in enumerate([*ids[:5], ids[6], ids[7]]):
            one_token = self.tree_segment(single, TokenTree(token, position + 1, [], {}))
            expected += self.runner.logits(pool, [one_token])[0].clone()
            pool.keep(single, [0])
        scale = float(torch.stack(expected).abs().max())
        pairs = zip([logits[0], logits[1], logits[3], logits[4]], expected[3:], strict=True)
        largest = max(float((a - b).abs().max()) for a, b in pairs)
        if not largest <= SELF_TEST_TOLERANCE[self.dtype] * scale:
            raise TargetError(
                f"{self._path}: logits of a token tree differ by {largest:.3g} from those of the same tokens one by "
                "one; this architecture does not support our attention or our positions"
            )
        log.info("self-test: logits of a tree of 4 nodes and of its tokens one by one differ by %.2g", largest)


def make_runner(
    model: Any,
    context: int,
    *,
    exact: bool = False,
    compiled: bool = False,
    group: TensorParallelGroup | None = None,
) -> TargetRunner:
    """The runner for the device of `model`; on CUDA with a group, the model is sharded first."""
    if model.device.type != "cuda":
        return TargetRunner(model)
    from cloud_verifier.model.cuda_graphs import GraphRunner

    if group:
        group.shard_model(model)
    return GraphRunner(model, context, exact=exact, compiled=compiled, group=group)


def share_equal_tensors(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Replace the parameters of `model` that equal those of `other` by the latter, which frees their memory."""
    for name, module in model.named_modules():
        for key, value in list(module._parameters.items()):
            try:
                known = other.get_submodule(name)._parameters.get(key)
            except AttributeError:
                continue
            if value is not None and known is not None and value.dtype == known.dtype and torch.equal(value, known):
                module._parameters[key] = known


def load_model(
    path: Path, device: str, dtype: torch.dtype | str, attention: str = "sdpa"
) -> tuple[Any, Path, frozenset[int]]:
    """Load the model at `path`, an adapter merged into its base.

    Args:
        attention: transformers' `attn_implementation`.

    Returns the model, in eval mode, the base's directory, and the end-of-text tokens.

    Raises:
        TargetError: not a loadable checkpoint.
    """
    base = base_directory(path)
    # transformers' stubs miss the annotations of these two.
    logging_options: Any = transformers.utils.logging
    auto_model: Any = AutoModelForCausalLM
    if not sys.stderr.isatty():
        logging_options.disable_progress_bar()
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    try:
        with _LOAD_LOCK:
            model, info = auto_model.from_pretrained(
                base, dtype=dtype, attn_implementation=attention, output_loading_info=True
            )
        if info["missing_keys"]:
            raise ValueError(f"its checkpoint lacks {', '.join(sorted(info['missing_keys'])[:3])}")
        if (path / CHANGES_FILE).exists():
            apply_changes(model, path)
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


def _usable_context(config: Any, requested: int | None, path: Path) -> int:
    unsupported = layers_without_rollback(config)
    if unsupported:
        raise TargetError(
            f"{path} has layers of type {', '.join(unsupported)}, whose state cannot roll back rejected tokens; "
            "serve a model with plain attention"
        )
    context: int = requested or config.max_position_embeddings
    if context > config.max_position_embeddings:
        raise TargetError(f"{path} was trained for {config.max_position_embeddings} tokens, not {context}")
    window = sliding_window(config)
    if window and window < context:
        raise TargetError(
            f"{path} attends over a sliding window of {window} tokens, whose cache cannot roll back; "
            f"serve it with --max-context {window}, within which its attention is plain"
        )
    return context
