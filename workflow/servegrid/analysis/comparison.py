"""Two studies compared, with tests that account for trials. Pure.

Logarithms of speed are compared: what makes a server slower makes it so by a share. A cell's ratio
is tested by Welch's t over its trials, where it has at least two in both studies; a deployment's by
Student's t over its cells, whose ratios differ by chance and by load. Verdicts keep the
false-discovery rate of Benjamini and Hochberg (1995), of deployments and of cells apart.
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
from servegrid.analysis.metrics import OWN
from servegrid.analysis.titles import emulation_notes
from servegrid.errors import ComparisonError
from servegrid.records.verdict import OK
from servegrid.study.deployment import EMULATED

FALSE_DISCOVERIES = 0.05
"""The share of verdicts `faster` and `slower` that is wrong on average, at most."""
INDIFFERENT = 0.02
"""A change of up to this share is none: another bring-up on another node makes as much."""
FIGURE = "output_tokens_per_s"
FASTER, SLOWER, NO_EVIDENCE = "faster", "slower", "no evidence"

_CELL = ("protocol", "concurrency", "request_rate", "input_len", "output_len")
_SAME = ("requests", "prompts", "think_time_s", "output_spread")
"""What must be the same in both, where it is known of both, for a cell to be compared."""
_DEPLOYMENT = ("model", "quantization", "gpu", "gpu_count")


@dataclass(frozen=True)
class Ratio:
    """Speed in the second study / in the first, of a cell or over all cells of a deployment.

    `low` and `high` are its 95% interval and `p` the chance of such a ratio if there were no
    difference beyond INDIFFERENT; None where nothing can be tested. `count` are the trials of
    the study that has fewer, or the cells. `scatter` is the standard deviation of the logarithms.
    """

    name: str
    ratio: float
    low: float | None
    high: float | None
    p: float | None
    count: int
    scatter: float | None
    verdict: str = NO_EVIDENCE


@dataclass(frozen=True)
class Comparison:
    """The comparison of two studies.

    `left_out` names what cannot be compared, and why; `notes` must be shown with it.
    """

    deployments: Sequence[Ratio]
    cells: Sequence[Ratio]
    left_out: Sequence[str]
    notes: Sequence[str] = ()


def compare(first: pd.DataFrame, second: pd.DataFrame, allow_mixed: bool = False) -> Comparison:
    """Compare the trials of two studies, tables of `columns.CELLS`.

    Cells are matched by workload and deployment name or, if the studies share no such name, by
    model, quantization and GPUs. Trials that are not valid are left out; those of
    other clients are not, although nobody can certify them. Raises ComparisonError if no cell is
    in both. Unless `allow_mixed`, also if one is emulated and the other is not, or has another
    time scale, or was measured by another client.
    """
    _check_same_kind(first, second, allow_mixed)
    shared = set(first["deployment"]) & set(second["deployment"])
    keys = ["deployment", *_CELL] if shared else [*_DEPLOYMENT, *_CELL]
    ours, theirs = (_by_cell(each, keys) for each in (first, second))
    left_out = [
        *(f"{_format_cell(key)}: only in the first" for key in ours if key not in theirs),
        *(f"{_format_cell(key)}: only in the second" for key in theirs if key not in ours),
    ]
    groups: dict[str, list[Ratio]] = {}
    for key in (key for key in ours if key in theirs):
        one, other = ours[key], theirs[key]
        lacking = [which for which, own in (("first", one), ("second", other)) if not own.values]
        if lacking:
            left_out.append(f"{_format_cell(key)}: no trial of the {lacking[0]} study is valid")
        elif differing := _differing(one, other):
            left_out.append(f"{_format_cell(key)}: {differing}")
        else:
            ratio = _of_trials(_format_cell(key), one.values, other.values)
            groups.setdefault(one.deployment, []).append(ratio)
    if not groups:
        why = "\n  ".join(left_out[:10]) or "neither has any"
        raise ComparisonError(
            f"no cell of the first study is in the second:\n  {why}\nCompare studies of "
            "the same deployments and loads."
        )
    cells = apply_fdr(ratio for own in groups.values() for ratio in own)
    deployments = apply_fdr(_of_cells(name, own) for name, own in groups.items())
    return Comparison(deployments, cells, left_out, _notes(first, second))


def apply_fdr(ratios: Iterable[Ratio]) -> list[Ratio]:
    """The ratios with verdicts at the false discovery rate (Benjamini and Hochberg, 1995)."""
    found = list(ratios)
    tested = [each.p for each in found if each.p is not None]
    adjusted = iter(false_discovery_control(tested) if tested else ())
    return [
        replace(each, verdict=FASTER if each.ratio > 1 else SLOWER)
        if each.p is not None and next(adjusted) <= FALSE_DISCOVERIES
        else each
        for each in found
    ]


def detectable(scatter: float, count: int) -> float | None:
    """The least slow-down, as a share, that a test over so many ratios finds in four of five cases.

    One-sided power of 80% at two-sided 5%: (t_0.975 + t_0.8) standard errors beyond INDIFFERENT,
    with 0.84 for t_0.8. `scatter` is that of the logarithms; None under two of them.
    """
    if count < 2:
        return None
    reach = (t_quantile(count - 1) + 0.84) * scatter / math.sqrt(count)
    return 1 - math.exp(-reach) * (1 - INDIFFERENT)


def slowed(comparison: Comparison, share: float) -> list[Ratio]:
    """The deployments that are slower by more than `share`: by verdict and by their ratio."""
    return [
        each for each in comparison.deployments if each.verdict == SLOWER and each.ratio < 1 - share
    ]


def two_sided_p(t: float, degrees: float) -> float:
    """The probability that Student's t with `degrees` of freedom is farther from 0 than `t`."""
    return float(2 * stdtr(degrees, -abs(t)))


@dataclass(frozen=True)
class _Cell:
    deployment: str
    same: Mapping[str, Any]
    values: list[float]


def _by_cell(cells: pd.DataFrame, keys: Sequence[str]) -> dict[tuple[Any, ...], _Cell]:
    speeds = cells[FIGURE].astype("Float64").to_numpy(float, na_value=math.nan)
    # What others have measured cannot be certified; it is only here because it was asked for.
    imported = np.array([origin != OWN for origin in _origins(cells)], dtype=bool)
    certified = cells["valid"].eq(True).fillna(False).to_numpy(bool)
    usable = cells["verdict"].eq(OK).to_numpy(bool) & (certified | imported)
    usable &= ~np.isnan(speeds)
    cells = cells.assign(**{each: None for each in _SAME if each not in cells})  # of older versions
    names = cells["deployment"].tolist()
    plain, same = (
        [cells[key].astype(object).where(cells[key].notna(), None).tolist() for key in wanted]
        for wanted in (keys, _SAME)
    )
    protocols = cells["protocol"].tolist()
    found: dict[tuple[Any, ...], _Cell] = {}
    for place, key in enumerate(zip(*plain, strict=True)):
        # A load that lasts for a time has as many requests as come.
        asked = {name: own[place] for name, own in zip(_SAME, same, strict=True)}
        if protocols[place] != "burst":
            asked["requests"] = None
        cell = found.setdefault(key, _Cell(str(names[place]), asked, []))
        if usable[place]:
            cell.values.append(float(speeds[place]))
    return found


def _differing(one: _Cell, other: _Cell) -> str | None:
    for name, value in one.same.items():
        if None not in (value, other.same[name]) and value != other.same[name]:
            return f"{name} is {value} in the first, {other.same[name]} in the second"
    return None


def _of_trials(name: str, first: Sequence[float], second: Sequence[float]) -> Ratio:
    one, other = ([math.log(each) for each in values] for values in (first, second))
    change = statistics.fmean(other) - statistics.fmean(one)
    count = min(len(one), len(other))
    if count < 2:
        return Ratio(name, math.exp(change), None, None, None, count, None)
    parts = [statistics.variance(each) / len(each) for each in (one, other)]
    error = math.sqrt(sum(parts))
    # Welch and Satterthwaite's degrees of freedom.
    below = sum(part**2 / (len(each) - 1) for part, each in zip(parts, (one, other), strict=True))
    degrees = sum(parts) ** 2 / below if below else 1.0
    scatter = math.sqrt(sum(statistics.variance(each) for each in (one, other)) / 2)
    return _tested(name, change, error, degrees, count, scatter)


def _of_cells(name: str, cells: Sequence[Ratio]) -> Ratio:
    changes = [math.log(each.ratio) for each in cells]
    change, count = statistics.fmean(changes), len(changes)
    if count < 2:
        only = cells[0]
        return Ratio(name, only.ratio, only.low, only.high, only.p, 1, None)
    scatter = statistics.stdev(changes)
    return _tested(name, change, scatter / math.sqrt(count), count - 1, count, scatter)


def _tested(
    name: str, change: float, error: float, degrees: float, count: int, scatter: float
) -> Ratio:
    beyond = abs(change) - math.log1p(INDIFFERENT)
    t = beyond / error if error else math.inf
    p = two_sided_p(t, degrees) if beyond > 0 else 1.0
    # The same statistic and degrees of freedom as for p, so that the two never contradict.
    reach = t_quantile(degrees) * error if error else 0.0
    low, high = math.exp(change - reach), math.exp(change + reach)
    return Ratio(name, math.exp(change), low, high, p, count, scatter)


def _check_same_kind(first: pd.DataFrame, second: pd.DataFrame, allow_mixed: bool) -> None:
    kinds = [
        {
            (engine == EMULATED, None if pd.isna(scale) else float(scale), origin)
            for engine, scale, origin in zip(
                each["engine"], each["time_scale"], _origins(each), strict=True
            )
        }
        for each in (first, second)
    ]
    if kinds[0] != kinds[1] and not allow_mixed:
        kinds_text = " and ".join(" with ".join(sorted(map(_kind, kind))) for kind in kinds)
        raise ComparisonError(
            f"the studies are not of the same kind: {kinds_text}. To compare them "
            "anyway, add --allow-mixed."
        )


def _notes(*studies: pd.DataFrame) -> list[str]:
    """Whose figures are emulated, or of other clients."""
    by_note: dict[str, list[str]] = {}
    for place, cells in zip(("The first study", "The second study"), studies, strict=True):
        others = sorted({*_origins(cells)} - {OWN})
        imported = [f"Measured by {each}, not certified." for each in others]
        for note in [*emulation_notes(cells), *imported]:
            by_note.setdefault(note, []).append(place)
    return [
        f"{places[0] if len(places) == 1 else 'Both studies'}: {note[0].lower()}{note[1:]}"
        for note, places in by_note.items()
    ]


def _origins(cells: pd.DataFrame) -> list[str]:
    """Who measured each; older tables do not say it, and hold nothing else than our own."""
    return list(cells["origin"].fillna(OWN)) if "origin" in cells else [OWN] * len(cells)


def _kind(kind: tuple[bool, float | None, str]) -> str:
    emulated, scale, origin = kind
    if not emulated:
        return f"measured by {origin}"
    return "emulated" if scale is None else f"emulated at {scale:g} × time"


def _format_cell(key: Sequence[Any]) -> str:
    """`mistral-7b_fp16, burst, 8 requests at once, 31 + 100 tokens`."""
    *deployment, protocol, concurrency, rate, input_len, output_len = key
    workload = f"{concurrency} at once" if concurrency is not None else f"{rate:g} per second"
    name = " ".join(map(str, deployment))
    return f"{name}, {protocol}, {workload}, {input_len} + {output_len} tokens"


def power(comparison: Comparison) -> Mapping[str, Mapping[int, float | None]]:
    """For each deployment the slow-down that would be found with 1, 3 and 5 trials per cell.

    Its cells' ratios scatter with one over the root of the trials that they are means of: the part
    of the scatter that trials have by themselves shrinks, and as much as is left may be of loads.
    """
    trials = max((each.count for each in comparison.cells), default=1)
    return {
        each.name: {
            wanted: None
            if each.scatter is None
            else detectable(each.scatter * math.sqrt(max(trials, 1) / wanted), each.count)
            for wanted in (1, 3, 5)
        }
        for each in comparison.deployments
    }
