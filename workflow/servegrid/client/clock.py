"""From the kernel's arrival stamps to CLOCK_MONOTONIC.

The kernel stamps packets with CLOCK_REALTIME, which time servers slew and step. Offsets taken
before, during and after a load carry its stamps over to the clock of all other times.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_TRIES = 16


@dataclass(frozen=True)
class Offset:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC, in ns, at one moment of CLOCK_REALTIME."""

    realtime_ns: int
    offset_ns: int


def read_offset() -> Offset:
    """The offset now: of several readings the one with the least time around it."""
    readings = []
    for _ in range(_TRIES):
        before = time.monotonic_ns()
        realtime = time.time_ns()
        after = time.monotonic_ns()
        readings.append((after - before, realtime, realtime - (before + after) // 2))
    _, realtime, offset = min(readings)
    return Offset(realtime, offset)


@dataclass
class OffsetLog:
    """Offsets in the order in which they were taken; the first with the log itself."""

    offsets: list[Offset] = field(default_factory=lambda: [read_offset()])

    def take(self) -> None:
        self.offsets.append(read_offset())

    def to_monotonic(self, realtime_ns: Sequence[int]) -> list[int]:
        """Stamps of CLOCK_REALTIME as CLOCK_MONOTONIC, the offset interpolated in between."""
        base, first = self.offsets[0].realtime_ns, self.offsets[0].offset_ns
        # Whole ns since the epoch have more digits than a double holds: only differences do.
        known_at = [each.realtime_ns - base for each in self.offsets]
        drift = [each.offset_ns - first for each in self.offsets]
        stamps = np.asarray(realtime_ns, dtype=np.int64)
        moved = np.rint(np.interp(stamps - base, known_at, drift)).astype(np.int64)
        converted: list[int] = (stamps - first - moved).tolist()
        return converted
