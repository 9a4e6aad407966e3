"""Throttling: whether heat or a weak supply slows the processor down."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from edge_runtime.probes.firmware import SINCE_BOOT, UNDER_VOLTAGE, flags_file, parse_throttled, reasons
from edge_runtime.probes.reader import Reader

# Cooling devices of the kernel that lower the clock: `cpufreq-cpu0` and the older `thermal-cpufreq-0` on boards,
# `Processor` on PCs. Fans are cooling devices too but do not throttle.
THROTTLING_DEVICES = ("cpufreq-", "thermal-cpufreq-", "Processor")


class Throttling(msgspec.Struct, frozen=True):
    """Whether and why the processor is throttled.

    Attributes:
        now: whether it is throttled; None if only under-voltage is known, which does not throttle by itself.
        reasons: present reasons, under-voltage included.
        since_boot: reasons that occurred since boot, if the board records them.
    """

    now: bool | None
    reasons: list[str]
    since_boot: list[str]


class ThrottlingProbe:
    """Reads all sources of throttling; keeps the throttle counters of the last reading."""

    def __init__(self) -> None:
        self._last: int | None = None

    def read(self, reader: Reader) -> Throttling | None:
        """Read all sources; None if there is none."""
        return merged([self._firmware(reader), self._cooling(reader), self._counters(reader)])

    def _firmware(self, reader: Reader) -> Throttling | None:
        path = flags_file(reader)
        flags = None if path is None else reader.parsed(path, parse_throttled)
        if flags is not None:
            return throttling_of(flags)
        # Without that file a Raspberry Pi still reports under-voltage, as a hwmon alarm.
        classes = f"{reader.sysfs}/class/hwmon"
        for name in reader.names(classes):
            if reader.text(f"{classes}/{name}/name") == "rpi_volt":
                alarm = reader.integer(f"{classes}/{name}/in0_lcrit_alarm")
                if alarm is not None:
                    return Throttling(None, reasons(UNDER_VOLTAGE if alarm else 0), [])
        return None

    def _cooling(self, reader: Reader) -> Throttling | None:
        classes = f"{reader.sysfs}/class/thermal"
        states: dict[str, int] = {}
        for name in reader.names(classes, "cooling_device"):
            kind = reader.text(f"{classes}/{name}/type") or ""
            if kind.startswith(THROTTLING_DEVICES):
                state = reader.integer(f"{classes}/{name}/cur_state")
                if state is not None:
                    states[kind] = max(state, states.get(kind, 0))
        active = [kind for kind, state in states.items() if state > 0]
        return Throttling(bool(active), [f"cooling by {kind}" for kind in active], []) if states else None

    def _counters(self, reader: Reader) -> Throttling | None:
        cores = f"{reader.sysfs}/devices/system/cpu"
        counts = [
            reader.integer(f"{cores}/{name}/thermal_throttle/package_throttle_count")
            for name in reader.names(cores, "cpu")
            if name[3:].isdigit()
        ]
        known = [count for count in counts if count is not None]
        if not known:
            return None
        total, last = sum(known), self._last
        self._last = total
        hot = last is not None and total > last
        return Throttling(hot, ["processor too hot"] if hot else [], ["processor too hot"] if total else [])


def throttling_of(flags: int) -> Throttling:
    """Interpret the firmware's flags."""
    return Throttling(bool(flags & ~UNDER_VOLTAGE & 0xF), reasons(flags & 0xF), reasons(flags >> SINCE_BOOT & 0xF))


def merged(sources: Iterable[Throttling | None]) -> Throttling | None:
    """Combine several sources; None if all are None."""
    known = [throttling for throttling in sources if throttling is not None]
    if not known:
        return None
    answers = {throttling.now for throttling in known}
    return Throttling(
        True if True in answers else False if False in answers else None,
        list(dict.fromkeys(reason for throttling in known for reason in throttling.reasons)),
        list(dict.fromkeys(reason for throttling in known for reason in throttling.since_boot)),
    )
