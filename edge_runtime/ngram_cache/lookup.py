"""N-gram proposals: which token verified text suggests next, and how probable it is.

The cache proposes one token: the one that followed earlier occurrences of the end of the text, in the same text or in
earlier ones. A logistic regression estimates the probability that the target chooses it, from the draft's own
probability of the token, the length of the match and its origin. Every verified token updates the regression, so the
cache intervenes rarely while the draft is good, and more when a new target version has made it worse. `DraftSampler`
then raises the token to this probability in the draft's distribution and draws with the shared noise as usual.

Everything is a function of the verified texts, in their order.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import deque

from edge_runtime.ngram_cache.index import BOUNDARY, MAX_MATCH_TOKENS, NgramIndex, NgramMatch
from edge_runtime.ngram_cache.store import NgramRecord, NgramStore
from edge_runtime.protocol.sampling import accepted_length

# Capacity for earlier texts (2.3 MB), and for the text in progress. Chosen.
CACHE_TOKENS = 1 << 16
OWN_TEXT_TOKENS = 1 << 14
# Target versions with regression weights of their own. Chosen.
MAX_VERSIONS = 16
# Recent texts that are searched for the prefix of a new one, such as the earlier turns of a conversation. Chosen.
MAX_RECENT_TEXTS = 8
# Initial weights of the features 1, log odds in the draft, length / 8, length >= 8, length >= 16, share, match in an
# earlier text, match in a text of another version. Fitted to what the example family's target v1 writes.
PRIOR_WEIGHTS = (-1.4, 0.5, 1.3, -0.15, 0.65, 1.1, -0.2, -0.5)
# Step size of the regression, and bounds of its weights and of log odds. Chosen.
LEARNING_RATE = 0.02
MAX_WEIGHT = 8.0
MAX_LOG_ODDS = 9.0


class NgramProposal:
    """The token that the cache proposes for one position.

    Attributes:
        token: the proposed id.
        tail: the last tokens of the text that it continues.
        acceptance: the probability that `estimate_acceptance` returned; 0 before it is called.
        features: inputs of the regression, see `PRIOR_WEIGHTS`.
    """

    def __init__(
        self, match: NgramMatch, tail: list[int], is_earlier: bool, is_foreign: bool, weights: list[float]
    ) -> None:
        """
        Args:
            is_earlier: the match is in an earlier text.
            is_foreign: the match is in a text of another target version.
        """
        length = match.length
        self.token, self.tail = match.token, tail
        self.acceptance = 0.0
        long, longest = float(length >= 8), float(length >= 16)
        self.features = [1.0, 0.0, length / 8, long, longest, match.share, is_earlier, is_foreign]
        self._weights = weights

    def estimate_acceptance(self, draft_probability: float) -> float:
        """Return the probability, below 1, that the target chooses this token, given the draft's probability of it."""
        odds = max(draft_probability, 1e-9) / max(1.0 - draft_probability, 1e-9)
        self.features[1] = _clamp(math.log(odds), MAX_LOG_ODDS)
        score = sum(weight * feature for weight, feature in zip(self._weights, self.features, strict=True))
        self.acceptance = 1.0 / (1.0 + math.exp(-_clamp(score, MAX_LOG_ODDS)))
        return self.acceptance


class NgramCache:
    """Verified texts of a process by target version, persistent if there is an `NgramStore`. Thread-safe."""

    def __init__(self, vocabulary_size: int, store: NgramStore | None = None, capacity: int = CACHE_TOKENS) -> None:
        """Create a cache and load what `store` holds.

        Args:
            capacity: tokens of earlier texts.
        """
        self._store = store
        self._capacity = capacity
        self._lock = threading.Lock()
        self._clear()
        for record in store.read() if store else ():
            if len(record.weights) == len(PRIOR_WEIGHTS) and all(token < vocabulary_size for token in record.ids):
                self._add_record(record)

    @property
    def tokens(self) -> int:
        """Number of tokens in the cache."""
        return min(self._index.end, self._capacity)

    @property
    def failures(self) -> int:
        """Number of failed disk accesses and damaged records."""
        return self._store.failures + self._store.damaged if self._store else 0

    def propose(self, own: NgramIndex, tail: list[int], version: str) -> NgramProposal | None:
        """Propose the token after `tail`, the last tokens of a text whose verified part `own` indexes."""
        match, is_earlier, is_foreign = own.find(tail), False, False
        with self._lock:
            other = self._index.find(tail)
            if other is not None and (match is None or other.length > match.length):
                match, is_earlier = other, True
                text_version = self._versions[bisect_left(self._starts, other.position) - 1]
                is_foreign = text_version != (version or self._latest_version)
            weights = self._weights_of(version)
        return NgramProposal(match, tail, is_earlier, is_foreign, weights) if match else None

    def calibrate(self, version: str, proposal: NgramProposal, is_accepted: bool) -> None:
        """Update the regression of `version` with the outcome of a proposal."""
        step = LEARNING_RATE * (is_accepted - proposal.acceptance)
        with self._lock:
            weights = self._weights_of(version)
            # A new list: pending proposals hold the old one.
            updated = [weight + step * feature for weight, feature in zip(weights, proposal.features, strict=True)]
            self._set_weights(version, updated)

    def add(self, version: str, ids: list[int]) -> None:
        """Add a text, prompt included, that `version` has verified."""
        with self._lock:
            common = max((accepted_length(known, ids) for known in self._recent), default=0)
            self._recent.append(ids)
            # A repeated prefix must not count twice; its last tokens stay, as the context of what is new.
            new = ids[max(0, common - MAX_MATCH_TOKENS) :]
            record = NgramRecord(version, new, self._weights_of(version))
        if self._store and self._store.append(record):
            with self._lock:
                self._clear()
        with self._lock:
            self._add_record(record)

    def _add_record(self, record: NgramRecord) -> None:
        self._set_weights(record.version, record.weights)
        self._starts.append(self._index.end)
        self._versions.append(record.version)
        while len(self._starts) > 1 and self._starts[1] < self._index.end - 2 * self._capacity:
            del self._starts[0], self._versions[0]
        self._index.add([BOUNDARY, *record.ids])

    def _weights_of(self, version: str) -> list[float]:
        """A new version starts with the weights of the latest one."""
        return self._weights.get(version) or self._weights[self._latest_version]

    def _set_weights(self, version: str, weights: list[float]) -> None:
        # Removed and added again, so that the dictionary is ordered by last use.
        self._weights.pop(version, None)
        self._weights[version] = [_clamp(weight, MAX_WEIGHT) for weight in weights]
        self._latest_version = version
        if len(self._weights) > MAX_VERSIONS:
            del self._weights[next(iter(self._weights))]

    def _clear(self) -> None:
        self._index = NgramIndex(self._capacity)
        # Position in the index and target version of each text.
        self._starts: list[int] = []
        self._versions: list[str] = []
        self._recent: deque[list[int]] = deque(maxlen=MAX_RECENT_TEXTS)
        self._weights: dict[str, list[float]] = {"": list(PRIOR_WEIGHTS)}
        self._latest_version = ""


class NgramLookup:
    """The cache applied to one text. Not thread-safe."""

    def __init__(self, cache: NgramCache, context: int) -> None:
        """
        Args:
            context: tokens of the longest text.
        """
        self._cache = cache
        self._own_index = NgramIndex(min(context, OWN_TEXT_TOKENS))
        self._text: list[int] = []
        self._version = ""
        # By position.
        self._proposals: dict[int, NgramProposal] = {}

    def propose(self, ids: list[int]) -> NgramProposal | None:
        """Propose the token after `ids`: the text, possibly with draft tokens after it."""
        proposal = self._cache.propose(self._own_index, ids[-MAX_MATCH_TOKENS:], self._version)
        if proposal:
            self._proposals[len(ids)] = proposal
        return proposal

    def append(self, ids: list[int], version: str = "") -> None:
        """Append verified ids to the text: the prompt, or what the target `version` accepted and produced."""
        self._version = version
        for token in ids:
            proposal = self._proposals.pop(len(self._text), None)
            # A proposal teaches nothing if it was made after draft tokens that were rejected, or was never used.
            if proposal and proposal.acceptance and proposal.tail == self._text[-MAX_MATCH_TOKENS:]:
                self._cache.calibrate(version, proposal, token == proposal.token)
            self._text.append(token)
        self._own_index.add(ids)
        if len(self._proposals) > 2 * MAX_MATCH_TOKENS:
            self._proposals = {at: proposal for at, proposal in self._proposals.items() if at >= len(self._text)}

    def finish(self) -> None:
        """End the text and add it to the cache, if a target has verified any of it."""
        if self._version:
            self._cache.add(self._version, self._text)


def _clamp(value: float, limit: float) -> float:
    return min(limit, max(-limit, value))
