"""Which models run on the paged KV cache, and the preparation of one that does.

No list names the architectures. A short probe forward records what every attention layer of a loaded model passes to
its attention function: sizes, masks and options. A model is taken if `attention.attend` can express all of it, and if
its queries and keys follow from the positions that a forward is given, up to the longest text. Whether the logits are
right is then for `self_test` to find out.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Set
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from cloud_verifier.model.attention import IMPLEMENTATION_NAME, attend, get_forward_context
from cloud_verifier.model.batch import FULL_SPAN, AttentionSpan
from cloud_verifier.model.kv_cache import KVCacheShape
from cloud_verifier.model.quantization import unrounded_inputs
from cloud_verifier.model.rope import LengthScaledRope
from edge_runtime.protocol.errors import TargetError

# Attention implementations of the probe, registered with transformers: with masks, and without.
MASKED_PROBE_NAME, PROBE_NAME = "flexspec_masked_probe", "flexspec_probe"
# The probe reduces sliding windows and chunks to these sizes, so that the mask of a few tokens shows which one a layer
# has. Chosen: small and different.
PROBE_WINDOW, PROBE_CHUNK, PROBE_TOKENS = 5, 7, 18
# Options of an attention function that `attend` implements, or that do not change its result in inference.
KNOWN_OPTIONS = {
    "scaling", "softcap", "s_aux", "dropout", "sliding_window", "position_ids", "cache_position", "is_causal",
    "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
}  # fmt: skip

_thread_state = threading.local()


class AttentionCall(NamedTuple):
    """What one layer passed to its attention function in the probe.

    Attributes:
        repeats: how often the layer repeats each KV head in what it passes.
    """

    layer: Any
    query_heads: int
    kv_heads: int
    head_size: int
    span: AttentionSpan
    repeats: int = 1


class PagedAttention:
    """The attention layers of a transformers model, prepared for forwards over the paged KV cache.

    Attributes:
        shape: shape of the KV cache.
        group: most query heads that share a KV head.
        rope: the rotary embeddings of the model.
    """

    def __init__(self, model: Any, shards: int = 1) -> None:
        """Prepare `model`.

        Args:
            model: a transformers causal language model, as transformers loads it.
            shards: number of tensor-parallel processes that are going to share the heads.

        Raises:
            TargetError: it cannot run on the paged cache; it is left unchanged.
        """
        calls, routed = _probe(model)
        self.rope = LengthScaledRope(model)
        self._model = model
        self._layers: list[Any] = [call.layer for call in calls]
        self._configs = [] if routed else [(config, config._attn_implementation) for config in _configs(model)]
        self.group = max(call.query_heads // call.kv_heads for call in calls)
        heads, size = (max(getattr(call, name) for call in calls) for name in ("kv_heads", "head_size"))
        self.shape = KVCacheShape(len(calls), heads // shards, size, model.dtype, model.device)
        for call in calls:
            call.layer.attention_span = call.span
            if routed:
                call.layer.forward = _RoutedForward(call.layer, call.repeats)
        for config, _ in self._configs:
            config._attn_implementation = IMPLEMENTATION_NAME

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the model run as transformers made it."""
        with _attention_implementation(self._configs):
            yield

    def remove(self) -> None:
        """Leave the model as transformers made it."""
        self.rope.remove()
        for config, name in self._configs:
            config._attn_implementation = name
        for layer in self._layers:
            vars(layer).pop("forward", None)

    def longest_span(self, limit: int) -> int:
        """The longest window or chunk of a layer, at most `limit`; 0 if all layers attend to the whole text."""
        longest: int = max(layer.attention_span.size for layer in self._layers)
        return min(limit, longest)

    @contextlib.contextmanager
    def shortened_spans(self, size: int) -> Iterator[None]:
        """Shorten longer windows and chunks to `size` tokens, also for forwards as transformers made them."""
        known = [layer.attention_span for layer in self._layers]
        for layer, span in zip(self._layers, known, strict=True):
            layer.attention_span = span._replace(size=min(span.size, size))
        try:
            with _shrunk_spans(self._model, size, size):
                yield
        finally:
            for layer, span in zip(self._layers, known, strict=True):
                layer.attention_span = span


def _configs(model: Any) -> list[Any]:
    """The configurations that the modules of `model` refer to."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation")}.values())


@contextlib.contextmanager
def _attention_implementation(names: list[tuple[Any, str]]) -> Iterator[None]:
    known = [(config, config._attn_implementation) for config, _ in names]
    for config, name in names:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, name in known:
            config._attn_implementation = name


@contextlib.contextmanager
def _shrunk_spans(model: Any, window: int, chunk: int) -> Iterator[None]:
    """Reduce the sliding window and the attention chunks of `model` to at most these sizes."""
    known: list[tuple[Any, str, int]] = []
    for config in _configs(model):
        for name, limit in (("sliding_window", window), ("attention_chunk_size", chunk)):
            size = getattr(config, name, None)
            if isinstance(size, int) and size > limit:
                known.append((config, name, size))
                setattr(config, name, limit)
    try:
        yield
    finally:
        for config, name, size in known:
            setattr(config, name, size)


def forward_arguments(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """The arguments of a forward of `model` over rows of several texts.

    Args:
        ids, positions: (rows,) token ids and absolute positions.
    """
    arguments: dict[str, Any] = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
    model_class: Any = type(model)
    if "cache_position" in _forward_parameters(model_class):
        # Some models read positions from here (Llama 4 scales queries by it, in transformers 4).
        arguments["cache_position"] = positions
    return arguments


@functools.cache
def _forward_parameters(model_class: Any) -> Set[str]:
    """The names of the parameters of a model's forward."""
    return inspect.signature(model_class.forward).parameters.keys()


@torch.inference_mode()
def _probe(model: Any) -> tuple[list[AttentionCall], bool]:
    """Record the attention calls of a forward, by layer.

    Returns the calls, and whether the layers call `scaled_dot_product_attention` themselves instead of the attention
    function of their configuration.

    Raises:
        TargetError: `attend` cannot express the calls.
    """
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.config.vocab_size
    calls: list[AttentionCall] = []
    _thread_state.spans = {FULL_SPAN: FULL_SPAN}
    for config in _configs(model):
        if window := getattr(config, "sliding_window", None):
            _thread_state.spans[AttentionSpan(min(PROBE_WINDOW, window))] = AttentionSpan(window)
        if chunk := getattr(config, "attention_chunk_size", None):
            _thread_state.spans[AttentionSpan(min(PROBE_CHUNK, chunk), True)] = AttentionSpan(chunk, True)

    def record(*call: Any, **options: Any) -> None:
        calls.append(_classify(*call, **options))

    routed = False
    try:
        with _shrunk_spans(model, PROBE_WINDOW, PROBE_CHUNK):
            with _recording(model, MASKED_PROBE_NAME, record):
                model(input_ids=ids, use_cache=False)
            if not calls:
                routed = True
                with _recording(model, None, record):
                    model(input_ids=ids, use_cache=False)
        _check_layers(model, calls)
        with unrounded_inputs():
            _check_positions(model, None if routed else PROBE_NAME)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(f"a forward of it fails with another attention function: {error!r}"[:300]) from None
    finally:
        _thread_state.spans = None
    return calls, routed


def _check_layers(model: Any, calls: list[AttentionCall]) -> None:
    """Check that all layers are attention.

    Raises:
        TargetError: they are not.
    """
    layers = model.config.num_hidden_layers
    if sorted(call.layer.layer_idx for call in calls) != list(range(layers)):
        raise TargetError(f"{len(calls)} of its {layers} layers are attention that can be replaced, once in a forward")


def _check_positions(model: Any, implementation: str | None) -> None:
    """Check that queries and keys follow from the positions that a forward is given, rather than from its rows.

    Args:
        implementation: see `_recording`.

    Raises:
        TargetError: they do not.
    """

    def queries_and_keys(**arguments: Any) -> list[torch.Tensor]:
        tensors: list[torch.Tensor] = []
        with _recording(model, implementation, lambda _, query, key, *__, **___: tensors.extend([query, key])):
            model(**arguments)
        return tensors

    token = torch.ones(1, dtype=torch.int64, device=model.device)
    context = getattr(model.config, "max_position_embeddings", None) or PROBE_TOKENS
    for position in (context // 2, context - 1):
        given = queries_and_keys(**forward_arguments(model, token, torch.full_like(token, position)))
        try:
            counted = queries_and_keys(input_ids=token[None], past_key_values=_PretendedCache(position), use_cache=True)
        except Exception as error:
            raise TargetError(f"it needs more of its cache than keys and values: {error!r}"[:300]) from None
        if not all(torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in zip(given, counted, strict=True)):
            raise TargetError(f"its queries or keys at position {position} do not follow from the positions given")


class _PretendedCache(DynamicCache):
    """A cache that claims to hold a text, and holds nothing."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self._length

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        return self._length

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self._length + 1, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


def _record(
    layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """The attention function of the probe: record the call and return zeros."""
    _thread_state.record(layer, query, key, value, *arguments, **options)
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _classify(
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> AttentionCall:
    """What a layer passes to its attention function.

    Raises:
        TargetError: `attend` cannot express the call.
    """
    name = type(layer).__name__
    unknown = sorted(
        option for option, value in options.items() if not (option in KNOWN_OPTIONS or value is None or value is False)
    )
    if unknown:
        raise TargetError(f"{name} passes {', '.join(unknown)} to its attention")
    if attention_mask is None and not (options.get("is_causal", True) and getattr(layer, "is_causal", True)):
        raise TargetError(f"{name} is not causal")
    (batch, query_heads, rows, _), kv_heads = query.shape, key.shape[1]
    if (batch, rows) != (1, PROBE_TOKENS) or key.shape[2] != rows or query_heads % kv_heads:
        raise TargetError(f"{name} passes {[*query.shape]} queries and {[*key.shape]} keys to its attention")
    repeats = _repeats(key, value, getattr(layer, "num_key_value_groups", 1)) if query_heads == kv_heads else 1
    span = _span_of(attention_mask, name)
    size = max(key.shape[3], value.shape[3])
    return AttentionCall(layer, query_heads, kv_heads // repeats, head_size=size, span=span, repeats=repeats)


def _repeats(key: torch.Tensor, value: torch.Tensor, groups: Any) -> int:
    """How often each head is repeated in what a layer passes: `groups` times or once."""
    if not isinstance(groups, int) or groups < 2 or key.shape[1] % groups:
        return 1
    pairs = ((heads, heads[:, ::groups].repeat_interleave(groups, 1)) for heads in (key, value))
    return groups if all(torch.equal(*pair) for pair in pairs) else 1


def _span_of(mask: torch.Tensor | None, name: str) -> AttentionSpan:
    """The span of a layer with this mask in the probe.

    Args:
        mask: (1, heads or 1, rows, keys or more); True or 0 for what a row attends to, else False or a very negative
            number.
    """
    if mask is None:
        return FULL_SPAN
    mask = mask[..., :PROBE_TOKENS]
    visible = mask if mask.dtype == torch.bool else mask == 0
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
    position = torch.arange(PROBE_TOKENS, device=mask.device)
    if visible.shape[-2:] == (PROBE_TOKENS, PROBE_TOKENS) and bool((visible ^ hidden).all()):
        for span, unshrunk in _thread_state.spans.items():
            first = torch.tensor([span.first_visible(int(i)) for i in position], device=mask.device)
            if torch.equal(
                visible, ((position <= position[:, None]) & (position >= first[:, None])).expand_as(visible)
            ):
                known: AttentionSpan = unshrunk
                return known
    raise TargetError(f"{name} has a mask that is neither causal, nor a sliding window, nor chunks")


class _RouteAttention(TorchFunctionMode):
    """Replaces `scaled_dot_product_attention` by an attention function while a layer runs."""

    def __init__(self, layer: Any, attention: Callable[..., tuple[torch.Tensor, None]], repeats: int = 1) -> None:
        super().__init__()
        self._layer, self._attention, self._repeats = layer, attention, repeats

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._attend(*args, **kwargs) if function is scaled_dot_product_attention else function(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if attn_mask is None and not is_causal and query.shape[2] > 1:
            raise TargetError(f"{type(self._layer).__name__} is not causal")
        key, value = key[:, :: self._repeats], value[:, :: self._repeats]
        return self._attention(self._layer, query, key, value, attn_mask, scaling=scale)[0].transpose(1, 2)


class _RoutedForward:
    """The forward of a layer that calls `scaled_dot_product_attention` itself; unchanged outside a runner's forward."""

    def __init__(self, layer: Any, repeats: int) -> None:
        self._layer, self._forward, self._repeats = layer, layer.forward, repeats

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if get_forward_context() is None:
            return self._forward(*args, **kwargs)
        with _RouteAttention(self._layer, attend, self._repeats):
            return self._forward(*args, **kwargs)


@contextlib.contextmanager
def _recording(model: Any, implementation: str | None, record: Callable[..., object]) -> Iterator[None]:
    """Let attention layers call `record` instead of attending.

    Args:
        implementation: the attention implementation to configure; None for layers that do not ask for one.
    """
    layers = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    _thread_state.record = record
    try:
        if implementation:
            with _attention_implementation([(config, implementation) for config in _configs(model)]):
                yield
        else:
            for layer in layers:
                layer.forward = _RecordedForward(layer)
            yield
    finally:
        _thread_state.record = None
        for layer in layers:
            vars(layer).pop("forward", None)


class _RecordedForward:
    """The forward of a layer that calls `scaled_dot_product_attention` itself, in the probe."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._forward = layer, layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _RouteAttention(self._layer, _record):
            return self._forward(*args, **kwargs)


for _name in (MASKED_PROBE_NAME, PROBE_NAME):
    AttentionInterface.register(_name, _record)
AttentionMaskInterface.register(MASKED_PROBE_NAME, eager_mask)
