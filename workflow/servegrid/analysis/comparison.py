"""Compares two studies, with tests that account for the trials. Pure.

The tests use logarithms of speed, because a slower server changes all speeds by a factor. A cell's
ratio is tested with Welch's t over its trials, if both studies have at least two. A deployment's
ratio is tested with Student's t over the ratios of its cells, which differ by chance and by
workload. Verdicts control the false discovery rate (Benjamini and Hochberg, 1995), separately for
deployments and for cells.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtr
from scipy.stats import false_discovery_control

from servegrid.analysis.intervals import t_quantile
from servegrid.analysis.metrics import SERVEGRID_ORIGIN
from servegrid.analysis.titles import emulation_notes
from servegrid.errors import ComparisonError
from servegrid.records.verdict import OK
from servegrid.study.deployment import EMULATED

FALSE_DISCOVERY_RATE = 0.05
"""On average, at most this fraction of the verdicts `faster` and `slower` is wrong."""
MIN_EFFECT = 0.02
"""A change of up to this fraction counts as no change: two bring-ups differ by as much."""
METRIC = "output_tokens_per_s"
FASTER, SLOWER, NO_EVIDENCE = "faster", "slower", "no evidence"

_CELL_KEYS = ("protocol", "concurrency", "request_rate", "input_len", "output_len")
_SETTINGS = ("requests", "prompts", "think_time_s", "output_spread")
"""Columns in which two cells must be equal to be compared, if both studies know them."""
_DEPLOYMENT_KEYS = ("model", "quantization", "gpu", "gpu_count")


@dataclass(frozen=True)
class Ratio:
    """Speed in the second study / speed in the first: of a cell, or over a deployment's cells.

    `low` and `high` are the ends of its 95% interval. `p` is the probability of such a ratio if
    the true change is at most MIN_EFFECT. All three come from the same standard error and degrees
    of freedom, so p < 0.05 if and only if the interval lies outside 1 / (1 + MIN_EFFECT) to
    1 + MIN_EFFECT. They are None if there is nothing to test. `count` is the number of trials in
    the study that has fewer, or the number of cells. `log_stdev` is the standard deviation of the
    logarithms.
    """

    name: str
    ratio: float
    low: float | None
    high: float | None
    p: float | None
    count: int
    log_stdev: float | None
    verdict: str = NO_EVIDENCE


@dataclass(frozen=True)
class Comparison:
    """The comparison of two studies.

    `left_out` has one line per cell that cannot be compared, with the reason. `notes` must be
    shown with the comparison.
    """

    deployments: Sequence[Ratio]
    cells: Sequence[Ratio]
    left_out: Sequence[str]
    notes: Sequence[str] = ()


def compare(first: pd.DataFrame, second: pd.DataFrame, allow_mixed: bool = False) -> Comparison:
    """Compare the trials of two studies, tables of `columns.CELLS`.

    Cells are matched by workload and by the name of their deployment or, if the studies share no
    name, by model, quantization and GPUs. Trials that are not valid are left out. Imported trials
    are kept, although servegrid cannot certify them. Raises ComparisonError if no cell is in both
    studies. Unless `allow_mixed`, also raises it if only one study is emulated, or if the time
    scale or the client differs.
    """
    _check_same_kind(first, second, allow_mixed)
    shared = set(first["deployment"]) & set(second["deployment"])
    keys = ["deployment", *_CELL_KEYS] if shared else [*_DEPLOYMENT_KEYS, *_CELL_KEYS]
    ours, theirs = (_group_cells(cells, keys) for cells in (first, second))
    left_out = [
        *(f"{_format_cell(key)}: only in the first study" for key in ours if key not in theirs),
        *(f"{_format_cell(key)}: only in the second study" for key in theirs if key not in ours),
    ]
    ratios: dict[str, list[Ratio]] = {}
    for key in (key for key in ours if key in theirs):
        one, other = ours[key], theirs[key]
        empty = [which for which, cell in (("first", one), ("second", other)) if not cell.speeds]
        if empty:
            left_out.append(f"{_format_cell(key)}: no trial of the {empty[0]} study is valid")
        elif difference := _describe_difference(one, other):
            left_out.append(f"{_format_cell(key)}: {difference}")
        else:
            ratio = compare_trials(_format_cell(key), one.speeds, other.speeds)
            ratios.setdefault(one.deployment, []).append(ratio)
    if not ratios:
        reasons = "\n  ".join(left_out[:10]) or "neither study has a cell"
        raise ComparisonError(
            f"the studies have no cell that can be compared:\n  {reasons}\nCompare "
            "studies of the same deployments and workloads."
        )
    cells = apply_fdr(ratio for group in ratios.values() for ratio in group)
    deployments = apply_fdr(_compare_cells(name, group) for name, group in ratios.items())
    return Comparison(deployments, cells, left_out, _notes(first, second))


def apply_fdr(ratios: Iterable[Ratio]) -> list[Ratio]:
    """The ratios with verdicts at FALSE_DISCOVERY_RATE (Benjamini and Hochberg, 1995)."""
    found = list(ratios)
    p_values = [ratio.p for ratio in found if ratio.p is not None]
    adjusted = iter(false_discovery_control(p_values) if p_values else ())
    return [
        replace(ratio, verdict=FASTER if ratio.ratio > 1 else SLOWER)
        if ratio.p is not None and next(adjusted) <= FALSE_DISCOVERY_RATE
        else ratio
        for ratio in found
    ]


def detectable_slowdown(log_stdev: float, count: int) -> float | None:
    """The smallest slow-down, as a fraction, that a test over `count` ratios detects in 80% of
    the cases; None if there are fewer than two.

    One-sided power of 80% at a two-sided level of 5%: (t_0.975 + t_0.8) standard errors beyond
    MIN_EFFECT, with 0.84 for t_0.8. `log_stdev` is the standard deviation of the logarithms.
    """
    if count < 2:
        return None
    reach = (t_quantile(count - 1) + 0.84) * log_stdev / math.sqrt(count)
    return 1 - math.exp(-reach) * (1 - MIN_EFFECT)


def power_analysis(comparison: Comparison) -> Mapping[str, Mapping[int, float | None]]:
    """For each deployment, the slow-down that 1, 3 and 5 trials per cell can detect.

    A ratio's standard deviation is taken as proportional to 1 / √trials. This is true for the part
    that comes from the trials; another part may come from the workloads.
    """
    trials = max((ratio.count for ratio in comparison.cells), default=1)
    return {
        ratio.name: {
            wanted: None
            if ratio.log_stdev is None
            else detectable_slowdown(
                ratio.log_stdev * math.sqrt(max(trials, 1) / wanted), ratio.count
            )
            for wanted in (1, 3, 5)
        }
        for ratio in comparison.deployments
    }


def find_regressions(comparison: Comparison, fraction: float) -> list[Ratio]:
    """The deployments with the verdict SLOWER whose ratio is below 1 - `fraction`."""
    return [
        ratio
        for ratio in comparison.deployments
        if ratio.verdict == SLOWER and ratio.ratio < 1 - fraction
    ]


def two_sided_p(t: float, degrees: float) -> float:
    """The probability that Student's t with `degrees` of freedom is farther from 0 than `t`."""
    return float(2 * stdtr(degrees, -abs(t)))


def compare_trials(name: str, first: Sequence[float], second: Sequence[float]) -> Ratio:
    """The ratio of a cell from the speeds of its trials in both studies, by Welch's t."""
    one, other = ([math.log(speed) for speed in speeds] for speeds in (first, second))
    change = statistics.fmean(other) - statistics.fmean(one)
    count = min(len(one), len(other))
    if count < 2:
        return Ratio(name, math.exp(change), None, None, None, count, None)
    parts = [statistics.variance(logs) / len(logs) for logs in (one, other)]
    error = math.sqrt(sum(parts))
    # The degrees of freedom of Welch and Satterthwaite.
    divisor = sum(part**2 / (len(logs) - 1) for part, logs in zip(parts, (one, other), strict=True))
    degrees = sum(parts) ** 2 / divisor if divisor else 1.0
    log_stdev = math.sqrt(sum(statistics.variance(logs) for logs in (one, other)) / 2)
    return _test(name, change, error, degrees, count, log_stdev)


@dataclass(frozen=True)
class _Cell:
    deployment: str
    settings: Mapping[str, Any]
    speeds: list[float]


def _group_cells(cells: pd.DataFrame, keys: Sequence[str]) -> dict[tuple[Any, ...], _Cell]:
    """The cells by the values of `keys`, with the speeds of their usable trials."""
    speeds = cells[METRIC].astype("Float64").to_numpy(float, na_value=math.nan)
    # Imported trials cannot be valid. The user imported them in order to compare them.
    imported = np.array([origin != SERVEGRID_ORIGIN for origin in _origins(cells)], dtype=bool)
    certified = cells["valid"].eq(True).fillna(False).to_numpy(bool)
    is_usable = cells["verdict"].eq(OK).to_numpy(bool) & (certified | imported)
    is_usable &= ~np.isnan(speeds)
    cells = cells.assign(**{name: None for name in _SETTINGS if name not in cells})  # older tables
    names = cells["deployment"].tolist()
    key_values, settings = (
        [cells[name].astype(object).where(cells[name].notna(), None).tolist() for name in wanted]
        for wanted in (keys, _SETTINGS)
    )
    protocols = cells["protocol"].tolist()
    grouped: dict[tuple[Any, ...], _Cell] = {}
    for row, key in enumerate(zip(*key_values, strict=True)):
        cell_settings = {
            name: values[row] for name, values in zip(_SETTINGS, settings, strict=True)
        }
        if protocols[row] != "burst":  # with duration_s, the number of requests is a result
            cell_settings["requests"] = None
        cell = grouped.setdefault(key, _Cell(str(names[row]), cell_settings, []))
        if is_usable[row]:
            cell.speeds.append(float(speeds[row]))
    return grouped


def _describe_difference(one: _Cell, other: _Cell) -> str | None:
    """The first setting in which two cells differ; None if they can be compared."""
    for name, value in one.settings.items():
        if None not in (value, other.settings[name]) and value != other.settings[name]:
            return f"{name} is {value} in the first study, {other.settings[name]} in the second"
    return None


def _compare_cells(name: str, cells: Sequence[Ratio]) -> Ratio:
    """The ratio of a deployment from the ratios of its cells, by Student's t."""
    changes = [math.log(cell.ratio) for cell in cells]
    change, count = statistics.fmean(changes), len(changes)
    if count < 2:
        only = cells[0]
        return Ratio(name, only.ratio, only.low, only.high, only.p, 1, None)
    log_stdev = statistics.stdev(changes)
    return _test(name, change, log_stdev / math.sqrt(count), count - 1, count, log_stdev)


def _test(
    name: str, change: float, error: float, degrees: float, count: int, log_stdev: float
) -> Ratio:
    """The ratio of a change of the logarithm with its standard error and degrees of freedom."""
    beyond = abs(change) - math.log1p(MIN_EFFECT)
    t = beyond / error if error else math.inf
    p = two_sided_p(t, degrees) if beyond > 0 else 1.0
    # The interval uses the error and the degrees of p, so that the two never contradict.
    reach = t_quantile(degrees) * error
    low, high = math.exp(change - reach), math.exp(change + reach)
    return Ratio(name, math.exp(change), low, high, p, count, log_stdev)


def _check_same_kind(first: pd.DataFrame, second: pd.DataFrame, allow_mixed: bool) -> None:
    kinds = [
        {
            (engine == EMULATED, None if pd.isna(scale) else float(scale), origin)
            for engine, scale, origin in zip(
                cells["engine"], cells["time_scale"], _origins(cells), strict=True
            )
        }
        for cells in (first, second)
    ]
    if kinds[0] != kinds[1] and not allow_mixed:
        first_kinds, second_kinds = (", ".join(sorted(map(_format_kind, kind))) for kind in kinds)
        raise ComparisonError(
            f"the studies were not measured alike: the first is {first_kinds}; the second is "
            f"{second_kinds}. To compare them anyway, add --allow-mixed."
        )


def _notes(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    """One note per study that is emulated or imported."""
    by_note: dict[str, list[str]] = {}
    for study, cells in (("The first study", first), ("The second study", second)):
        others = sorted({*_origins(cells)} - {SERVEGRID_ORIGIN})
        imported = [f"Measured by {origin}: validity not checked." for origin in others]
        for note in [*emulation_notes(cells), *imported]:
            by_note.setdefault(note, []).append(study)
    return [
        f"{studies[0] if len(studies) == 1 else 'Both studies'}: {note[0].lower()}{note[1:]}"
        for note, studies in by_note.items()
    ]


def _origins(cells: pd.DataFrame) -> list[str]:
    """The client that measured each row. Older tables have no such column, and only own rows."""
    if "origin" not in cells:
        return [SERVEGRID_ORIGIN] * len(cells)
    return list(cells["origin"].fillna(SERVEGRID_ORIGIN))


def _format_kind(kind: tuple[bool, float | None, str]) -> str:
    emulated, scale, origin = kind
    if not emulated:
        return f"measured by {origin}"
    return "emulated" if scale is None else f"emulated, times × {scale:g}"


def _format_cell(key: Sequence[Any]) -> str:
    """`mistral-7b_fp16, burst, concurrency 8, 31 + 100 tokens`."""
    *deployment, protocol, concurrency, rate, input_len, output_len = key
    intensity = f"concurrency {concurrency}" if concurrency is not None else f"{rate:g} requests/s"
    name = " ".join(map(str, deployment))
    return f"{name}, {protocol}, {intensity}, {input_len} + {output_len} tokens"
