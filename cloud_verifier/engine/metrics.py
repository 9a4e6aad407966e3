"""What Prometheus is told of a verifier: speculation (vLLM's names behind `flexspec_`), the engine, sessions, refusals.

What clients choose is never a label of its own without bound: beyond a number of values all others are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_runtime.protocol.messages import Frame, RoundRequest

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ROUND_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SESSIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# Different values of a label that somebody else chooses; further ones count as OTHER.
MOST_VERSIONS, MOST_DRAFTS, MOST_PRINCIPALS = 32, 32, 256
OTHER = "other"
# What a draft without a fingerprint, and a principal without a name, are called.
NONE = "none"


class Metrics:
    """Counts, from the start of the process. `forward` and `queued` may come from any thread, and so may the rest."""

    def __init__(self) -> None:
        # When a counter began is of no use here, and would double the page.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"flexspec_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"flexspec_{name}", text, buckets=tuple(buckets), registry=registry)

        by = ["version"]
        self._drafts = counter("spec_decode_num_drafts", "Rounds with a draft that was verified.", by)
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens of drafts that were verified.", by)
        self._accepted = counter("spec_decode_num_accepted_tokens", "Of these, those that the target accepted.", by)
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Likewise, by the index in the draft.", ["version", "position"]
        )
        self._siblings = counter("spec_decode_num_sibling_hits", "Rounds in which a sibling saved a token.", by)
        self._fingerprints = counter("draft_tokens", "Tokens of drafts that were verified, by fingerprint.", ["draft"])
        self._fingerprints_accepted = counter(
            "draft_accepted_tokens", "Of these, those that the target accepted.", ["draft"]
        )
        self._ignored = counter(
            "drafts_ignored", "Drafts that were not verified, as their board's or principal's hardly ever match."
        )
        self._own = counter("own_tokens", "Tokens that the target said itself.", by)
        self._close_calls = counter("close_calls", "Positions where other arithmetic might have chosen otherwise.", by)
        self._prompt_tokens = counter("prompt_tokens", "Tokens of the prompts of sessions that were opened.")
        self._principal_tokens = counter("principal_tokens", "Tokens that were said, by whose token it was.", ["name"])
        self._refusals = counter("refusals", "Requests that were refused, by code.", ["code"])
        self._queue = histogram("queue_seconds", "From a round's arrival to its first step in the engine.", SECONDS)
        self._forward = histogram("forward_seconds", "One forward of the target, and choosing its tokens.", SECONDS)
        self._rows = histogram("forward_rows", "Positions that one forward scores.", ROWS)
        self._batch = histogram("forward_sessions", "Sessions in one forward.", SESSIONS)
        self._round = histogram("round_seconds", "From a round's arrival to its last token.", ROUND_SECONDS)
        self._beside = histogram(
            "round_overhead_seconds", "Of these, what was neither a forward nor reading a prompt.", SECONDS
        )
        self._names = {
            "version": _Bounded(MOST_VERSIONS),
            "draft": _Bounded(MOST_DRAFTS),
            "principal": _Bounded(MOST_PRINCIPALS),
        }
        ProcessCollector(registry=registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """From now on `flexspec_NAME` is `value()`, whenever somebody asks."""
        Gauge(f"flexspec_{name}", text, registry=self._registry).set_function(value)

    def counter(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Likewise `flexspec_NAME_total`, which only grows."""
        self._registry.register(_Grows(f"flexspec_{name}", text, value))

    def page(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)

    def queued(self, seconds: float) -> None:
        """A round has waited so long until the engine began with it."""
        self._queue.observe(seconds)

    def forward(self, rows: int, sessions: int, seconds: float) -> None:
        """One forward of so many positions, padding not counted, of so many sessions."""
        self._forward.observe(seconds)
        self._rows.observe(rows)
        self._batch.observe(sessions)

    def opened(self, prompt: int) -> None:
        """A session with a prompt of so many tokens."""
        self._prompt_tokens.inc(prompt)

    def refused(self, code: str) -> None:
        """A request was refused."""
        self._refusals.labels(code).inc()

    def played(
        self, version: str, draft: str, principal: str, asked: RoundRequest, told: Frame, seconds: float, verified: bool
    ) -> None:
        """A round is over.

        Args:
            version: of the target.
            draft: the fingerprint of the board's draft, or empty.
            principal: whose it is, or empty.
            asked: the round.
            told: all that was told of it.
            seconds: that it took, from its arrival on.
            verified: whether its draft was looked at.
        """
        version = self._names["version"].of(version)
        if asked.draft and verified:
            fingerprint = self._names["draft"].of(draft)
            self._drafts.labels(version).inc()
            self._draft_tokens.labels(version).inc(len(asked.draft))
            self._accepted.labels(version).inc(told.accepted)
            for index in range(told.accepted):
                self._accepted_at.labels(version, str(index)).inc()
            self._siblings.labels(version).inc(sibling_hit(asked, told))
            self._fingerprints.labels(fingerprint).inc(len(asked.draft))
            self._fingerprints_accepted.labels(fingerprint).inc(told.accepted)
        elif asked.draft:
            self._ignored.inc()
        self._own.labels(version).inc(len(told.tokens))
        self._close_calls.labels(version).inc(len(told.close_calls))
        self._principal_tokens.labels(self._names["principal"].of(principal)).inc(told.accepted + len(told.tokens))
        self._round.observe(seconds)
        self._beside.observe(max(0.0, seconds - 1e-4 * (told.forward_100us + told.prefill_100us)))


def sibling_hit(asked: RoundRequest, told: Frame) -> bool:
    """Whether the target's token was one of the siblings of the draft token that failed."""
    return told.tokens[:1] != [] and told.tokens[0] in asked.siblings.get(told.accepted, ())


class _Grows(Collector):
    """A counter that somebody else counts."""

    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(self._name, self._text, value=self._value())


class _Bounded:
    """Values of a label: the first so many are themselves."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def of(self, value: str) -> str:
        value = value or NONE
        if value not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(value)
        return value
