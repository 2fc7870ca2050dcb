"""Compares two studies, with tests whose unit is the bring-up. Pure.

Two bring-ups of the same deployment differ: in the node, the memory layout, the autotuning. All
cells and trials of one share that, so however many there are, they are one sample. A deployment's
ratio is tested with Student's t over the means of its bring-ups in both studies, a cell's ratio
over its bring-ups. The test assumes that bring-ups vary alike in both studies: with two or three,
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
import numpy.typing as npt
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
from servegrid.study.grid import OPEN_LOOPS

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
_ROUNDING = 1e-9
"""An eigenvalue below this share of the largest is 0 but for rounding."""
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
    """The smallest slowdown, as a fraction, that the test detects with the probability POWER.

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
    """For each deployment, the slowdown that 2, 3 and 5 bring-ups per study can detect.

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

    The ratio is the geometric mean of the cells' ratios. Each bring-up is one sample: what it adds
    to the logarithms of its cells. If bring-ups measured different cells, as after a study was
    resumed, each one has the weight in the ratio that its cells give it.
    """
    numbers: dict[tuple[int, str], int] = {}
    weights: dict[int, float] = {}
    terms: list[float] = []
    logs: list[dict[int, float]] = []
    for sides in cells:
        values: dict[int, float] = {}
        for sign, speeds in zip((-1, 1), sides, strict=True):
            share = sign / len(speeds) / len(cells)
            for bring_up, each in speeds.items():
                number = numbers.setdefault((sign, bring_up), len(numbers))
                values[number] = statistics.fmean(map(math.log, each))
                weights[number] = weights.get(number, 0.0) + share
                terms.append(share * values[number])
        logs.append(values)
    change, signs = math.fsum(terms), [sign for sign, _ in numbers]
    count = min(signs.count(-1), signs.count(1))
    stdev, degrees = _between_bring_ups(logs, signs)
    if count < MIN_BRING_UPS or stdev is None:
        return Ratio(name, math.exp(change), None, None, None, count, stdev)
    error = stdev * math.hypot(*weights.values())
    return _test(name, change, error, degrees, count, stdev)


def _between_bring_ups(
    logs: Sequence[Mapping[int, float]], signs: Sequence[int]
) -> tuple[float | None, int]:
    """The standard deviation between bring-ups of a study, and its degrees of freedom.

    `logs` has the logarithms of each cell by the number of the bring-up; `signs` says which study
    the bring-ups are of. By least squares, a logarithm is the sum of its cell and its bring-up.
    Bring-ups without a common cell, also by way of others, cannot be compared: each such group
    costs a degree of freedom, and the change between the studies costs one. None without any.
    """
    links, sums = np.zeros((len(signs), len(signs))), np.zeros(len(signs))
    for values in logs:
        which, found = list(values), np.array(list(values.values()))
        links[which, which] += 1
        links[np.ix_(which, which)] -= 1 / len(which)
        sums[which] += found - found.mean()
    sizes, directions = np.linalg.eigh(links)
    is_group = sizes < _ROUNDING * sizes.max()
    groups, others = directions[:, is_group], directions[:, ~is_group]
    added = others @ (others.T @ sums / sizes[~is_group])
    study = np.array(signs, dtype=float)
    study -= groups @ (groups.T @ study)
    rest = added - study * (study @ added) / (study @ study)
    degrees = len(signs) - groups.shape[1] - 1
    return math.sqrt(rest @ rest / degrees) if degrees else None, degrees


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
    cells = cells.assign(**{name: None for name in _SETTINGS if name not in cells})  # older tables
    # Trials of a sweep that were not tried have no rate, so they are of no cell.
    cells = cells[cells["concurrency"].notna() | cells["request_rate"].notna()]
    speeds = _speeds(cells)
    # Imported trials cannot be valid. The user imported them in order to compare them.
    imported = np.array([origin != SERVEGRID_ORIGIN for origin in _origins(cells)], dtype=bool)
    certified = cells["valid"].eq(True).fillna(False).to_numpy(bool)
    is_usable = cells["verdict"].isin(SERVED).to_numpy(bool) & (certified | imported)
    is_usable &= speeds > 0  # not NaN, and not what another client could not measure
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


def _speeds(cells: pd.DataFrame) -> npt.NDArray[np.float64]:
    """The speed of each trial in output tokens/s; NaN if it is unknown.

    It is that of all users together. In an open loop, and if users think, the users decide on it,
    however fast the server is: there it is the speed of one request, with its time to first token.
    """
    of_all, seconds, think_s = (
        cells[name].astype("Float64").to_numpy(float, na_value=math.nan)
        for name in ("output_tokens_per_s", "seconds_per_100_tokens", "think_time_s")
    )
    by_users = cells["protocol"].isin(OPEN_LOOPS).to_numpy(bool) | (think_s > 0)
    return np.where(by_users, 100 / seconds, of_all)


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
