"""Power and energy of a cell from its GPUs' samples, and the state of the GPUs. Pure.

NVML reports an energy counter and a momentary power, and neither is exact: an A100 samples its
power a quarter of the time, and counters move in steps. The counter is used if there is one. The
difference to the sampled power is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ENGINE_DEVICE = "engine"
"""The `device` of the samples of the engine's processes. All other devices are GPUs."""

MAX_DISAGREEMENT = 0.10
"""If counter and samples differ by more than this fraction, the power is suspect."""

MAX_GAP_S = 2.0
"""A GPU's mean power is unknown if it has no reading for longer than this."""

TELEMETRY_COLUMNS = (
    "time_ns",
    "device",
    "power_w",
    "energy_j",
    "utilization",
    "temperature_c",
    "sm_clock_mhz",
)
"""The columns of `columns.TELEMETRY` that `mean_power` and `gpu_columns` need."""

_Series = tuple[Any, Any]
"""Times in s and values: two float arrays of the same length, at least two."""


@dataclass(frozen=True)
class Power:
    """Mean power of all GPUs together in W: from their energy counters, and from power samples.

    A value is None if there is no GPU, or if for one of them there are fewer than two samples or a
    gap of more than MAX_GAP_S, or if its counter ran backwards.
    """

    counter_w: float | None
    sampled_w: float | None

    @property
    def mean_w(self) -> float | None:
        """The power from the counters, else from the samples."""
        return self.sampled_w if self.counter_w is None else self.counter_w

    @property
    def disagreement(self) -> float | None:
        """sampled_w / counter_w - 1; None if one of them is unknown."""
        if not self.counter_w or self.sampled_w is None:
            return None
        return self.sampled_w / self.counter_w - 1

    @property
    def is_suspect(self) -> bool | None:
        """Whether the two differ by more than MAX_DISAGREEMENT; None if one is unknown."""
        return None if self.disagreement is None else abs(self.disagreement) > MAX_DISAGREEMENT


def mean_power(telemetry: pa.Table) -> Power:
    """The mean power over the samples: one row per device and sample, with TELEMETRY_COLUMNS."""
    return Power(
        counter_w=_sum_over_gpus(telemetry, "energy_j", _counter_rate),
        sampled_w=_sum_over_gpus(telemetry, "power_w", _time_average),
    )


def gpu_columns(telemetry: pa.Table) -> dict[str, float | None]:
    """The columns of `columns.CELLS` about the state of the GPUs, over all samples of all GPUs."""
    gpus = telemetry.filter(pc.not_equal(telemetry["device"], ENGINE_DEVICE))
    return {
        "gpu_utilization_mean": pc.mean(gpus["utilization"]).as_py(),
        "gpu_temperature_c_max": pc.max(gpus["temperature_c"]).as_py(),
        "sm_clock_mhz_min": pc.min(gpus["sm_clock_mhz"]).as_py(),
        "sm_clock_mhz_max": pc.max(gpus["sm_clock_mhz"]).as_py(),
    }


def _sum_over_gpus(
    telemetry: pa.Table, column: str, mean: Callable[[_Series], float | None]
) -> float | None:
    """The sum of `mean` over the GPUs; None if it is unknown for one of them."""
    # Arrays, because filtering and sorting a table per GPU took a fifth of the time of gathering.
    devices = telemetry["device"].combine_chunks().dictionary_encode()
    device_index, names = devices.indices.to_numpy(), devices.dictionary.to_pylist()
    times = telemetry["time_ns"].to_numpy() / 1e9
    values = telemetry[column].cast(pa.float64()).to_numpy()
    order = np.argsort(times, kind="stable")
    all_times, total = times[order], 0.0
    gpus = sorted(set(names) - {ENGINE_DEVICE})
    for gpu in gpus:
        rows = order[(device_index[order] == names.index(gpu)) & ~np.isnan(values[order])]
        gpu_times = times[rows]
        if gpu_times.size < 2 or gpu_times[-1] == gpu_times[0]:
            return None
        if _longest_gap(all_times, gpu_times) > MAX_GAP_S:
            return None
        value = mean((gpu_times, values[rows]))
        if value is None:
            return None
        total += value
    return total if gpus else None


def _longest_gap(all_times: Any, times: Any) -> float:
    """The longest time in s without a sample, between the first and the last of all devices."""
    return float(np.diff(times, prepend=all_times[0], append=all_times[-1]).max())


def _counter_rate(series: _Series) -> float | None:
    """The increase of the counter per second; None if it ran backwards."""
    times, joules = series
    if (np.diff(joules) < 0).any():
        return None
    return float((joules[-1] - joules[0]) / (times[-1] - times[0]))


def _time_average(series: _Series) -> float:
    """The mean over time, by trapezoids, because the samples are not evenly spaced."""
    times, watts = series
    return float(np.trapezoid(watts, times) / (times[-1] - times[0]))
