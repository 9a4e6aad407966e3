"""All probes together: what the board knows of itself at one moment, and how well each probe did."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from edge_runtime.planning.plan import Surroundings
from edge_runtime.probes.battery import Supply, read_supply
from edge_runtime.probes.firmware import Firmware, read_firmware
from edge_runtime.probes.interface import Interface, Interfaces
from edge_runtime.probes.modem import Modem, read_modem
from edge_runtime.probes.power import Power, read_sensors
from edge_runtime.probes.processor import Processor, Processors
from edge_runtime.probes.rapl import Rapl
from edge_runtime.probes.roots import Reader, Roots
from edge_runtime.probes.route import Address, Metering, Route, read_metering, read_route
from edge_runtime.probes.tcp import TcpInfo
from edge_runtime.probes.thermal import Thermal, read_thermal
from edge_runtime.probes.throttling import Throttles, Throttling, merged, throttling_of
from edge_runtime.probes.wireless import Station, Wireless, read_stations, read_wireless

T = TypeVar("T")

# Seconds between two readings of files, and between two runs of programs, which cost a hundred times as much.
PERIOD = 5.0
PROGRAM_PERIOD = 60.0


class ProbeReport(msgspec.Struct, frozen=True):
    """How a probe does.

    Attributes:
        readings: since the start.
        failures: readings in which something was broken. What was not is reported all the same.
        errors: what was broken at the last reading. A sensor that does not exist is no error.
        seconds: that the last reading took.
    """

    readings: int = 0
    failures: int = 0
    errors: list[str] = []
    seconds: float = 0.0


class Snapshot(msgspec.Struct, frozen=True):
    """Everything that the probes know; None where this board has no such sensor.

    Attributes:
        at: Unix time of the readings.
        throttling: of all sources, `firmware` included.
        power: the best there is of `sensors`, the battery's discharge, the firmware's rails and `rapl`.
        probes: how each did, by name.
    """

    at: float
    processor: Processor | None
    thermal: Thermal | None
    throttling: Throttling | None
    supply: Supply | None
    power: Power | None
    sensors: Power | None
    rapl: Power | None
    route: Route | None
    interfaces: list[Interface] | None
    wireless: list[Wireless] | None
    firmware: Firmware | None
    stations: list[Station] | None
    modem: Modem | None
    metering: Metering | None
    probes: dict[str, ProbeReport]

    def surroundings(self, tcp: TcpInfo | None = None) -> Surroundings:
        """What a planner is told.

        Args:
            tcp: of the connection in use (`ByteMeter.info`).
        """
        supply, metering = self.supply, self.metering
        same_way = metering is not None and self.route is not None and metering.interface == self.route.interface
        return Surroundings(
            rtt_seconds=tcp.rtt_seconds if tcp is not None else None,
            joules_left=supply.joules_left if supply is not None else None,
            watts=self.power.watts if self.power is not None else None,
            on_battery=supply.on_battery if supply is not None else None,
            throttled=self.throttling.now if self.throttling is not None else None,
            celsius=self.thermal.celsius if self.thermal is not None else None,
            # The route may have moved to another interface since NetworkManager was asked.
            metered=metering.metered if metering is not None and same_way else None,
            battery_percent=supply.percent if supply is not None else None,
        )


class Prober:
    """Reads all probes, and keeps what they said last.

    Attributes:
        latest: the last snapshot; None before the first.
        period: seconds between two snapshots of `run`.
        slots: the probes, by name.
    """

    def __init__(
        self,
        roots: Roots | None = None,
        period: float = PERIOD,
        program_period: float = PROGRAM_PERIOD,
        *,
        host: Address | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            roots: where to read; None for this machine.
            program_period: seconds between two runs of the same program.
            host: of the verifier: its route counts; None for the default route.
            clock: seconds that only go forward.
        """
        self.latest: Snapshot | None = None
        self.period = period
        self._clock = clock
        # `take` may be called from several threads, and probes remember things.
        self._lock = threading.Lock()
        self._roots = roots or Roots()
        self.slots: dict[str, Slot[Any]] = {}
        self._processor = self._add("processor", Processors().read)
        self._thermal = self._add("thermal", read_thermal)
        self._throttling = self._add("throttling", Throttles().read)
        self._supply = self._add("supply", read_supply)
        self._sensors = self._add("sensors", read_sensors)
        self._rapl = self._add("rapl", Rapl().read)
        self._route = self._add("route", lambda reader: read_route(reader, host))
        self._interfaces = self._add("interfaces", Interfaces(host).read)
        self._wireless = self._add("wireless", read_wireless)
        self._firmware = self._add("firmware", read_firmware, program_period)
        self._stations = self._add("stations", read_stations, program_period)
        self._modem = self._add("modem", read_modem, program_period)
        self._metering = self._add("metering", lambda reader: read_metering(reader, host), program_period)

    def take(self) -> Snapshot:
        """Reads what is due, here and now: milliseconds without programs, up to seconds with them."""
        with self._lock:
            now = self._clock()
            supply = self._supply.read(now)
            sensors = self._sensors.read(now)
            rapl = self._rapl.read(now)
            firmware = self._firmware.read(now)
            flags = None if firmware is None or firmware.throttled is None else throttling_of(firmware.throttled)
            self.latest = Snapshot(
                at=time.time(),
                processor=self._processor.read(now),
                thermal=self._thermal.read(now),
                throttling=merged([self._throttling.read(now), flags]),
                supply=supply,
                power=best_power(sensors, supply, firmware, rapl),
                sensors=sensors,
                rapl=rapl,
                route=self._route.read(now),
                interfaces=self._interfaces.read(now),
                wireless=self._wireless.read(now),
                firmware=firmware,
                stations=self._stations.read(now),
                modem=self._modem.read(now),
                metering=self._metering.read(now),
                probes={name: slot.report for name, slot in self.slots.items()},
            )
            return self.latest

    async def run(self) -> None:
        """Takes snapshots in a worker thread, one each period, until it is cancelled."""
        while True:
            await asyncio.to_thread(self.take)
            await asyncio.sleep(self.period)

    def _add(self, name: str, probe: Callable[[Reader], T | None], period: float = 0.0) -> Slot[T]:
        self.slots[name] = slot = Slot(self._roots, period, probe)
        return slot


def best_power(
    sensors: Power | None, supply: Supply | None, firmware: Firmware | None, rapl: Power | None
) -> Power | None:
    """Of several measurements, that of the whole board; else the one that misses least."""
    if sensors is not None and sensors.watts is not None:
        return sensors
    if supply is not None and supply.watts is not None:
        return Power(supply.watts, True, "battery", [])
    if firmware is not None and firmware.power is not None:
        return firmware.power
    return rapl


class Slot(Generic[T]):
    """A probe, what it said last, and how it does.

    Attributes:
        probe: reads what it measures; None where there is nothing to measure.
        period: seconds for which a reading is good; 0 reads every time.
        report: how it does.
    """

    def __init__(self, roots: Roots, period: float, probe: Callable[[Reader], T | None]) -> None:
        self.report = ProbeReport()
        self._roots = roots
        self.period = period
        self.probe = probe
        self._due = float("-inf")
        self._value: T | None = None

    def read(self, now: float) -> T | None:
        """Reads the probe if it is due; else what it said last."""
        if now < self._due:
            return self._value
        self._due = now + self.period
        reader = Reader(self._roots, now)
        started = time.perf_counter()
        try:
            self._value = self.probe(reader)
        except Exception as error:
            # No sensor is worth the service: a mistake of ours is counted like one of the board's.
            self._value = None
            reader.errors.append(f"unexpected {type(error).__name__}: {error}; please report it")
        self.report = ProbeReport(
            self.report.readings + 1,
            self.report.failures + bool(reader.errors),
            reader.errors,
            time.perf_counter() - started,
        )
        return self._value
