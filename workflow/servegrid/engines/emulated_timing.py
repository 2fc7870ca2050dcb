"""How long an emulated engine takes, by requests in flight and length of the prompt. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid.errors import ConfigError
from servegrid.reference import data
from servegrid.reference.roofline import Bound, bound, hardware_of, shape_of
from servegrid.study.grid import Deployment

ROOFLINE = "roofline"
KEYS = ("model", "quantization", "gpu", "gpu_count")
COLUMNS = (*KEYS, "concurrency", "input_len", "output_len", "seconds_per_100_tokens")


@dataclass(frozen=True)
class Timing:
    """`of(concurrency, input_len)` is the time to the first token and between tokens, in seconds
    before scaling; None where such a load is not served.
    """

    of: Callable[[int, int], Bound | None]
    scale: float = 1.0

    def scaled(self, factor: float) -> Timing:
        return replace(self, scale=self.scale * factor)

    def __call__(self, concurrency: int, input_len: int) -> Bound | None:
        times = self.of(concurrency, input_len)
        return times and Bound(times.ttft_s * self.scale, times.itl_s * self.scale)


def load_timing(deployment: Deployment, timing: str) -> Timing:
    """The timing called `timing`: a published study, `roofline`, or a CSV file like the published.

    Raises ConfigError, naming the deployment, where it is none of these or does not know the
    deployment.
    """
    where = f"deployment `{deployment.name}`: engine_args.timing"
    if timing == ROOFLINE:
        shape, hardware = shape_of(deployment), hardware_of(deployment)
        return Timing(lambda concurrency, length: bound(shape, hardware, concurrency, length))
    rows = _rows(timing, where)
    own = rows[(rows[[*KEYS]] == [getattr(deployment, key) for key in KEYS]).all(axis="columns")]
    if own.empty:
        named = ", ".join(f"{key} {getattr(deployment, key)}" for key in KEYS)
        raise ConfigError(f"{where}: `{timing}` has no rows for {named}.")
    try:
        shape, hardware = shape_of(deployment), hardware_of(deployment)
    except ConfigError:
        return Timing(_interpolated(own, lambda *_: 0.01))

    def prefill_share(concurrency: int, length: int) -> float:
        least = bound(shape, hardware, concurrency, length)
        return least.ttft_s / least.e2el_s(100)

    return Timing(_interpolated(own, prefill_share))


def _rows(timing: str, where: str) -> pd.DataFrame:
    if timing in data.STUDIES:
        return data.published(timing)
    if not timing.endswith(".csv"):
        raise ConfigError(
            f"{where}: `{timing}` is not one of {', '.join((ROOFLINE, *data.STUDIES))}, "
            "nor the path of a .csv file."
        )
    try:
        rows = pd.read_csv(Path(timing))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {timing} cannot be read ({error}).") from error
    missing = [name for name in COLUMNS if name not in rows]
    if missing:
        raise ConfigError(f"{where}: {timing} has no column {', '.join(missing)}.")
    return rows


def _interpolated(
    rows: pd.DataFrame, prefill_share: Callable[[int, int], float]
) -> Callable[[int, int], Bound | None]:
    """Between the table's cells linearly, outside them and beside its gaps nothing.

    The table says how long 100 tokens take; which part of it is the prompt's, `prefill_share`.
    """
    known: list[dict[Any, Any]] = rows.dropna(subset="seconds_per_100_tokens").to_dict("records")
    seconds: dict[tuple[int, int], float] = {
        (row["concurrency"], row["input_len"]): row["seconds_per_100_tokens"] for row in known
    }
    levels, lengths = sorted(set(rows["concurrency"])), sorted(set(rows["input_len"]))

    def of(concurrency: int, length: int) -> Bound | None:
        total = 0.0
        for level, part in _weights(levels, concurrency).items():
            for column, share in _weights(lengths, length).items():
                if (level, column) not in seconds:
                    return None
                total += part * share * seconds[level, column]
        if not total:
            return None
        ttft = total * prefill_share(concurrency, length)
        return Bound(ttft, (total - ttft) / 99)

    return of


def _weights(grid: Sequence[int], value: int) -> Mapping[int, float]:
    """The neighbours of `value` in `grid` with their weights; none where it is outside."""
    if value in grid:
        return {value: 1.0}
    for low, high in pairwise(grid):
        if low < value < high:
            return {low: (high - value) / (high - low), high: (value - low) / (high - low)}
    return {}
