"""Power and energy of a cell from its GPUs' samples, and the state that they were in. Pure.

NVML tells both an energy counter and a momentary power, and neither is exact: an A100
samples its power a quarter of the time, and counters move in steps. The counter is used if
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

DOUBTFUL = 0.10
"""By which share counted and sampled power may differ before the energy is suspect."""

GAP_S = 2.0
"""Without a reading for longer than that, a GPU's mean power is not known."""

COLUMNS = (
    "time_ns",
    "device",
    "power_w",
    "energy_j",
    "utilization",
    "temperature_c",
    "sm_clock_mhz",
)
"""The columns of `columns.TELEMETRY` that `power_of` and `state_of` need."""

_Samples = tuple[Any, Any]
"""Times in s and values, as arrays of floats of the same length, at least two."""


@dataclass(frozen=True)
class Power:
    """Mean power in W of all GPUs together, by their counters and by their sampled power.

    Each is None where there is no GPU, or where one of them has no two samples of it, none for
    GAP_S, or a counter that ran backwards.
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

    @property
    def is_suspect(self) -> bool | None:
        """Whether they differ by more than DOUBTFUL; None where one is unknown."""
        return None if self.disagreement is None else abs(self.disagreement) > DOUBTFUL


def power_of(telemetry: pa.Table) -> Power:
    """The mean power over the samples, which has at least COLUMNS, a row per device and sample."""
    return Power(
        counted_w=_summed(telemetry, "energy_j", _growth),
        sampled_w=_summed(telemetry, "power_w", _mean_over_time),
    )


def state_of(telemetry: pa.Table) -> dict[str, float | None]:
    """The columns of `columns.CELLS` that tell how the GPUs fared, over all of their samples."""
    gpus = telemetry.filter(pc.not_equal(telemetry["device"], ENGINE_DEVICE))
    return {
        "gpu_utilization_mean": pc.mean(gpus["utilization"]).as_py(),
        "gpu_temperature_c_max": pc.max(gpus["temperature_c"]).as_py(),
        "sm_clock_mhz_min": pc.min(gpus["sm_clock_mhz"]).as_py(),
        "sm_clock_mhz_max": pc.max(gpus["sm_clock_mhz"]).as_py(),
    }


def _summed(
    telemetry: pa.Table, column: str, mean: Callable[[_Samples], float | None]
) -> float | None:
    # In arrays: as tables, filtered and sorted per GPU, this was a fifth of gathering.
    devices = telemetry["device"].combine_chunks().dictionary_encode()
    of_device, names = devices.indices.to_numpy(), devices.dictionary.to_pylist()
    times = telemetry["time_ns"].to_numpy() / 1e9
    values = telemetry[column].cast(pa.float64()).to_numpy()
    order = np.argsort(times, kind="stable")
    whole, total = times[order], 0.0
    gpus = sorted(set(names) - {ENGINE_DEVICE})
    for gpu in gpus:
        rows = order[(of_device[order] == names.index(gpu)) & ~np.isnan(values[order])]
        own = times[rows]
        if own.size < 2 or own[-1] == own[0] or _gap(whole, own) > GAP_S:
            return None
        value = mean((own, values[rows]))
        if value is None:
            return None
        total += value
    return total if gpus else None


def _gap(whole: Any, times: Any) -> float:
    """The longest time in s without a sample, from the first to the last of any device."""
    return float(np.diff(times, prepend=whole[0], append=whole[-1]).max())


def _growth(samples: _Samples) -> float | None:
    times, joules = samples
    if (np.diff(joules) < 0).any():
        return None
    return float((joules[-1] - joules[0]) / (times[-1] - times[0]))


def _mean_over_time(samples: _Samples) -> float:
    """The trapezoids' area over the time: samples may lie at uneven distances."""
    times, watts = samples
    return float(np.trapezoid(watts, times) / (times[-1] - times[0]))
