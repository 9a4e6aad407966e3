"""Whether the board runs slower than it could, for heat or for want of power."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from edge_runtime.probes.firmware import SINCE_BOOT, UNDER_VOLTAGE, flags_file, parse_throttled, reasons
from edge_runtime.probes.roots import Reader

# The kernel's own cooling by a slower clock: `cpufreq-cpu0` and the older `thermal-cpufreq-0` on boards, `Processor`
# on PCs. Fans cool too, and slow nothing.
SLOWING = ("cpufreq-", "thermal-cpufreq-", "Processor")


class Throttling(msgspec.Struct, frozen=True):
    """Whether and why the processor is held back.

    Attributes:
        now: None where only low voltage can be told, which slows nothing by itself.
        reasons: by what, and low voltage.
        since_boot: what of this has been so since boot, where the board remembers.
    """

    now: bool | None
    reasons: list[str]
    since_boot: list[str]


class Throttles:
    """Remembers how often processors had throttled at the last reading."""

    def __init__(self) -> None:
        self._last: int | None = None

    def read(self, reader: Reader) -> Throttling | None:
        """None if nothing tells."""
        return merged([self._firmware(reader), self._cooling(reader), self._counters(reader)])

    def _firmware(self, reader: Reader) -> Throttling | None:
        path = flags_file(reader)
        flags = None if path is None else reader.parsed(path, parse_throttled)
        if flags is not None:
            return throttling_of(flags)
        # Without that file a Raspberry Pi still shows low voltage, as an alarm.
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
            if kind.startswith(SLOWING):
                state = reader.integer(f"{classes}/{name}/cur_state")
                if state is not None:
                    states[kind] = max(state, states.get(kind, 0))
        slowing = [kind for kind, state in states.items() if state > 0]
        return Throttling(bool(slowing), [f"cooling by {kind}" for kind in slowing], []) if states else None

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
    """What the firmware's flags mean."""
    return Throttling(bool(flags & ~UNDER_VOLTAGE & 0xF), reasons(flags & 0xF), reasons(flags >> SINCE_BOOT & 0xF))


def merged(several: Iterable[Throttling | None]) -> Throttling | None:
    """What several sources know together; None if none knows anything."""
    known = [throttling for throttling in several if throttling is not None]
    if not known:
        return None
    answers = {throttling.now for throttling in known}
    return Throttling(
        True if True in answers else False if False in answers else None,
        list(dict.fromkeys(reason for throttling in known for reason in throttling.reasons)),
        list(dict.fromkeys(reason for throttling in known for reason in throttling.since_boot)),
    )
