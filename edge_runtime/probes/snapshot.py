"""All probes together: a snapshot of everything the board measures, with a report on each probe."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from edge_runtime.planning.board_profile import SensorLine
from edge_runtime.planning.plan import Surroundings
from edge_runtime.probes.battery import Supply, read_supply
from edge_runtime.probes.firmware import Firmware, read_firmware
from edge_runtime.probes.interface import Interface, InterfaceProbe
from edge_runtime.probes.modem import Modem, read_modem
from edge_runtime.probes.power import PowerProbe, PowerReading
from edge_runtime.probes.processor import ProcessorLoad, ProcessorProbe
from edge_runtime.probes.rapl import RaplProbe
from edge_runtime.probes.reader import Reader, Roots
from edge_runtime.probes.route import Address, Metering, Route, read_metering, read_route
from edge_runtime.probes.tcp import TcpInfo
from edge_runtime.probes.thermal import Thermal, read_thermal
from edge_runtime.probes.throttling import Throttling, ThrottlingProbe, merged, throttling_of
from edge_runtime.probes.wireless import Station, Wireless, read_stations, read_wireless

log = logging.getLogger(__name__)

# Reads one sensor; returns the value of a field of `Snapshot`, None if the board has no such sensor.
Probe = Callable[[Reader], Any]

# Seconds between two readings of files, and between two runs of a program, which costs a hundred times as much
# (measured: `python -m tests.benchmarks run probes`).
PERIOD_SECONDS = 5.0
PROGRAM_PERIOD_SECONDS = 60.0


class ProbeReport(msgspec.Struct, frozen=True):
    """Success and failure of one probe.

    Attributes:
        readings: number of readings since the start.
        failures: readings with at least one error; what could be read is reported all the same.
        errors: errors of the last reading. A missing sensor is not an error.
        seconds: duration of the last reading.
    """

    readings: int = 0
    failures: int = 0
    errors: list[str] = []
    seconds: float = 0.0


class Snapshot(msgspec.Struct, frozen=True):
    """Readings of all probes; None if this board has no such sensor.

    Attributes:
        at: Unix time of the readings.
        throttling: combined from all sources, `firmware` included.
        power: the best of `sensors`, battery discharge, firmware rails and `rapl`; see `best_power`.
        probes: report of each probe, by name.
    """

    at: float
    processor: ProcessorLoad | None
    thermal: Thermal | None
    throttling: Throttling | None
    supply: Supply | None
    power: PowerReading | None
    sensors: PowerReading | None
    rapl: PowerReading | None
    route: Route | None
    interfaces: list[Interface] | None
    wireless: list[Wireless] | None
    firmware: Firmware | None
    stations: list[Station] | None
    modem: Modem | None
    metering: Metering | None
    probes: dict[str, ProbeReport]

    @property
    def on_battery(self) -> bool | None:
        """Whether the board runs on battery, by its fuel gauge or a sensor in the battery's line; None if unknown."""
        gauge = self.supply.on_battery if self.supply is not None else None
        return gauge if gauge is not None or self.sensors is None else self.sensors.on_battery

    def surroundings(self, tcp: TcpInfo | None = None) -> Surroundings:
        """The readings that a planner uses.

        Args:
            tcp: the connection in use (`ByteMeter.info`).
        """
        supply, metering = self.supply, self.metering
        same_interface = metering is not None and self.route is not None and metering.interface == self.route.interface
        return Surroundings(
            rtt_seconds=tcp.rtt_seconds if tcp is not None else None,
            joules_left=supply.joules_left if supply is not None else None,
            watts=self.power.watts if self.power is not None else None,
            on_battery=self.on_battery,
            throttled=self.throttling.now if self.throttling is not None else None,
            celsius=self.thermal.celsius if self.thermal is not None else None,
            # The route may have moved to another interface since NetworkManager was queried.
            metered=metering.metered if metering is not None and same_interface else None,
            battery_percent=supply.percent if supply is not None else None,
        )


class Prober:
    """Reads all probes and keeps the latest snapshot.

    Attributes:
        latest: the last snapshot; None before the first.
        period: seconds between two snapshots of `run`.
        slots: the scheduled probes, by name.
    """

    def __init__(
        self,
        roots: Roots | None = None,
        period: float = PERIOD_SECONDS,
        program_period: float = PROGRAM_PERIOD_SECONDS,
        *,
        host: Address | None = None,
        lines: Mapping[str, SensorLine] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            roots: where to read; None for this machine.
            program_period: seconds between two runs of the same program.
            host: address of the verifier, whose route is reported; None for the default route.
            lines: what the board's current sensors measure; see `PowerProbe`.
            clock: monotonic seconds.
        """
        self.latest: Snapshot | None = None
        self.period = period
        self._clock = clock
        # `take` may be called from several threads, and some probes keep state between readings.
        self._lock = threading.Lock()
        files: dict[str, Probe] = {
            "processor": ProcessorProbe().read,
            "thermal": read_thermal,
            "throttling": ThrottlingProbe().read,
            "supply": read_supply,
            "sensors": PowerProbe(lines).read,
            "rapl": RaplProbe().read,
            "route": lambda reader: read_route(reader, host),
            "interfaces": InterfaceProbe(host).read,
            "wireless": read_wireless,
        }
        programs: dict[str, Probe] = {
            "firmware": read_firmware,
            "stations": read_stations,
            "modem": read_modem,
            "metering": lambda reader: read_metering(reader, host),
        }
        root = roots or Roots()
        self.slots = {name: ScheduledProbe(root, 0.0, probe) for name, probe in files.items()}
        self.slots |= {name: ScheduledProbe(root, program_period, probe) for name, probe in programs.items()}

    def take(self) -> Snapshot:
        """Read the probes that are due, synchronously: milliseconds without programs, up to seconds with them."""
        with self._lock:
            now = self._clock()
            readings = {name: slot.read(now) for name, slot in self.slots.items()}
            firmware: Firmware | None = readings["firmware"]
            flags = None if firmware is None or firmware.throttled is None else throttling_of(firmware.throttled)
            readings["throttling"] = merged([readings["throttling"], flags])
            power = best_power(readings["sensors"], readings["supply"], firmware, readings["rapl"])
            reports = {name: slot.report for name, slot in self.slots.items()}
            self.latest = Snapshot(at=time.time(), power=power, probes=reports, **readings)
            return self.latest

    async def run(self) -> None:
        """Take a snapshot in a worker thread every period, until cancelled. New errors of a probe are logged."""
        logged: dict[str, list[str]] = {}
        while True:
            snapshot = await asyncio.to_thread(self.take)
            for name, report in snapshot.probes.items():
                if report.errors and report.errors != logged.get(name):
                    log.info("probe %s: %s", name, "; ".join(report.errors))
                logged[name] = report.errors or logged.get(name, [])
            await asyncio.sleep(self.period)


def best_power(
    sensors: PowerReading | None, supply: Supply | None, firmware: Firmware | None, rapl: PowerReading | None
) -> PowerReading | None:
    """The measurement that covers the whole board, or else the one that misses least of it."""
    if sensors is not None and sensors.watts is not None:
        return sensors
    if supply is not None and supply.watts is not None:
        return PowerReading(supply.watts, True, "battery", [])
    if firmware is not None and firmware.power is not None:
        return firmware.power
    return rapl or sensors


class ScheduledProbe:
    """A probe with its period, its last value and its report.

    Attributes:
        probe: reads the sensor; returns None if there is none.
        period: seconds for which a reading is valid; 0 reads every time.
        report: success and failure so far.
    """

    def __init__(self, roots: Roots, period: float, probe: Probe) -> None:
        self.report = ProbeReport()
        self._roots = roots
        self.period = period
        self.probe = probe
        self._due = float("-inf")
        self._value: Any = None

    def read(self, now: float) -> Any:
        """Read the probe if it is due, else return its last value."""
        if now < self._due:
            return self._value
        self._due = now + self.period
        reader = Reader(self._roots, now)
        started = time.perf_counter()
        try:
            self._value = self.probe(reader)
        except Exception as error:
            # A bug in a probe must not stop the service: count it like a broken sensor.
            self._value = None
            reader.errors.append(f"unexpected {type(error).__name__}: {error}; please report it")
        self.report = ProbeReport(
            self.report.readings + 1,
            self.report.failures + bool(reader.errors),
            reader.errors,
            time.perf_counter() - started,
        )
        return self._value
