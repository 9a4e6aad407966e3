"""The service's Prometheus metrics: requests, speculative decoding, the link, and the board's sensors."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_runtime.common.metrics import PrometheusMetrics, SpeculationCounters
from edge_runtime.decoding import GenerationStatistics
from edge_runtime.draft import DraftPrefixCache
from edge_runtime.planning.plan import Conditions, Outcome, Plan, Planner, Surroundings
from edge_runtime.protocol.errors import VerifierUnreachable
from edge_runtime.service.admission import AdmissionQueue
from edge_runtime.service.answer import Answer
from edge_runtime.service.monitoring.gauges import GaugeSampler
from edge_runtime.service.monitoring.reporter import AnswerReporter
from edge_runtime.verifier import VerifierClient

# Histogram buckets in seconds; chosen.
FIRST_TOKEN_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
DURATION_BUCKETS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)

# Name and help text of the gauge for each field of `Surroundings`.
SENSOR_GAUGES = {
    "watts": ("flexspec_board_power_watts", "Power draw of the board, measured by its own sensors."),
    "joules_left": ("flexspec_board_battery_joules", "Energy left in the battery."),
    "battery_percent": ("flexspec_board_battery_percent", "Charge of the battery."),
    "on_battery": ("flexspec_board_on_battery", "1 if the board runs on battery."),
    "celsius": ("flexspec_board_temperature_celsius", "Processor temperature."),
    "throttled": ("flexspec_board_throttled", "1 if the processor is throttled because of heat or low voltage."),
    "metered": ("flexspec_link_metered", "1 if traffic on the link is billed by volume."),
}

# Values of the label `reason` of `flexspec_cloud_rounds_total`: why a round had no draft.
REASON_PLANNED = "planned"  # the planner decided so
REASON_SWITCHED_OFF = "switched_off"  # the request switched speculation off
REASON_DRAFT_FAILED = "draft_failed"  # the draft model failed and the target continued alone
REASON_NO_ROOM = "no_room"  # the text exceeds the draft's context, or has one token left


class ServiceMetrics(PrometheusMetrics):
    """Counters since the start of the process. Used on the event loop only.

    Attributes:
        plan: plan of the last planned round.
        rtt_seconds: round-trip time of the link in that round; None if unknown.
    """

    def __init__(self, queue: AdmissionQueue, client: VerifierClient, sampler: GaugeSampler) -> None:
        super().__init__()
        self.plan: Plan | None = None
        self.rtt_seconds: float | None = None
        self._queue, self._client = queue, client
        self._draft_round_bytes = self._accepted_tokens = 0

        self.add_gauge("requests_running", "Answers that are being generated.", lambda: queue.running)
        self.add_gauge("requests_waiting", "Requests that wait in the admission queue.", lambda: queue.waiting)
        self._requests = self.counter(
            "requests", "Requests for an answer by outcome: finish reason or error code.", ["outcome"]
        )
        self._prompt_tokens = self.counter("prompt_tokens", "Prompt tokens.")
        self._cached_tokens = self.counter(
            "prompt_cached_tokens", "Of these, tokens whose KV cache the verifier had already."
        )
        self._tokens = self.counter("generation_tokens", "Generated tokens.")
        self._first_token_seconds = self.histogram(
            "time_to_first_token_seconds",
            "Time from a request to its first text, including the wait in the queue.",
            FIRST_TOKEN_BUCKETS,
        )
        self._duration_seconds = self.histogram(
            "request_duration_seconds",
            "Time from a request to the end of its answer, including the wait in the queue.",
            DURATION_BUCKETS,
        )
        self._speculation = SpeculationCounters(self)
        self._ready = self.counter("spec_decode_num_ready_tokens", "Draft tokens that had been drafted ahead.")
        self._unverified = self.counter(
            "unverified_tokens", "Draft tokens at the end of answers that no verifier has checked."
        )
        self._unverified_answers = self.counter("unverified_answers", "Answers that ended with such tokens.")
        self._withdrawn = self.counter(
            "withdrawn_tokens", "Draft tokens shown without a verifier and later rejected by the target."
        )
        self._cloud_rounds = self.counter("cloud_rounds", "Rounds without a draft by reason.", ["reason"])
        self._sent = self.counter("link_sent_bytes", "TCP payload sent to the verifier in rounds.")
        self._received = self.counter("link_received_bytes", "TCP payload received from the verifier in rounds.")
        self.add_gauge(
            "link_bytes_per_accepted_token",
            "TCP payload of rounds with a draft, both directions, per accepted token; NaN before the first.",
            lambda: self._draft_round_bytes / self._accepted_tokens if self._accepted_tokens else float("nan"),
        )
        self._draft_seconds = self.counter("draft_seconds", "Time spent drafting, prefill included.")
        self._verifier_seconds = self.counter("verifier_seconds", "Time in the verifier, as the verifier reports it.")
        self._link_seconds = self.counter(
            "link_seconds", "Time from sending rounds to their last frame, without the time in the verifier."
        )
        self._link_faults = self.counter(
            "link_faults", "Answers that failed because no verifier was reachable, by fault.", ["fault"]
        )
        self.add_collector(_LinkCollector(client))
        self.add_collector(_SensorCollector(sampler))

    def status(self) -> str:
        """Return one line about the last plan, the link and the queue; it contains no prompt text."""
        parts = [
            f"K={self.plan.draft} n={self.plan.continuation}" if self.plan else "no round yet",
            *([f"rtt {1e3 * self.rtt_seconds:.0f} ms"] if self.rtt_seconds is not None else []),
            f"{self._queue.running} answers",
            *([f"{self._queue.waiting} waiting"] if self._queue.waiting else []),
        ]
        return ", ".join(parts)

    def count_round(self, outcome: Outcome) -> None:
        """Count a round that a planner planned."""
        self.plan, self.rtt_seconds = outcome.plan, self._client.meter.rtt_seconds
        if outcome.drafted:
            self._speculation.add_round(outcome.drafted, outcome.accepted, outcome.sibling > 0)
            self._ready.inc(outcome.ready)
            self._draft_round_bytes += outcome.sent + outcome.received
        else:
            self._cloud_rounds.labels(REASON_NO_ROOM if outcome.plan.draft else REASON_PLANNED).inc()
        self._accepted_tokens += outcome.accepted
        self._sent.inc(outcome.sent)
        self._received.inc(outcome.received)
        self._draft_seconds.inc(outcome.draft_seconds)
        self._verifier_seconds.inc(outcome.verifier_seconds)
        self._link_seconds.inc(max(0.0, outcome.exchange_seconds - outcome.verifier_seconds))

    def count_target_only_rounds(self, statistics: GenerationStatistics, reason: str) -> None:
        """Count the rounds of a generation without a draft model, which no planner observes."""
        self._cloud_rounds.labels(reason).inc(statistics.rounds)
        self._sent.inc(statistics.bytes_sent)
        self._received.inc(statistics.bytes_received)
        self._verifier_seconds.inc(statistics.verifier_seconds)
        self._link_seconds.inc(statistics.link_seconds)

    def count_answer(self, answer: Answer, outcome: str) -> None:
        """Count a finished answer."""
        self._requests.labels(outcome).inc()
        if isinstance(answer.error, VerifierUnreachable):
            self._link_faults.labels(answer.error.fault).inc()
        if not answer.queued_seconds:
            # It ended in the queue.
            return
        self._prompt_tokens.inc(len(answer.request.prompt))
        self._cached_tokens.inc(answer.cached_tokens)
        self._tokens.inc(answer.tokens)
        self._unverified.inc(answer.unverified_tokens)
        self._unverified_answers.inc(answer.unverified_tokens > 0)
        self._withdrawn.inc(answer.withdrawn_tokens)
        if answer.first_seconds:
            self._first_token_seconds.observe(answer.first_seconds)
        self._duration_seconds.observe(answer.seconds)

    def add_prefix_cache(self, cache: DraftPrefixCache) -> None:
        """Add the gauge of the draft's prefix cache."""
        self.add_gauge(
            "draft_prefix_cache_bytes", "Memory of the draft's KV caches of ended texts.", lambda: cache.used_bytes
        )


class ObservedPlanner:
    """A planner whose plans and outcomes are also reported and counted."""

    def __init__(self, planner: Planner, metrics: ServiceMetrics, reporter: AnswerReporter) -> None:
        self._planner = planner
        self._metrics = metrics
        self._reporter = reporter

    def plan(self, conditions: Conditions) -> Plan:
        plan = self._planner.plan(conditions)
        self._reporter.report_plan(plan)
        return plan

    def observe(self, outcome: Outcome) -> None:
        self._metrics.count_round(outcome)
        self._reporter.report_round(outcome)
        self._planner.observe(outcome)


class _LinkCollector(Collector):
    """Metrics of the connections to the verifier."""

    def __init__(self, client: VerifierClient) -> None:
        self._client = client

    def collect(self) -> Iterable[Metric]:
        meter, reachable = self._client.meter, self._client.link_state.reachable
        if reachable is not None:
            help_text = "1 if the last attempt reached a verifier."
            yield GaugeMetricFamily("flexspec_link_verifier_reachable", help_text, value=float(reachable))
        yield CounterMetricFamily("flexspec_link_connections", "Connections opened.", value=meter.opened)
        yield CounterMetricFamily("flexspec_link_retries", "Repeated attempts.", value=self._client.retries)
        if meter.rtt_seconds is not None:
            yield GaugeMetricFamily("flexspec_link_rtt_seconds", "Smoothed round-trip time.", value=meter.rtt_seconds)


class _SensorCollector(Collector):
    """Energy and probe readings; a sensor that the board does not have has no metric."""

    def __init__(self, sampler: GaugeSampler) -> None:
        self._sampler = sampler

    def collect(self) -> Iterable[Metric]:
        if self._sampler.joules:
            energy = CounterMetricFamily(
                "flexspec_board_energy_joules",
                "Energy drawn since the start, measured by sensors or modeled from the board's profile.",
                labels=["source"],
            )
            for source, joules in self._sampler.joules.items():
                energy.add_metric([source], joules)
            yield energy
        readings = self._sampler.surroundings() if self._sampler.surroundings else Surroundings()
        for field, (name, help_text) in SENSOR_GAUGES.items():
            value = getattr(readings, field)
            if value is not None:
                yield GaugeMetricFamily(name, help_text, value=float(value))
