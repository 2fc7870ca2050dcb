"""Power and energy of a cell from its GPUs' samples. Pure.

NVML tells both an energy counter and a momentary power, and neither is beyond doubt: an A100
samples its power a quarter of the time, and counters move in steps. The counter is believed where
there is one, and how far the sampled power differs from it is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ENGINE_DEVICE = "engine"
"""The `device` of the samples that tell of the engine's processes and not of a GPU."""

COLUMNS = ("time_ns", "device", "power_w", "energy_j")
"""The columns of `records.TELEMETRY` that `power_of` needs."""

_Samples = tuple[Any, Any]
"""Times in s and values, as arrays of floats of the same length, at least two."""


@dataclass(frozen=True)
class Power:
    """Mean power in W of all GPUs together, by their counters and by their sampled power.

    Each is None where one of the GPUs has no two samples of it, or where there is no GPU.
    """

    counted_w: float | None
    sampled_w: float | None

    @property
    def mean_w(self) -> float | None:
        return self.sampled_w if self.counted_w is None else self.counted_w

    @property
    def disagreement(self) -> float | None:
        """By which share the sampled power is above the counted; None where one is unknown."""
        if not self.counted_w or self.sampled_w is None:
            return None
        return self.sampled_w / self.counted_w - 1


def power_of(telemetry: pa.Table) -> Power:
    """The mean power over the samples, which has at least COLUMNS, a row per device and sample."""
    gpus = sorted(set(telemetry["device"].to_pylist()) - {ENGINE_DEVICE})
    return Power(
        counted_w=_summed(telemetry, gpus, "energy_j", _growth),
        sampled_w=_summed(telemetry, gpus, "power_w", _mean_over_time),
    )


def _summed(
    telemetry: pa.Table, gpus: list[str], column: str, mean: Callable[[_Samples], float]
) -> float | None:
    total = 0.0
    for gpu in gpus:
        known = pc.and_(pc.equal(telemetry["device"], gpu), pc.is_valid(telemetry[column]))
        rows = telemetry.filter(known).sort_by("time_ns")
        times = rows["time_ns"].to_numpy() / 1e9
        if rows.num_rows < 2 or times[-1] == times[0]:
            return None
        total += mean((times, rows[column].to_numpy()))
    return total if gpus else None


def _growth(samples: _Samples) -> float:
    times, joules = samples
    return float((joules[-1] - joules[0]) / (times[-1] - times[0]))


def _mean_over_time(samples: _Samples) -> float:
    """The trapezoids' area over the time: samples may lie at uneven distances."""
    times, watts = samples
    return float(np.trapezoid(watts, times) / (times[-1] - times[0]))
