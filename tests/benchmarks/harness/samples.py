"""The file of a run: a first line about machine, versions and commit, then one line for each sample, in JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.protocol.errors import InputError

ROOT = Path(__file__).parents[3]
# Packages whose versions change figures.
PACKAGES = ("onnxruntime", "torch", "transformers", "httpx", "granian", "numpy")


class Sample(msgspec.Struct, frozen=True):
    """Values of one repetition of a scenario, by the names of their quantities."""

    scenario: str
    repetition: int
    values: dict[str, float]


class RunInfo(msgspec.Struct, frozen=True):
    """Where samples come from; only samples of equal runs are mixed.

    Attributes:
        commit: of the working tree; ends with `+` if it has changes.
        machine: processor, cores, GPUs and system.
    """

    benchmark: str
    commit: str
    machine: str
    python: str
    packages: dict[str, str]

    @classmethod
    def of_this_machine(cls, benchmark: str) -> RunInfo:
        """Describe a run that begins now."""
        return cls(
            benchmark,
            _commit(),
            ", ".join([_processor(), f"{os.cpu_count()} cores", *_gpus(), platform.system()]),
            platform.python_version(),
            {name: importlib.metadata.version(name) for name in PACKAGES},
        )


@dataclass
class SampleFile:
    """The samples of one run, in memory and on disk.

    Attributes:
        path: of the file; appended to after every sample.
        info: of the run.
        started: date and time of its beginning.
        samples: all so far.
    """

    path: Path
    info: RunInfo
    started: str
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def create(cls, path: Path, info: RunInfo) -> SampleFile:
        """Begin a new file, in place of what is at `path`."""
        file = cls(path, info, datetime.now(UTC).isoformat(timespec="minutes"))
        file.save()
        return file

    @classmethod
    def load(cls, path: Path) -> SampleFile:
        """Read a file.

        Raises:
            InputError: it cannot be read, or is no such file.
        """
        try:
            first, *lines = path.read_text(encoding="utf-8").splitlines()
            head: dict[str, Any] = json.loads(first)
            started = head.pop("started")
            samples = [msgspec.json.decode(line, type=Sample) for line in _complete(lines)]
            return cls(path, msgspec.convert(head, RunInfo), started, samples)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} does not hold samples of a benchmark ({error}): run it first") from None

    def save(self) -> None:
        """Write everything anew, without a line that a kill has cut."""
        first = json.dumps({"started": self.started, **msgspec.to_builtins(self.info)})
        lines = [first, *(msgspec.json.encode(sample).decode() for sample in self.samples)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def add(self, sample: Sample) -> None:
        """Append a sample, on disk as well."""
        self.samples.append(sample)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(msgspec.json.encode(sample).decode() + "\n")

    def values(self) -> dict[tuple[str, str], list[float]]:
        """Return the values of all samples by scenario and quantity, in the order of repetitions."""
        by_quantity: dict[tuple[str, str], list[float]] = defaultdict(list)
        for sample in sorted(self.samples, key=lambda sample: sample.repetition):
            for name, value in sample.values.items():
                by_quantity[sample.scenario, name].append(value)
        return by_quantity


def _complete(lines: Sequence[str]) -> Sequence[str]:
    """Leave out a last line that a kill has cut."""
    return lines[:-1] if lines and not lines[-1].endswith("}") else lines


def _commit() -> str:
    # A copy of the tree on another machine may lack its history.
    if named := os.environ.get("BENCHMARK_COMMIT"):
        return named
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _gpus() -> list[str]:
    """Names of this machine's NVIDIA GPUs."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, platform.machine())
