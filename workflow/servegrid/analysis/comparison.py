"""Compares two studies, with tests whose unit is the bring-up. Pure.

Two bring-ups of the same deployment differ: in the node, the memory layout, the autotuning. All
cells and trials of one share that, so however many there are, they are one sample. A deployment's
ratio is tested with Student's t over the means of its bring-ups in both studies, a cell's ratio
over its bring-ups. The test takes it that bring-ups vary alike in both studies: with two or three,
their two variances cannot be distinguished. With one bring-up in a study there is a ratio and no
verdict.

The tests use logarithms of speed, because a slower server changes all speeds by a factor. Verdicts
control the false discovery rate (Benjamini and Hochberg, 1995), separately for deployments and for
cells.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import stdtr
from scipy.stats import false_discovery_control, nct

from servegrid.analysis.intervals import t_quantile
from servegrid.analysis.metrics import SERVEGRID_ORIGIN
from servegrid.analysis.summary import CELL_KEYS
from servegrid.analysis.titles import EARLY_STOP, figure_notes, stops_early
from servegrid.errors import ComparisonError
from servegrid.records.verdict import SERVED
from servegrid.study.deployment import EMULATED

FALSE_DISCOVERY_RATE = 0.05
"""On average, at most this fraction of the verdicts `faster` and `slower` is wrong."""
MIN_EFFECT = 0.02
"""A change of up to this fraction counts as no change."""
MIN_BRING_UPS = 2
"""A ratio is tested if both studies have at least this many bring-ups."""
ASSUMED_STDEV = 0.02
"""The standard deviation between bring-ups (of the logarithms) if it was not measured. Identical
GPUs of one cluster differed by 8% on average, and by up to 22%, in a study of five clusters (Sinha
et al., Not All GPUs Are Created Equal, SC 2022)."""
POWER = 0.8
METRIC = "output_tokens_per_s"
FASTER, SLOWER, NO_EVIDENCE = "faster", "slower", "no evidence"
NOT_TESTED = "not tested"

_SETTINGS = ("requests", "prompts", "think_time_s", "output_spread", "source")
"""Columns in which two cells must be equal to be compared, if both studies know them."""
_DEPLOYMENT_KEYS = ("model", "quantization", "gpu", "gpu_count")


@dataclass(frozen=True)
class Ratio:
    """Speed in the second study / speed in the first: of a cell, or over a deployment's cells.

    `low` and `high` are the ends of its 95% interval. `p` is the probability of such a ratio if
    the true change is at most MIN_EFFECT. All three come from the same standard error and degrees
    of freedom, so p < 0.05 if and only if the interval lies outside 1 / (1 + MIN_EFFECT) to
    1 + MIN_EFFECT. They are None if a study has fewer than MIN_BRING_UPS. `count` is the number of
    bring-ups in the study that has fewer. `stdev` is the standard deviation of the logarithms
    between bring-ups; None if no study has two.
    """

    name: str
    ratio: float
    low: float | None
    high: float | None
    p: float | None
    count: int
    stdev: float | None
    verdict: str = NOT_TESTED


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
    scale or the client differs, and leaves out cells whose outputs may stop early in only one of
    the studies.
    """
    for which, study in (("first", first), ("second", second)):
        if study.empty:
            raise ComparisonError(f"the {which} study has no cells. Name a study that has some.")
    _check_same_kind(first, second, allow_mixed)
    shared = set(first["deployment"]) & set(second["deployment"])
    keys = ["deployment", *CELL_KEYS] if shared else [*_DEPLOYMENT_KEYS, *CELL_KEYS]
    ours, theirs = (_group_cells(cells, keys, allow_mixed) for cells in (first, second))
    left_out = list(_describe_unmatched(ours, theirs))
    pairs: dict[str, dict[str, tuple[Speeds, Speeds]]] = {}
    for key in (key for key in ours if key in theirs):
        one, other = ours[key], theirs[key]
        empty = [which for which, cell in (("first", one), ("second", other)) if not cell.speeds]
        if empty:
            left_out.append(f"{_format_cell(key)}: no trial of the {empty[0]} study is valid")
        elif difference := _describe_difference(one, other):
            left_out.append(f"{_format_cell(key)}: {difference}")
        else:
            pairs.setdefault(one.deployment, {})[_format_cell(key)] = one.speeds, other.speeds
    if not pairs:
        reasons = "\n  ".join(left_out[:10]) or "neither study has a cell"
        raise ComparisonError(
            f"the studies have no cell that can be compared:\n  {reasons}\nCompare "
            "studies of the same deployments and workloads."
        )
    cells = apply_fdr(
        compare_cell(name, *speeds) for group in pairs.values() for name, speeds in group.items()
    )
    deployments = apply_fdr(
        compare_deployment(name, list(group.values())) for name, group in pairs.items()
    )
    return Comparison(deployments, cells, left_out, _notes(first, second))


def apply_fdr(ratios: Iterable[Ratio]) -> list[Ratio]:
    """The ratios with verdicts at FALSE_DISCOVERY_RATE (Benjamini and Hochberg, 1995)."""
    found = list(ratios)
    p_values = [ratio.p for ratio in found if ratio.p is not None]
    adjusted = iter(false_discovery_control(p_values) if p_values else ())
    judged = []
    for ratio in found:
        verdict = NOT_TESTED
        if ratio.p is not None:
            direction = FASTER if ratio.ratio > 1 else SLOWER
            verdict = direction if next(adjusted) <= FALSE_DISCOVERY_RATE else NO_EVIDENCE
        judged.append(replace(ratio, verdict=verdict))
    return judged


def detectable_slowdown(stdev: float, bring_ups: int) -> float | None:
    """The smallest slow-down, as a fraction, that the test detects with the probability POWER.

    `stdev` is the standard deviation between bring-ups (of the logarithms), `bring_ups` their
    number in each study; None if there are fewer than MIN_BRING_UPS. A two-sided test at 5%, with
    the noncentral t distribution for the power (J. Cohen, Statistical Power Analysis, 1988).
    """
    if bring_ups < MIN_BRING_UPS:
        return None
    degrees = 2 * (bring_ups - 1)
    critical = t_quantile(degrees)
    errors = brentq(lambda shift: nct.sf(critical, degrees, shift) - POWER, 0.0, 100.0)
    reach = errors * stdev * math.sqrt(2 / bring_ups)
    return 1 - math.exp(-reach) * (1 - MIN_EFFECT)


def power_analysis(comparison: Comparison) -> Mapping[str, Mapping[int, float | None]]:
    """For each deployment, the slow-down that 2, 3 and 5 bring-ups per study can detect.

    Where the standard deviation between bring-ups is unknown, it is taken as ASSUMED_STDEV.
    """
    return {
        ratio.name: {
            count: detectable_slowdown(ASSUMED_STDEV if ratio.stdev is None else ratio.stdev, count)
            for count in (2, 3, 5)
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


Speeds = Mapping[str, Sequence[float]]
"""The speeds of a cell's trials by the bring-up (its allocation) that they were measured in."""


def compare_cell(name: str, first: Speeds, second: Speeds) -> Ratio:
    """The ratio of a cell from the speeds of its trials in both studies."""
    return compare_deployment(name, [(first, second)])


def compare_deployment(name: str, cells: Sequence[tuple[Speeds, Speeds]]) -> Ratio:
    """The ratio over the cells of a deployment, with Student's t over its bring-ups.

    The ratio is the geometric mean of the cells' ratios. A bring-up's value is the mean, over its
    cells, of the logarithm of its speed relative to the other study's: so bring-ups that measured
    different cells can be compared.
    """
    changes: list[float] = []
    values: tuple[dict[str, list[float]], ...] = ({}, {})
    for sides in cells:
        logs = [
            {bring_up: statistics.fmean(map(math.log, speeds)) for bring_up, speeds in side.items()}
            for side in sides
        ]
        means = [statistics.fmean(side.values()) for side in logs]
        changes.append(means[1] - means[0])
        for side, other_mean, found in zip(logs, reversed(means), values, strict=True):
            for bring_up, value in side.items():
                found.setdefault(bring_up, []).append(value - other_mean)
    change = statistics.fmean(changes)
    one, other = ([statistics.fmean(each) for each in found.values()] for found in values)
    return _student(name, change, one, other)


def _student(name: str, change: float, one: Sequence[float], other: Sequence[float]) -> Ratio:
    """The ratio of a change, with Student's t over two samples with one variance."""
    count = min(len(one), len(other))
    degrees = len(one) + len(other) - 2
    squares = sum(
        (len(values) - 1) * statistics.variance(values)
        for values in (one, other)
        if len(values) > 1
    )
    stdev = math.sqrt(squares / degrees) if degrees else None
    if count < MIN_BRING_UPS or stdev is None:
        return Ratio(name, math.exp(change), None, None, None, count, stdev)
    error = stdev * math.sqrt(1 / len(one) + 1 / len(other))
    return _test(name, change, error, degrees, count, stdev)


@dataclass(frozen=True)
class _Cell:
    deployment: str
    settings: Mapping[str, Any]
    speeds: dict[str, list[float]]


_Cells = Mapping[tuple[Any, ...], _Cell]


def _group_cells(cells: pd.DataFrame, keys: Sequence[str], allow_mixed: bool) -> _Cells:
    """The cells by the values of `keys`, with the speeds of their usable trials.

    The last item of a key says whether the outputs may stop early; it is None if `allow_mixed`, and
    then exact and other outputs have the same key.
    """
    speeds = cells[METRIC].astype("Float64").to_numpy(float, na_value=math.nan)
    # Imported trials cannot be valid. The user imported them in order to compare them.
    imported = np.array([origin != SERVEGRID_ORIGIN for origin in _origins(cells)], dtype=bool)
    certified = cells["valid"].eq(True).fillna(False).to_numpy(bool)
    is_usable = cells["verdict"].isin(SERVED).to_numpy(bool) & (certified | imported)
    is_usable &= speeds > 0  # not NaN, and not what another client could not measure
    cells = cells.assign(**{name: None for name in _SETTINGS if name not in cells})  # older tables
    names = cells["deployment"].tolist()
    key_values, settings = (
        [cells[name].astype(object).where(cells[name].notna(), None).tolist() for name in wanted]
        for wanted in (keys, _SETTINGS)
    )
    protocols = cells["protocol"].tolist()
    bring_ups = cells["allocation"].fillna("").astype(str).tolist()
    early = [None] * len(cells) if allow_mixed else stops_early(cells).tolist()
    grouped: dict[tuple[Any, ...], _Cell] = {}
    for row, key in enumerate(zip(*key_values, early, strict=True)):
        cell_settings = {
            name: values[row] for name, values in zip(_SETTINGS, settings, strict=True)
        }
        if protocols[row] != "burst":  # with duration_s, the number of requests is a result
            cell_settings["requests"] = None
        cell = grouped.setdefault(key, _Cell(str(names[row]), cell_settings, {}))
        if is_usable[row]:
            cell.speeds.setdefault(bring_ups[row], []).append(float(speeds[row]))
    return grouped


def _describe_unmatched(ours: _Cells, theirs: _Cells) -> Iterator[str]:
    """One line for each cell without a counterpart in the other study, with the reason."""
    for which, cells, others in (("first", ours, theirs), ("second", theirs, ours)):
        for key in (key for key in cells if key not in others):
            *same, early = key
            if early is None or (*same, not early) not in others:
                yield f"{_format_cell(key)}: only in the {which} study"
            elif early:
                yield (
                    f"{_format_cell(key)} in the {which} study, but not in the other. To compare "
                    "them anyway, add --allow-mixed"
                )


def _describe_difference(one: _Cell, other: _Cell) -> str | None:
    """The first setting in which two cells differ; None if they can be compared."""
    for name, value in one.settings.items():
        if None not in (value, other.settings[name]) and value != other.settings[name]:
            return f"{name} is {value} in the first study, {other.settings[name]} in the second"
    return None


def _test(
    name: str, change: float, error: float, degrees: float, count: int, stdev: float
) -> Ratio:
    """The ratio of a change of the logarithm with its standard error and degrees of freedom."""
    beyond = abs(change) - math.log1p(MIN_EFFECT)
    t = beyond / error if error else math.inf
    p = two_sided_p(t, degrees) if beyond > 0 else 1.0
    # The interval uses the error and the degrees of p, so that the two never contradict.
    reach = t_quantile(degrees) * error
    low, high = math.exp(change - reach), math.exp(change + reach)
    return Ratio(name, math.exp(change), low, high, p, count, stdev)


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
    """What must be known of a study: emulated, imported, outputs that may stop early."""
    by_note: dict[str, list[str]] = {}
    for study, cells in (("The first study", first), ("The second study", second)):
        others = sorted({*_origins(cells)} - {SERVEGRID_ORIGIN})
        imported = [f"Measured by {origin}: validity not checked." for origin in others]
        for note in [*figure_notes(cells), *imported]:
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
    *deployment, protocol, concurrency, rate, input_len, output_len, early = key
    intensity = f"concurrency {concurrency}" if concurrency is not None else f"{rate:g} requests/s"
    name = " ".join(map(str, deployment))
    mark = f", {EARLY_STOP}" if early else ""
    return f"{name}, {protocol}, {intensity}, {input_len} + {output_len} tokens{mark}"
