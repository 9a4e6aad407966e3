"""The Prometheus metrics that the board's service and the verifier have in common.

Both derive their metrics from `PrometheusMetrics`. Every metric is named `flexspec_...`; the counters of speculative
decoding carry vLLM's names after that prefix, so that dashboards for vLLM need no more than the prefix.
"""

from __future__ import annotations

import time
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

CONTENT_TYPE = "text/plain; version=0.0.4"
PREFIX = "flexspec_"
# The value of a bounded label once its limit is reached, and the value for an empty one.
OTHER_VALUE = "other"
EMPTY_VALUE = "none"
# Share of the event loop's time that rendering the page may take, however many clients ask for it. Chosen.
RENDERING_SHARE = 0.2


class PrometheusMetrics:
    """A registry of its own for one process, with the metrics of the process itself (CPU, memory, open files).

    Names are given without the prefix `flexspec_`; Prometheus appends `_total` to those of counters.
    """

    def __init__(self) -> None:
        # The creation time of each counter is of no use here and would double the size of the page.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._page, self._page_expires = b"", 0.0
        ProcessCollector(registry=self._registry)

    def counter(self, name: str, help_text: str, labels: Iterable[str] = ()) -> Counter:
        """Register a counter and return it."""
        return Counter(PREFIX + name, help_text, labels, registry=self._registry)

    def histogram(self, name: str, help_text: str, buckets: Iterable[float]) -> Histogram:
        """Register a histogram and return it."""
        return Histogram(PREFIX + name, help_text, buckets=tuple(buckets), registry=self._registry)

    def add_gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Register a gauge whose value is `read()` at every scrape."""
        Gauge(PREFIX + name, help_text, registry=self._registry).set_function(read)

    def add_counter(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Register a counter that is kept elsewhere; its value is `read()` at every scrape."""
        self.add_collector(_ExternalCounter(PREFIX + name, help_text, read))

    def add_collector(self, collector: Collector) -> None:
        """Register a collector, which decides at every scrape which metrics exist."""
        self._registry.register(collector)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format, a few milliseconds old if they are asked for very often."""
        started = time.monotonic()
        if started >= self._page_expires:
            self._page = generate_latest(self._registry)
            ended = time.monotonic()
            self._page_expires = ended + (ended - started) / RENDERING_SHARE
        return self._page


class SpeculationCounters:
    """Speculative decoding, counted per round: vLLM's counters and the hits of sibling tokens.

    Args:
        labels: names of labels that all counters carry, in addition to `position` of the counter per position.
    """

    def __init__(self, metrics: PrometheusMetrics, labels: Iterable[str] = ()) -> None:
        labels = tuple(labels)
        self._drafts = metrics.counter("spec_decode_num_drafts", "Verified rounds that had draft tokens.", labels)
        self._draft_tokens = metrics.counter("spec_decode_num_draft_tokens", "Draft tokens in these rounds.", labels)
        self._accepted = metrics.counter(
            "spec_decode_num_accepted_tokens", "Draft tokens that the target model accepted.", labels
        )
        self._accepted_at = metrics.counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Accepted draft tokens by position in the draft.",
            (*labels, "position"),
        )
        self._sibling_hits = metrics.counter(
            "spec_decode_num_sibling_hits",
            "Rounds in which a sibling of the rejected draft token was the target's token.",
            labels,
        )

    def add_round(self, drafted: int, accepted: int, sibling_hit: bool, *label_values: str) -> None:
        """Count one round with `drafted` > 0 draft tokens, `accepted` of which the target model accepted."""
        for counter, amount in (
            (self._drafts, 1),
            (self._draft_tokens, drafted),
            (self._accepted, accepted),
            (self._sibling_hits, int(sibling_hit)),
        ):
            (counter.labels(*label_values) if label_values else counter).inc(amount)
        for position in range(accepted):
            self._accepted_at.labels(*label_values, str(position)).inc()


class BoundedLabel:
    """Values of a label that clients choose: the first `limit` of them are kept, all further ones become `other`.

    Without a bound, a client could grow the page and the memory of the process at will.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def value_for(self, value: str) -> str:
        """Return the value to record for `value`: itself, `none` if it is empty, or `other`."""
        value = value or EMPTY_VALUE
        if value not in self._known:
            if len(self._known) >= self._limit:
                return OTHER_VALUE
            self._known.add(value)
        return value


class _ExternalCounter(Collector):
    def __init__(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        self._name, self._help_text, self._read = name, help_text, read

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(self._name, self._help_text, value=self._read())
