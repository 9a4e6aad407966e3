"""Which board this is, and how busy and how fast its processor runs."""

from __future__ import annotations

import msgspec

from edge_runtime.probes.roots import ProbeError, Reader, decimal, integer, shown


class Processor(msgspec.Struct, frozen=True):
    """All cores together.

    Attributes:
        model: of the board, as its maker calls it; None where the firmware does not say.
        cores: that are online.
        hertz: mean over the clock domains, now.
        most_hertz: of the fastest domain, by design.
        busy: share of the time since the last reading that cores were busy, 0 to 1; None at the first.
        load: mean number of runnable tasks over a minute.
    """

    model: str | None
    cores: int | None
    hertz: float | None
    most_hertz: float | None
    busy: float | None
    load: float | None


class Times(msgspec.Struct, frozen=True):
    """Of /proc/stat, in ticks since boot, all cores together."""

    busy: int
    idle: int
    cores: int


def parse_times(text: str) -> Times:
    """/proc/stat. Raises ProbeError."""
    total, *others = text.splitlines() or [""]
    fields = total.split()
    if len(fields) < 6 or fields[0] != "cpu":
        raise ProbeError(f"not the times of the processor: {shown(total)}")
    # Guest time is part of user time; waiting for a disk is idle.
    user, nice, system, idle, waiting, *interrupts = [integer(field) for field in fields[1:9]]
    cores = sum(line.startswith("cpu") for line in others)
    return Times(user + nice + system + sum(interrupts), idle + waiting, cores)


def parse_load(text: str) -> float:
    """/proc/loadavg: the mean over a minute. Raises ProbeError."""
    return decimal(text.partition(" ")[0])


def read_model(reader: Reader) -> str | None:
    """From the device tree, or from the firmware of a PC."""
    return reader.text(f"{reader.sysfs}/firmware/devicetree/base/model") or reader.text(
        f"{reader.sysfs}/class/dmi/id/product_name"
    )


class Processors:
    """Remembers the times of the last reading."""

    def __init__(self) -> None:
        self._last: Times | None = None

    def read(self, reader: Reader) -> Processor:
        """None in a field where the kernel does not say."""
        times = reader.parsed(f"{reader.procfs}/stat", parse_times)
        busy = None
        if times is not None and self._last is not None:
            spent = times.busy - self._last.busy
            total = spent + times.idle - self._last.idle
            # Idle time is known to go back a little when a core comes online.
            busy = min(1.0, max(0.0, spent / total)) if total > 0 else None
        self._last = times
        policies = f"{reader.sysfs}/devices/system/cpu/cpufreq"
        now, most = [], []
        for name in reader.names(policies, "policy"):
            now.append(reader.integer(f"{policies}/{name}/scaling_cur_freq"))
            most.append(reader.integer(f"{policies}/{name}/cpuinfo_max_freq"))
        known = [kilohertz for kilohertz in now if kilohertz is not None]
        return Processor(
            read_model(reader),
            times.cores if times is not None else None,
            1e3 * sum(known) / len(known) if known else None,
            max((1e3 * kilohertz for kilohertz in most if kilohertz is not None), default=None),
            busy,
            reader.parsed(f"{reader.procfs}/loadavg", parse_load),
        )
