"""The speculative decoding loop: `generation.Generation` runs it for one answer."""

from edge_runtime.decoding.detokenizer import Detokenizer, decode_continuation, token_bytes
from edge_runtime.decoding.generation import Generation, VerifiedTokens
from edge_runtime.decoding.statistics import GenerationStatistics

__all__ = ["Detokenizer", "Generation", "GenerationStatistics", "VerifiedTokens", "decode_continuation", "token_bytes"]
