"""The latencies of an emulated engine, by requests in flight and prompt length. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid.errors import ConfigError
from servegrid.reference import data
from servegrid.reference.roofline import Latencies, deployment_hardware, latency_bound, model_shape
from servegrid.study.grid import Deployment

ROOFLINE = "roofline"
DEPLOYMENT_COLUMNS = ("model", "quantization", "gpu", "gpu_count")
TABLE_COLUMNS = (
    *DEPLOYMENT_COLUMNS,
    "concurrency",
    "input_len",
    "output_len",
    "seconds_per_100_tokens",
)


@dataclass(frozen=True)
class Timing:
    """Time to first token and inter-token latency of an emulated engine.

    `latency(concurrency, input_len)` returns both in seconds, before scaling; None if the engine
    does not serve this workload.
    """

    latency: Callable[[int, int], Latencies | None]
    scale: float = 1.0

    def scaled(self, factor: float) -> Timing:
        return replace(self, scale=self.scale * factor)

    def __call__(self, concurrency: int, input_len: int) -> Latencies | None:
        times = self.latency(concurrency, input_len)
        return times and Latencies(times.ttft_s * self.scale, times.itl_s * self.scale)


def load_timing(deployment: Deployment, timing: str) -> Timing:
    """The timing named `timing`: a published study, `roofline`, or a CSV file in the same format.

    Raises ConfigError with the deployment's name if `timing` is none of these, or has no data for
    the deployment.
    """
    where = f"deployment `{deployment.name}`: engine_args.timing"
    if timing == ROOFLINE:
        shape, hardware = model_shape(deployment), deployment_hardware(deployment)
        return Timing(
            lambda concurrency, length: latency_bound(shape, hardware, concurrency, length)
        )
    rows = _read_rows(timing, where)
    matching = rows[
        (
            rows[[*DEPLOYMENT_COLUMNS]] == [getattr(deployment, key) for key in DEPLOYMENT_COLUMNS]
        ).all(axis="columns")
    ]
    if matching.empty:
        named = ", ".join(f"{key} {getattr(deployment, key)}" for key in DEPLOYMENT_COLUMNS)
        raise ConfigError(
            f"{where}: `{timing}` has no rows for {named}. "
            f"Use `{ROOFLINE}`, or a table with these rows."
        )
    try:
        shape, hardware = model_shape(deployment), deployment_hardware(deployment)
    except ConfigError:
        return Timing(_interpolate(matching, lambda *_: 0.01))

    def prefill_share(concurrency: int, length: int) -> float:
        least = latency_bound(shape, hardware, concurrency, length)
        return least.ttft_s / least.e2el_s(100)

    return Timing(_interpolate(matching, prefill_share))


def _read_rows(timing: str, where: str) -> pd.DataFrame:
    if timing in data.STUDIES:
        return data.published_cells(timing)
    if not timing.endswith(".csv"):
        raise ConfigError(
            f"{where}: `{timing}` is not one of {', '.join((ROOFLINE, *data.STUDIES))}, "
            "nor the path of a .csv file. Correct it."
        )
    try:
        rows = pd.read_csv(Path(timing))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: {timing} cannot be read ({error}). Correct the path or the file."
        ) from error
    missing = [name for name in TABLE_COLUMNS if name not in rows]
    if missing:
        raise ConfigError(
            f"{where}: {timing} has no column {', '.join(missing)}. Add it to the file."
        )
    return rows


def _interpolate(
    rows: pd.DataFrame, prefill_share: Callable[[int, int], float]
) -> Callable[[int, int], Latencies | None]:
    """Linear interpolation between the cells of a table; None outside of it and next to its gaps.

    The table contains the seconds per 100 tokens; `prefill_share` is the fraction of this time
    before the first token.
    """
    known: list[dict[Any, Any]] = rows.dropna(subset="seconds_per_100_tokens").to_dict("records")
    seconds: dict[tuple[int, int], float] = {
        (row["concurrency"], row["input_len"]): row["seconds_per_100_tokens"] for row in known
    }
    levels, lengths = sorted(set(rows["concurrency"])), sorted(set(rows["input_len"]))

    def latency(concurrency: int, length: int) -> Latencies | None:
        total = 0.0
        for level, part in _weights(levels, concurrency).items():
            for column, share in _weights(lengths, length).items():
                if (level, column) not in seconds:
                    return None
                total += part * share * seconds[level, column]
        if not total:
            return None
        ttft = total * prefill_share(concurrency, length)
        return Latencies(ttft, (total - ttft) / 99)

    return latency


def _weights(grid: Sequence[int], value: int) -> Mapping[int, float]:
    """The neighbours of `value` in `grid` with their weights; empty if `value` is outside."""
    if value in grid:
        return {value: 1.0}
    for low, high in pairwise(grid):
        if low < value < high:
            return {low: (high - value) / (high - low), high: (value - low) / (high - low)}
    return {}
