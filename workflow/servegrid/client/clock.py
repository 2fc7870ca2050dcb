"""Converts the kernel's arrival timestamps to CLOCK_MONOTONIC.

The kernel stamps packets with CLOCK_REALTIME, which time servers slew and step. All other times
are CLOCK_MONOTONIC. The offset between the two clocks is sampled before, during and after a wave,
and interpolated in between.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_READINGS = 16


@dataclass(frozen=True)
class ClockOffset:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC, in ns, at one moment of CLOCK_REALTIME."""

    realtime_ns: int
    offset_ns: int


def read_offset() -> ClockOffset:
    """Read the offset now. Of several readings, the one that took the least time is used."""
    readings = []
    for _ in range(_READINGS):
        before = time.monotonic_ns()
        realtime = time.time_ns()
        after = time.monotonic_ns()
        readings.append((after - before, realtime, realtime - (before + after) // 2))
    _, realtime, offset = min(readings)
    return ClockOffset(realtime, offset)


@dataclass
class OffsetLog:
    """Offsets in the order of their sampling. Creating the log samples the first one."""

    offsets: list[ClockOffset] = field(default_factory=lambda: [read_offset()])

    def sample(self) -> None:
        self.offsets.append(read_offset())

    def to_monotonic(self, realtime_ns: Sequence[int]) -> list[int]:
        """Convert CLOCK_REALTIME timestamps to CLOCK_MONOTONIC, by linear interpolation."""
        base, first = self.offsets[0].realtime_ns, self.offsets[0].offset_ns
        # A double cannot hold ns since the epoch exactly, but it can hold differences.
        sampled_at = [offset.realtime_ns - base for offset in self.offsets]
        drift = [offset.offset_ns - first for offset in self.offsets]
        stamps = np.asarray(realtime_ns, dtype=np.int64)
        moved = np.rint(np.interp(stamps - base, sampled_at, drift)).astype(np.int64)
        converted: list[int] = (stamps - first - moved).tolist()
        return converted
