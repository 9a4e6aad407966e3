"""The ONNX draft model on the board.

`model` loads it, `onnx_runner` runs its graph, `sampler` samples, `prefix_cache` keeps KV caches of ended texts.
"""

from edge_runtime.draft.model import EMPTY_PROPOSAL, DraftContext, OnnxDraft, Proposal
from edge_runtime.draft.onnx_runner import OnnxRunner, make_runner
from edge_runtime.draft.prefix_cache import DEFAULT_PREFIX_CACHE_BYTES, DraftPrefixCache
from edge_runtime.planning.round_rules import PREFILL_CHUNK_TOKENS

__all__ = [
    "DEFAULT_PREFIX_CACHE_BYTES",
    "EMPTY_PROPOSAL",
    "PREFILL_CHUNK_TOKENS",
    "DraftContext",
    "DraftPrefixCache",
    "OnnxDraft",
    "OnnxRunner",
    "Proposal",
    "make_runner",
]
