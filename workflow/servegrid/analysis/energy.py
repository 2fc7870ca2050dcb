"""Power and energy of a cell from its GPUs' samples, and the state of the GPUs. Pure.

NVML reports an energy counter and a momentary power, and neither is exact: an A100 samples its
power a quarter of the time, and counters move in steps. The counter is used if there is one, from
the first to the last sample that shows a step: what lies outside belongs to unfinished steps, which
made the energy of a 2 s cell up to 8% too small. When each of the two steps happened is known only
within a sample, so a short cell has no energy. The difference to the sampled power is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ENGINE_DEVICE = "engine"
"""The `device` of the samples of the engine's processes, followed by `.N` for its N-th further
node. All other devices are GPUs."""

MAX_DISAGREEMENT = 0.10
"""If counter and samples differ by more than this fraction, the power is suspect."""

MAX_COUNTER_ERROR = 0.02
"""The power from counters is unknown if it may be wrong by more than this fraction."""

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

_T = TypeVar("_T")
_Series = tuple[Any, Any]
"""Times in s and values: two float arrays of the same length, at least two."""


@dataclass(frozen=True)
class Power:
    """Mean power of all GPUs together in W: from their energy counters, and from power samples.

    A value is None if there is no GPU, or if for one of them there are fewer than two samples or a
    gap of more than MAX_GAP_S, or if its counter ran backwards or shows fewer than two steps.
    `needs_s` is the time from the first to the last step that makes `counter_w` exact to
    MAX_COUNTER_ERROR, and `counted_s` the time that there was. `has_counters` says whether all GPUs
    have an energy counter.
    """

    counter_w: float | None
    sampled_w: float | None
    counted_s: float | None = None
    needs_s: float | None = None
    has_counters: bool = False

    @property
    def mean_w(self) -> float | None:
        """The power from the counters, if they are exact enough; from samples without counters."""
        if not self.has_counters:
            return self.sampled_w
        is_exact = not self.needs_s or (self.counted_s or 0.0) >= self.needs_s
        return self.counter_w if is_exact else None

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


def is_engine(device: str) -> bool:
    """Whether this `device` stands for the processes of an engine on one of its nodes."""
    return device.startswith(ENGINE_DEVICE)


def mean_power(telemetry: pa.Table) -> Power:
    """The mean power over the samples: one row per device and sample, with TELEMETRY_COLUMNS."""
    counted = _each_gpu(telemetry, "energy_j", _count_energy)
    sampled = _each_gpu(telemetry, "power_w", _time_average)
    sampled_w = None if sampled is None else math.fsum(sampled)
    if counted is None:
        return Power(None, sampled_w, has_counters=_has_counters(telemetry))
    return Power(
        counter_w=math.fsum(each.watts for each in counted),
        sampled_w=sampled_w,
        counted_s=min(each.seconds for each in counted),
        needs_s=max(each.gap_s for each in counted) / MAX_COUNTER_ERROR,
        has_counters=True,
    )


def _of_gpus(telemetry: pa.Table) -> pa.Table:
    return telemetry.filter(pc.invert(pc.starts_with(telemetry["device"], ENGINE_DEVICE)))


def _has_counters(telemetry: pa.Table) -> bool:
    """Whether there are GPUs, and each of them has a reading of its energy counter."""
    gpus = _of_gpus(telemetry)
    counted = gpus.filter(pc.is_valid(gpus["energy_j"]))
    return gpus.num_rows > 0 and set(gpus["device"].unique().to_pylist()) == set(
        counted["device"].unique().to_pylist()
    )


def gpu_columns(telemetry: pa.Table) -> dict[str, float | None]:
    """The columns of `columns.CELLS` about the state of the GPUs, over all samples of all GPUs."""
    gpus = _of_gpus(telemetry)
    return {
        "gpu_utilization_mean": pc.mean(gpus["utilization"]).as_py(),
        "gpu_temperature_c_max": pc.max(gpus["temperature_c"]).as_py(),
        "sm_clock_mhz_min": pc.min(gpus["sm_clock_mhz"]).as_py(),
        "sm_clock_mhz_max": pc.max(gpus["sm_clock_mhz"]).as_py(),
    }


def _each_gpu(
    telemetry: pa.Table, column: str, mean: Callable[[_Series], _T | None]
) -> list[_T] | None:
    """`mean` of each GPU; None if there is no GPU, or if it is unknown for one of them."""
    # Arrays, because filtering and sorting a table per GPU took a fifth of the time of gathering.
    devices = telemetry["device"].combine_chunks().dictionary_encode()
    device_index, names = devices.indices.to_numpy(), devices.dictionary.to_pylist()
    times = telemetry["time_ns"].to_numpy() / 1e9
    values = telemetry[column].cast(pa.float64()).to_numpy()
    order = np.argsort(times, kind="stable")
    all_times, found = times[order], []
    gpus = sorted(each for each in set(names) if not is_engine(each))
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
        found.append(value)
    return found or None


def _longest_gap(all_times: Any, times: Any) -> float:
    """The longest time in s without a sample, between the first and the last of all devices."""
    return float(np.diff(times, prepend=all_times[0], append=all_times[-1]).max())


@dataclass(frozen=True)
class _Counted:
    """The mean power over `seconds` in W. The time of a step is known within `gap_s`."""

    watts: float
    seconds: float
    gap_s: float


def _count_energy(series: _Series) -> _Counted | None:
    """The increase of the counter between the first and the last step that the samples show.

    A step is seen up to one sample after it happened, at both ends alike, so the mean error is 0.
    None if the counter ran backwards, or if there are fewer than two steps.
    """
    times, joules = series
    increases = np.diff(joules)
    steps = np.flatnonzero(increases) + 1
    if (increases < 0).any() or steps.size < 2:
        return None
    first, last = steps[0], steps[-1]
    seconds = float(times[last] - times[first])
    gap_s = float(max(times[index] - times[index - 1] for index in (first, last)))
    return _Counted(float(joules[last] - joules[first]) / seconds, seconds, gap_s)


def _time_average(series: _Series) -> float:
    """The mean over time, by trapezoids, because the samples are not evenly spaced."""
    times, watts = series
    return float(np.trapezoid(watts, times) / (times[-1] - times[0]))
