"""The speculative decoding loop: `generation.Generation` runs it for one answer."""

from edge_runtime.decoding.detokenizer import CONTEXT_TOKENS, Detokenizer, decode_after
from edge_runtime.decoding.generation import Generation, VerifiedTokens
from edge_runtime.decoding.statistics import GenerationStatistics

__all__ = ["CONTEXT_TOKENS", "Detokenizer", "Generation", "GenerationStatistics", "VerifiedTokens", "decode_after"]
