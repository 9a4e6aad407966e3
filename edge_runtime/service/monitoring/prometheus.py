"""What Prometheus is told: requests, speculation (vLLM's names behind `flexspec_`), the link, the board's sensors."""

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
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_runtime.decoding import GenerationStatistics
from edge_runtime.ngram_cache import NgramCache
from edge_runtime.planning.plan import Conditions, Outcome, Plan, Planner, Surroundings
from edge_runtime.protocol.errors import VerifierUnreachable
from edge_runtime.service.admission import AdmissionQueue
from edge_runtime.service.answer import Answer
from edge_runtime.service.monitoring.gauges import GaugeSampler
from edge_runtime.service.monitoring.reporter import AnswerReporter
from edge_runtime.verifier import VerifierClient

FIRST_TEXT_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
DURATION_BUCKETS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)

# Fields of `Surroundings`, and what they are called.
BOARD_GAUGES = {
    "watts": ("flexspec_board_power_watts", "What the board draws, by its own sensors."),
    "joules_left": ("flexspec_board_battery_joules", "In the battery."),
    "battery_percent": ("flexspec_board_battery_percent", "Charge of the battery."),
    "on_battery": ("flexspec_board_on_battery", "1 where it lives on the battery."),
    "celsius": ("flexspec_board_temperature_celsius", "Of the processor."),
    "throttled": ("flexspec_board_throttled", "1 where heat or voltage slow it down."),
    "metered": ("flexspec_link_metered", "1 where bytes on the link are paid for."),
}

# Why a round went without the board's draft.
PLANNED = "planned"  # the planner found that the cloud alone is better
SWITCHED_OFF = "switched_off"  # the request said so
DRAFT_FAILED = "draft_failed"  # and the cloud went on alone
NO_ROOM = "no_room"  # the text is over the draft's context, or has one token left


class ServiceMetrics:
    """Counts, from the start of the process. Everything on the event loop.

    Attributes:
        plan: that of the last planned round.
        rtt_seconds: the link's round-trip time in it; None if nobody knew.
    """

    def __init__(self, queue: AdmissionQueue, client: VerifierClient, pulse: GaugeSampler) -> None:
        # When a counter began is of no use here, and would double the page.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self._registry = CollectorRegistry()
        self._drafted_bytes = self._accepted_total = 0
        self.plan: Plan | None = None
        self.rtt_seconds: float | None = None
        self._queue, self._client = queue, client

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"flexspec_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"flexspec_{name}", text, registry=registry).set_function(value)

        gauge("requests_running", "Answers that are being written.", lambda: queue.running)
        gauge("requests_waiting", "Requests that wait for a place.", lambda: queue.waiting)
        self._requests = counter(
            "requests", "Requests for an answer, by how they ended: its finish reason or an error's code.", ["outcome"]
        )
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._tokens = counter("generation_tokens", "Tokens of answers.")
        self._first = Histogram(
            "flexspec_time_to_first_token_seconds",
            "From a request to its first text, waiting included.",
            buckets=FIRST_TEXT_BUCKETS,
            registry=registry,
        )
        self._duration = Histogram(
            "flexspec_request_duration_seconds",
            "From a request to the end of its answer, waiting included.",
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self._drafts = counter("spec_decode_num_drafts", "Rounds with a draft.")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens that the board drafted.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens that the target accepted.")
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Of these, those at an index of the draft.", ["position"]
        )
        self._ready = counter("spec_decode_num_ready_tokens", "Drafted tokens that had been drafted ahead.")
        self._siblings = counter("spec_decode_num_sibling_hits", "Rounds in which a sibling saved a token.")
        self._unverified = counter("unverified_tokens", "Tokens at the end of answers that no verifier has seen.")
        self._withdrawn = counter(
            "withdrawn_tokens", "Tokens that the draft said alone, and that the target corrected later."
        )
        self._cloud_rounds = counter("cloud_rounds", "Rounds without a draft, by reason.", ["reason"])
        self._sent = counter("link_sent_bytes", "TCP payload to the verifier, in rounds.")
        self._received = counter("link_received_bytes", "TCP payload from the verifier, in rounds.")
        gauge(
            "link_bytes_per_accepted_token",
            "TCP payload of rounds with a draft, both ways, per accepted token; NaN before there was one.",
            lambda: self._drafted_bytes / self._accepted_total if self._accepted_total else float("nan"),
        )
        self._draft_seconds = counter("draft_seconds", "Time spent drafting, prefilling included.")
        self._verifier_seconds = counter("verifier_seconds", "Time in the verifier, by its own report.")
        self._link_seconds = counter(
            "link_seconds", "The rest of the time between sending rounds and their last frame."
        )
        self._faults = counter("link_faults", "Answers that ended for want of a verifier, by what failed.", ["fault"])
        registry.register(_Link(client))
        registry.register(_Board(pulse))
        ProcessCollector(registry=registry)

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)

    def status(self) -> str:
        """What the service does now, in a line without any text of prompts."""
        facts = [
            f"K={self.plan.draft} n={self.plan.own}" if self.plan else "no round yet",
            *([f"rtt {1e3 * self.rtt_seconds:.0f} ms"] if self.rtt_seconds is not None else []),
            f"{self._queue.running} answers",
            *([f"{self._queue.waiting} waiting"] if self._queue.waiting else []),
        ]
        return ", ".join(facts)

    def add_outcome(self, outcome: Outcome) -> None:
        """Counts one planned round."""
        self.plan, self.rtt_seconds = outcome.plan, self._client.meter.rtt_seconds
        if outcome.drafted:
            self._drafts.inc()
            self._draft_tokens.inc(outcome.drafted)
            self._accepted.inc(outcome.accepted)
            for index in range(outcome.accepted):
                self._accepted_at.labels(str(index)).inc()
            self._ready.inc(outcome.ready)
            self._siblings.inc(outcome.sibling > 0)
        else:
            self._cloud_rounds.labels(NO_ROOM if outcome.plan.draft else PLANNED).inc()
        self._accepted_total += outcome.accepted
        self._drafted_bytes += (outcome.sent + outcome.received) * (outcome.drafted > 0)
        self._sent.inc(outcome.sent)
        self._received.inc(outcome.received)
        self._draft_seconds.inc(outcome.draft_seconds)
        self._verifier_seconds.inc(outcome.verifier_seconds)
        self._link_seconds.inc(max(0.0, outcome.exchange_seconds - outcome.verifier_seconds))

    def add_memory(self, memory: NgramCache) -> None:
        """From now on `memory` is among them."""
        tokens = Gauge("flexspec_memory_tokens", "Of verified text that help the draft guess.", registry=self._registry)
        tokens.set_function(lambda: memory.tokens)
        failures = Gauge(
            "flexspec_memory_failures",
            "Times that the disk failed it, damaged texts included.",
            registry=self._registry,
        )
        failures.set_function(lambda: memory.failures)

    def add_alone(self, statistics: GenerationStatistics, reason: str) -> None:
        """Counts what the cloud wrote without a draft, or without one any more: no planner hears of such rounds."""
        self._cloud_rounds.labels(reason).inc(statistics.rounds)
        self._sent.inc(statistics.bytes_sent)
        self._received.inc(statistics.bytes_received)
        self._verifier_seconds.inc(statistics.verifier_seconds)
        self._link_seconds.inc(statistics.link_seconds)

    def add_answer(self, answer: Answer, outcome: str) -> None:
        """Counts one answer, however it ended."""
        self._requests.labels(outcome).inc()
        if isinstance(answer.error, VerifierUnreachable):
            self._faults.labels(answer.error.fault).inc()
        if not answer.queued_seconds:
            # It never had its turn.
            return
        self._prompt_tokens.inc(len(answer.request.prompt))
        self._tokens.inc(answer.tokens)
        self._unverified.inc(answer.unverified_tokens)
        self._withdrawn.inc(answer.withdrawn_tokens)
        if answer.first_seconds:
            self._first.observe(answer.first_seconds)
        self._duration.observe(answer.seconds)


class ObservedPlanner:
    """A planner whose rounds are counted, and told."""

    def __init__(self, planner: Planner, metrics: ServiceMetrics, reporter: AnswerReporter) -> None:
        self._planner = planner
        self._metrics = metrics
        self._reporter = reporter

    def plan(self, conditions: Conditions) -> Plan:
        plan = self._planner.plan(conditions)
        self._reporter.plan(plan)
        return plan

    def observe(self, outcome: Outcome) -> None:
        self._metrics.add_outcome(outcome)
        self._reporter.observe(outcome)
        self._planner.observe(outcome)


class _Link(Collector):
    """The connections to the verifier, as they are when somebody asks."""

    def __init__(self, client: VerifierClient) -> None:
        self._client = client

    def collect(self) -> Iterable[Metric]:
        meter = self._client.meter
        yield CounterMetricFamily("flexspec_link_connections", "Connections opened.", value=meter.opened)
        yield CounterMetricFamily(
            "flexspec_link_retries", "Attempts that repeated another.", value=self._client.retries
        )
        if meter.rtt_seconds is not None:
            yield GaugeMetricFamily("flexspec_link_rtt_seconds", "Smoothed round-trip time.", value=meter.rtt_seconds)


class _Board(Collector):
    """What the probes know, and what it drew; a sensor that the board does not have has no metric."""

    def __init__(self, pulse: GaugeSampler) -> None:
        self._pulse = pulse

    def collect(self) -> Iterable[Metric]:
        if self._pulse.joules:
            energy = CounterMetricFamily(
                "flexspec_board_energy_joules",
                "Drawn since the start, by sensors, or as modelled from the board's profile.",
                labels=["source"],
            )
            for source, joules in self._pulse.joules.items():
                energy.add_metric([source], joules)
            yield energy
        known = self._pulse.surroundings() if self._pulse.surroundings else Surroundings()
        for field, (name, text) in BOARD_GAUGES.items():
            value = getattr(known, field)
            if value is not None:
                yield GaugeMetricFamily(name, text, value=float(value))
