"""N-gram cache of verified text: proposes tokens that sharpen the frozen draft. It changes drafts, never the output."""

from edge_runtime.ngram_cache.lookup import NgramCache, NgramLookup, NgramProposal
from edge_runtime.ngram_cache.store import STORE_SUFFIX, NgramStore, erase_stores

__all__ = ["STORE_SUFFIX", "NgramCache", "NgramLookup", "NgramProposal", "NgramStore", "erase_stores"]
