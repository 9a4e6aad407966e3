"""The ONNX draft model on the board: loading (`model`), graph execution (`onnx_runner`) and sampling (`sampler`)."""

from edge_runtime.draft.model import EMPTY_PROPOSAL, DraftContext, OnnxDraft, Proposal
from edge_runtime.draft.onnx_runner import OnnxRunner, make_runner
from edge_runtime.planning.round_rules import PREFILL_CHUNK_TOKENS

__all__ = [
    "EMPTY_PROPOSAL",
    "PREFILL_CHUNK_TOKENS",
    "DraftContext",
    "OnnxDraft",
    "OnnxRunner",
    "Proposal",
    "make_runner",
]
