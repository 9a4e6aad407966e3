"""One target model: a Hugging Face directory, loaded by transformers, that scores token trees in one forward."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from cloud_verifier.model.batch import Segment, do_nothing
from cloud_verifier.model.cpu_layers import CpuLayers, dense_weight
from cloud_verifier.model.fast_tier import PagedAttention
from cloud_verifier.model.fused_projections import ProjectionFusion
from cloud_verifier.model.general_tier import GeneralRunner
from cloud_verifier.model.kv_cache import CACHE_FORMATS, CachedSequence
from cloud_verifier.model.lora import LoRAAdapters, LoRAWeights
from cloud_verifier.model.merged_adapter import merge_adapter
from cloud_verifier.model.pretrained import (
    generation_end_ids,
    load_pretrained,
    load_text_config,
    text_part,
    usable_context,
)
from cloud_verifier.model.quantization import quantize_layers
from cloud_verifier.model.runner import TargetRunner
from cloud_verifier.model.sampling import GREEDY, SampledTokens
from cloud_verifier.model.self_test import SelfTest
from cloud_verifier.model.tree import CLOSE_CALL_MARGIN, TokenTree
from cloud_verifier.registry.adapter import is_plain_lora
from cloud_verifier.registry.checkpoint import (
    accepted_vocabularies,
    base_directory,
    check_tokenizer,
    load_config,
    load_tokenizer,
    shared_fingerprints,
    tokenizer_vocabulary_hash,
    version_name,
)
from cloud_verifier.registry.delta import CHANGES_FILE, apply_changes
from cloud_verifier.registry.tokenizer_config import ends_of_tokenizer
from cloud_verifier.registry.version_files import version_hash
from edge_runtime.protocol.bundle import draft_identity
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.grammar_trial import TriedGrammarCompiler
from edge_runtime.protocol.logits_processing import SequenceProcessor
from edge_runtime.protocol.sampling import Sampling

if TYPE_CHECKING:
    from cloud_verifier.model.tensor_parallel import TensorParallelGroup

log = logging.getLogger(__name__)


class Target:
    """A loaded target version.

    Attributes:
        name: the directory's name, unless another was given.
        version: `name@hash`; the hash covers every file that can change an answer.
        vocabulary: hash of the tokenizer's vocabulary, comparable with a bundle's.
        draft_vocabularies: those of drafts that fit, see `checkpoint.accepted_vocabularies`.
        vocabulary_size: number of logits.
        end_ids: end-of-text tokens.
        context: longest text in tokens.
        runner: the runner of its model; versions that are adapters of one base share it.
        general_tier_reason: why the model runs on the slower general tier; empty if it runs on the fast one.
        grammars: compiles grammars for the target.
        rounds_activations: what layers compute, or keys and values, are rounded to 8 bits.
        adapter_slot: slot of the version's LoRA adapter in the runner; 0 is none.
    """

    runner: TargetRunner | GeneralRunner
    end_ids: frozenset[int]
    rounds_activations = False

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
        quantize: str = "",
        cache_format: str = "",
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
            quantize: one of `quantization.METHODS`, which is a part of the version; empty to compute in `dtype`.
            cache_format: one of `kv_cache.CACHE_FORMATS`, likewise; empty for `dtype`.
            share_with: loaded targets to share memory with. Versions of one base run through one model, to which
                `attach_adapter` adds an adapter; any other version keeps only the tensors in which it differs from a
                loaded target of the same shape. None: this is the only target, and an adapter is merged into its base.

        Raises:
            TargetError: not a loadable checkpoint, or its cache cannot roll back.
        """
        self.name = name or version_name(path)
        path = path.resolve()
        base = base_directory(path)
        config = load_text_config(base)
        self._path, self._base = path, base
        self._identities: dict[tuple[str, int, int | None], str] = {}
        self.rounds_activations = quantize == "fp8" or bool(cache_format)
        suffixes = [f"-{quantize}"] * bool(quantize) + [f"-kv-{cache_format}"] * bool(cache_format)
        self.version = f"{self.name}@{version_hash(path, base)}" + "".join(suffixes)
        self.context = usable_context(config, context, path)
        self.vocabulary_size = config.vocab_size
        tokenizer = load_tokenizer(path, base)
        check_tokenizer(tokenizer, self.vocabulary_size, path)
        self.vocabulary = tokenizer_vocabulary_hash(tokenizer)
        self.draft_vocabularies = accepted_vocabularies(tokenizer)
        self.dtype, self.device = dtype, torch.device(device)
        self._layers: int = getattr(config, "num_hidden_layers", 0)
        self.adapter_slot = 0
        self.general_tier_reason = ""
        self._adapter_weights: LoRAWeights | None = None
        # Of a multimodal model only a part runs, in which an adapter's tensors have other names.
        is_whole = config.model_type == load_config(base).model_type
        unmerged = share_with is not None and is_plain_lora(path) and is_whole
        # Whether the runner's model is the unchanged base.
        self._on_base = unmerged or path == base
        host = next((other for other in share_with or () if other.runs_base(base, self.dtype, self.device)), None)
        if host and self._on_base:
            self.runner, self.end_ids = host.runner, host.end_ids
        else:
            model, _, self.end_ids = load_model(base if unmerged else path, device, dtype, quantize)
            structure = _structure(model)
            try:
                self.runner = make_runner(
                    model,
                    self.context,
                    exact=exact,
                    compiled=compiled,
                    group=group,
                    cache_dtype=CACHE_FORMATS[cache_format] if cache_format else None,
                    tested=True,
                )
            except TargetError as obstacle:
                if cache_format:
                    raise TargetError(f"{path} has no KV cache in {cache_format}: {obstacle}") from None
                if group:
                    raise TargetError(f"{path} cannot be split over several GPUs: {obstacle}") from None
                if unmerged or _structure(model) != structure:
                    # The general tier has no adapters beside a base, and needs the model as transformers made it.
                    model, unmerged, self._on_base = load_model(path, device, dtype, quantize)[0], False, path == base
                self.runner, self.general_tier_reason = self._general_runner(model, exact), str(obstacle)
                log.warning(
                    "%s runs on the general tier, one session per forward: slower, with the same text; %s",
                    self.version,
                    self.general_tier_reason,
                )
            for other in share_with or ():
                if other.runner.shape == self.runner.shape:
                    share_equal_tensors(model, other.runner.model)
        self._rope = self.runner.rope if isinstance(self.runner, TargetRunner) else None
        self.grammars = TriedGrammarCompiler(lambda: load_tokenizer(path, base), self.vocabulary_size, self.end_ids)
        if unmerged:
            self._adapter_weights = self._adapters.load(path)

    def expected_identity(self, identity: str) -> str:
        """The identity that a draft of the same layout as `identity` has if it fits; empty for an impossible layout."""
        layout, _, rest = identity.partition("/")
        blocks = rest.partition("/")[0]
        # Checked before anything is read: the client chooses this string.
        valid = (
            layout in ("anchor", "prefix", "standalone") and blocks.isascii() and blocks.isdigit() and len(blocks) < 4
        )
        if not valid or int(blocks) > self._layers:
            return ""
        sizes = [rows for rows in self.draft_vocabularies.values() if rows is None or rows < self.vocabulary_size]
        identities = (self.shared_identity(layout, int(blocks), rows) for rows in sizes)
        return identity if identity in identities else self.shared_identity(layout, int(blocks))

    def shared_identity(self, layout: str, blocks: int, rows: int | None = None) -> str:
        """Identity of the tensors that a draft of this layout shares with the target (see `SharedTensors.identity`).

        Args:
            rows: see `checkpoint.shared_fingerprints`.
        """
        known = self._identities.get((layout, blocks, rows))
        if known is None:
            fingerprints = shared_fingerprints(self._path, self._base, layout, blocks, self._layers, rows=rows)
            known = self._identities[layout, blocks, rows] = draft_identity(layout, blocks, fingerprints)
        return known

    @functools.cached_property
    def close_call_margin(self) -> float:
        """Two scores that are closer could change places in a batch of another size."""
        name = str(self.dtype).removeprefix("torch.")
        # As large as the rounding, where that can make a step of a last bit.
        return max(CLOSE_CALL_MARGIN[name], CLOSE_CALL_MARGIN["bfloat16"] if self.rounds_activations else 0.0)

    @property
    def replays_prompt(self) -> bool:
        """Whether the logits depend on where the prompt of a text ended (see `GeneralRunner.is_consistent`)."""
        if self._rope:
            return self._rope.depends_on_prompt
        return isinstance(self.runner, GeneralRunner) and not self.runner.is_consistent

    @property
    def base(self) -> Path:
        """Directory of the checkpoint that the version is, or is based on."""
        return self._base

    def runs_base(self, base: Path, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the runner's model is the unchanged checkpoint `base`, so that adapters of it can be added."""
        unmerged = self._on_base and not self.general_tier_reason
        return unmerged and (self._base, self.dtype, self.device) == (base, dtype, device)

    def attach_adapter(self) -> None:
        """Add the version's unmerged adapter, if it has one, to the runner. Call between forwards only."""
        if self._adapter_weights is not None:
            self.adapter_slot = self._adapters.add(self._adapter_weights)
            self._adapter_weights = None

    def detach_adapter(self) -> None:
        """Remove the version's adapter, which no sequence uses any more. Call between forwards only."""
        if self.adapter_slot:
            self._adapters.remove(self.adapter_slot)
            self.adapter_slot = 0

    @property
    def _adapters(self) -> LoRAAdapters:
        assert isinstance(self.runner, TargetRunner), "the general tier has no adapters"
        return self.runner.adapters

    def _general_runner(self, model: Any, exact: bool) -> GeneralRunner:
        try:
            return GeneralRunner(model, self.context, exact=exact)
        except Exception as error:
            raise TargetError(f"{self._path} does not generate with transformers: {error}") from None

    def draft_limit(self, length: int) -> int:
        """The longest draft that can be verified after a text of `length` tokens, with a token of the target's own."""
        switch = self._rope.switch if self._rope and self._rope.recomputes else None
        room = self.context - length - 1
        # All keys of a text have the same RoPE frequencies.
        return room if switch is None or length > switch else min(room, switch - length)

    def prepare_cache(self, sequence: CachedSequence, length: int) -> None:
        """Prepare the KV cache of a text that now has `length` tokens: drop keys with other RoPE frequencies."""
        sequence.prompt_length = sequence.prompt_length or length
        if self._rope and self._rope.recomputes:
            is_long = self._rope.is_long(length)
            if sequence.long_rope != is_long:
                sequence.length, sequence.long_rope = 0, is_long

    def key_variant(self, sequence: CachedSequence) -> bool:
        """What the cached keys of `sequence` depend on besides the tokens before them: its set of RoPE frequencies.

        Sequences with a common prefix have equal keys there if this is equal, too.
        """
        if self._rope is None:
            return False
        return sequence.long_rope if self._rope.recomputes else self._rope.is_long(sequence.prompt_length)

    def run(
        self,
        pool: Any,
        segments: Sequence[Segment],
        meanwhile: Callable[[], object] = do_nothing,
        continues: bool = False,
    ) -> list[SampledTokens | None]:
        """Run one forward of segments of this version, and of others on the same runner; see `TargetRunner.run`."""
        return self.runner.run(pool, segments, meanwhile, continues)

    def tree_segment(
        self,
        sequence: CachedSequence,
        tree: TokenTree,
        sampling: Sampling = GREEDY,
        *,
        processor: SequenceProcessor | None = None,
        logprobs: int = 0,
    ) -> Segment:
        """A segment in which this version scores `tree` after `sequence`; see `Segment.from_tree`."""
        return Segment.from_tree(sequence, tree, sampling, self.adapter_slot, processor=processor, logprobs=logprobs)

    def prefill_segment(self, sequence: CachedSequence, ids: list[int]) -> Segment:
        """A segment that prefills `ids` after `sequence`."""
        return Segment.from_tokens(sequence, ids, adapter_slot=self.adapter_slot)


def make_runner(
    model: Any,
    context: int,
    *,
    exact: bool = False,
    compiled: bool = False,
    group: TensorParallelGroup | None = None,
    cache_dtype: torch.dtype | None = None,
    tested: bool = False,
) -> TargetRunner:
    """The runner for the device of `model` on the paged KV cache; with a group, the model is sharded.

    Args:
        cache_dtype: of the KV cache; None for that of the model.
        tested: run the self-test, on the leader of a group.

    Raises:
        TargetError: the model cannot run on the paged cache, or its logits are then not those of transformers. It is
            left as transformers made it, unless there is a group.
    """
    if model.config.get_text_config(decoder=True) is not model.config:
        raise TargetError("it is a multimodal model that transformers does not run without its other parts")
    attention: PagedAttention | None = None
    layers: CpuLayers | None = None
    fusion: ProjectionFusion | None = None
    try:
        attention = PagedAttention(model, group.size if group else 1)
        leads = group is None or group.rank == 0
        test = SelfTest(model, attention, context) if tested and leads else None
        rounded_test = SelfTest(model, attention, context, cache_dtype) if tested and leads and cache_dtype else None
        runner: TargetRunner
        if model.device.type == "cuda":
            from cloud_verifier.model.cuda_graphs import GraphRunner

            if group:
                group.shard_model(model)
            else:
                with attention.suspended():
                    fusion = ProjectionFusion(model)
            runner = GraphRunner(model, attention, context, exact=exact, compiled=compiled, fusion=fusion, group=group)
            if not group:
                runner.try_capture()
        else:
            runner = TargetRunner(model, attention)
        if test and model.device.type == "cpu":
            layers = CpuLayers(model)
            layers.prepare(functools.partial(test.run, runner))
        while test and model.device.type != "cpu":
            try:
                test.run(runner)
                break
            except TargetError as error:
                if group or not runner.simplify():
                    raise
                log.warning("changed layers of this model are wrong, and run more as they are: %s", error)
        if cache_dtype:
            # After the layers were compared, for which rounding would leave too much room.
            runner.round_cache(cache_dtype)
        if rounded_test:
            rounded_test.run(runner, runner.min_rows)
    except Exception as error:
        if layers:
            layers.restore()
        if fusion:
            fusion.undo()
        if attention:
            attention.remove()
        if isinstance(error, TargetError | torch.OutOfMemoryError):
            raise
        raise TargetError(f"a forward over the paged KV cache fails: {error!r}"[:300]) from None
    return runner


def _structure(model: Any) -> list[tuple[Any, ...]]:
    """The modules of a model with their classes, replaced methods and attention functions, for comparison."""
    return [
        (name, type(module), vars(module).get("forward"), getattr(config, "_attn_implementation", None))
        for name, module in model.named_modules()
        for config in [getattr(module, "config", None)]
    ]


def share_equal_tensors(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Replace the parameters of `model` that equal those of `other` by the latter, which frees their memory."""
    for name, module in model.named_modules():
        for key, value in list(module._parameters.items()):
            try:
                known = other.get_submodule(name)._parameters.get(key)
            except AttributeError:
                continue
            if value is not None and known is not None and _are_equal(value, known):
                module._parameters[key] = known


def _are_equal(value: torch.Tensor, known: torch.Tensor) -> bool:
    """Whether two parameters are the same, packed or not."""
    same_kind = (value.dtype, value.shape, value.layout) == (known.dtype, known.shape, known.layout)
    return same_kind and torch.equal(dense_weight(value), dense_weight(known))


def load_model(
    path: Path, device: str, dtype: torch.dtype | str, quantize: str = ""
) -> tuple[Any, Path, frozenset[int]]:
    """Load the model at `path`, an adapter merged into its base, and quantize it if one of its methods is given.

    Returns the model, in eval mode, the base's directory, and the end-of-text tokens.

    Raises:
        TargetError: not a loadable checkpoint.
    """
    base = base_directory(path)
    # transformers' stubs miss the annotations of this.
    logging_options: Any = transformers.utils.logging
    if not sys.stderr.isatty():
        logging_options.disable_progress_bar()
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    assert isinstance(dtype, torch.dtype)
    model = load_pretrained(base, device, dtype)
    try:
        if (path / CHANGES_FILE).exists():
            apply_changes(model, path)
        elif path != base:
            model = merge_adapter(model, path)
        model = text_part(model)
        model = model.eval()
        if quantize:
            quantize_layers(model, quantize)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(f"{path} does not load on {device}: {error}") from None
    return model, base, ends_of_tokenizer(base).union(generation_end_ids(model.generation_config))
