"""What the board measures about itself: one file per thing measured.

To add a probe: write a function that takes a `Reader` and returns a frozen struct, or None if this board has no such
sensor; in `snapshot.py`, add a field to `Snapshot` and a line to `Prober.__init__`; and add the sensor's files to a
board below `tests/edge_runtime/probes/boards/`. A missing sensor is not an error. A file that exists but does not parse
raises `ProbeError`, which is counted and shown, and never stops the service.
"""

from edge_runtime.probes.battery import read_supply
from edge_runtime.probes.firmware import read_firmware
from edge_runtime.probes.power import PowerProbe, PowerReading
from edge_runtime.probes.rapl import RaplProbe
from edge_runtime.probes.reader import Reader, RecordedPrograms, Roots, run_program
from edge_runtime.probes.snapshot import Prober, Snapshot, best_power
from edge_runtime.probes.tcp import ByteMeter, TcpInfo

__all__ = [
    "ByteMeter",
    "PowerProbe",
    "PowerReading",
    "Prober",
    "RaplProbe",
    "Reader",
    "RecordedPrograms",
    "Roots",
    "Snapshot",
    "TcpInfo",
    "best_power",
    "read_firmware",
    "read_supply",
    "run_program",
]
