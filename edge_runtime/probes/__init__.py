"""What the board measures about itself: one file per thing measured.

To add a probe: write a function that takes a `Reader` and returns a frozen struct, or None if this board has no such
sensor; add a field to `Snapshot` and a line to `Prober.__init__` in `snapshot.py`; and add the sensor's files to a
board below `tests/edge_runtime/probes/boards/`. A missing sensor is not an error. A file that exists but does not parse
raises `ProbeError`, which is counted and shown, and never stops the service.
"""
