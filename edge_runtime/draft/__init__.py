"""The ONNX draft model on the board: loading (`model`), graph execution (`onnx_runner`) and sampling (`sampler`)."""

from edge_runtime.draft.model import EMPTY_PROPOSAL, DraftContext, OnnxDraft, Proposal
from edge_runtime.draft.onnx_runner import PREFILL_CHUNK_TOKENS, OnnxRunner, make_runner

__all__ = [
    "EMPTY_PROPOSAL",
    "PREFILL_CHUNK_TOKENS",
    "DraftContext",
    "OnnxDraft",
    "OnnxRunner",
    "Proposal",
    "make_runner",
]
