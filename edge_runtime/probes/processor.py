"""Board model, processor load and clock frequency."""

from __future__ import annotations

import msgspec

from edge_runtime.probes.reader import ProbeError, Reader, decimal, excerpt, integer


class ProcessorLoad(msgspec.Struct, frozen=True):
    """All cores together.

    Attributes:
        model: board model as named by its maker; None if the firmware does not report it.
        cores: number of cores online.
        hertz: present clock, mean over the clock domains.
        most_hertz: maximum clock of the fastest domain.
        busy: utilization since the last reading, 0 to 1; None at the first.
        load: load average over one minute.
    """

    model: str | None
    cores: int | None
    hertz: float | None
    most_hertz: float | None
    busy: float | None
    load: float | None


class CpuTimes(msgspec.Struct, frozen=True):
    """CPU time from /proc/stat, in ticks since boot, all cores together."""

    busy: int
    idle: int
    cores: int


def parse_times(text: str) -> CpuTimes:
    """Parse /proc/stat. Raises ProbeError."""
    total, *others = text.splitlines() or [""]
    fields = total.split()
    if len(fields) < 6 or fields[0] != "cpu":
        raise ProbeError(f"not the CPU times of /proc/stat: {excerpt(total)}")
    # User time includes guest time; waiting for I/O counts as idle.
    user, nice, system, idle, waiting, *interrupts = [integer(field) for field in fields[1:9]]
    cores = sum(line.startswith("cpu") for line in others)
    return CpuTimes(user + nice + system + sum(interrupts), idle + waiting, cores)


def parse_load(text: str) -> float:
    """Parse /proc/loadavg: the one-minute load average. Raises ProbeError."""
    return decimal(text.partition(" ")[0])


def read_model(reader: Reader) -> str | None:
    """Board model from the device tree, or from the DMI data of a PC; None if there is neither."""
    return reader.text(f"{reader.sysfs}/firmware/devicetree/base/model") or reader.text(
        f"{reader.sysfs}/class/dmi/id/product_name"
    )


class ProcessorProbe:
    """Reads the processor; keeps the last CPU times for utilization."""

    def __init__(self) -> None:
        self._last: CpuTimes | None = None

    def read(self, reader: Reader) -> ProcessorLoad:
        """Read the processor; fields that the kernel does not report are None."""
        times = reader.parsed(f"{reader.procfs}/stat", parse_times)
        busy = None
        if times is not None and self._last is not None:
            spent = times.busy - self._last.busy
            total = spent + times.idle - self._last.idle
            # Idle time can decrease slightly when a core comes online.
            busy = min(1.0, max(0.0, spent / total)) if total > 0 else None
        self._last = times
        policies = f"{reader.sysfs}/devices/system/cpu/cpufreq"
        now, most = [], []
        for name in reader.names(policies, "policy"):
            now.append(reader.integer(f"{policies}/{name}/scaling_cur_freq"))
            most.append(reader.integer(f"{policies}/{name}/cpuinfo_max_freq"))
        known = [kilohertz for kilohertz in now if kilohertz is not None]
        return ProcessorLoad(
            model=read_model(reader),
            cores=times.cores if times is not None else None,
            hertz=1e3 * sum(known) / len(known) if known else None,
            most_hertz=max((1e3 * kilohertz for kilohertz in most if kilohertz is not None), default=None),
            busy=busy,
            load=reader.parsed(f"{reader.procfs}/loadavg", parse_load),
        )
