"""The findings of a study: the load that meets the SLO, and how latency grows. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from servegrid.analysis import tables
from servegrid.analysis.intervals import Interval, t_quantile
from servegrid.analysis.latency_curves import (
    allowed_in_flight,
    latency_curves,
    requests_in_flight,
)
from servegrid.analysis.slo import Slo
from servegrid.analysis.summary import tried_cells
from servegrid.records import columns
from servegrid.study.grid import CONCURRENCY_PROTOCOLS

MAX_RESIDUAL = 0.10
"""A straight line fits if no measured time differs from it by more than this fraction."""


def compute_frontier(summary: pd.DataFrame, slo: Slo) -> pd.DataFrame:
    """A table of `columns.FRONTIER`, one row per deployment, workload and prompt length.

    `summary` is a table of `columns.SUMMARY`. The number of requests in flight that meets the SLO
    is interpolated as in the capacity plan, so it is the same number there.
    """
    keys = ["deployment", "engine", "protocol", "output_len", "input_len"]
    known = tried_cells(summary, slo)
    cells = known[known["protocol"].isin(CONCURRENCY_PROTOCOLS)]
    rows = [
        dict(zip(keys, key, strict=True))
        | _max_served(rows)
        | _max_within_slo(rows, slo)
        | _n_half(rows)
        for key, rows in cells.groupby(keys, sort=False)
    ]
    return tables.from_rows(rows, columns.FRONTIER)


@dataclass(frozen=True)
class LinearFit:
    """T(n) = `base_s` + `slope_s` n, the time of a request with n in flight.

    `interval` is the 95% interval of `n_half`; its upper end is infinite if the slope may be 0.
    `residual` is the largest relative difference between a measured time and the line.
    """

    base_s: float
    slope_s: float
    interval: Interval
    residual: float

    @property
    def n_half(self) -> float:
        """With so many in flight, the server has half of the throughput that it approaches with
        more, 1 / `slope_s` (R. W. Hockney's n½ and r∞, 1982)."""
        return self.base_s / self.slope_s


def fit_line(in_flight: Sequence[float], seconds: Sequence[float]) -> LinearFit | None:
    """The line through times by load; None for fewer than three loads, or if the slope or the time
    at no load is not > 0: the throughput then has no limit, or falls with the load.

    Least squares of the relative differences, because noise changes times by a factor. The interval
    of the ratio is Fieller's (Some problems in interval estimation, 1954), with Student's t at two
    degrees of freedom fewer than points.
    """
    if len(set(in_flight)) < 3:
        return None
    n, times = np.array(in_flight, float), np.array(seconds, float)
    design = np.column_stack([1 / times, n / times])
    (base, slope), *_ = np.linalg.lstsq(design, np.ones_like(times), rcond=None)
    if slope <= 0 or base <= 0:
        return None
    differences = 1 - design @ [base, slope]
    degrees = len(times) - 2
    covariance = float(differences @ differences) / degrees * np.linalg.inv(design.T @ design)
    interval = _fieller(float(base), float(slope), covariance, t_quantile(degrees))
    residual = float(np.abs(differences).max())
    return LinearFit(float(base), float(slope), interval, residual)


def _fieller(top: float, bottom: float, covariance: Any, t: float) -> Interval:
    """The positive part of the interval of top / bottom: all x with |top - x bottom| within t
    standard errors of 0, so a x² - 2 b x + c ≤ 0. It has no upper end if `bottom` may be 0.
    """
    a = bottom**2 - t**2 * covariance[1, 1]
    b = top * bottom - t**2 * covariance[0, 1]
    c = top**2 - t**2 * covariance[0, 0]
    root = math.sqrt(max(b**2 - a * c, 0.0))
    if a > 0:
        return max(0.0, (b - root) / a), (b + root) / a
    return (b - root) / a if a < 0 < c else 0.0, math.inf


def describe_findings(
    summary: pd.DataFrame, frontier: pd.DataFrame, slo: Slo, titles: Mapping[str, str]
) -> list[str]:
    """The findings as sentences: one text per deployment, protocol and output length.

    `frontier` is the frontier of `summary`. `titles` are the titles of the deployments by name.
    """
    texts = []
    for (name, protocol, output_len), limits in frontier.groupby(
        ["deployment", "protocol", "output_len"], sort=False
    ):
        cells = summary[
            (summary["deployment"] == name)
            & (summary["protocol"] == protocol)
            & (summary["output_len"] == output_len)
        ]
        # A sentence has no mark for values that are not valid.
        valid = cells[cells["trials_valid"].fillna(0) > 0]
        times = valid.dropna(subset="seconds_per_100_tokens").pivot(
            index="concurrency", columns="input_len", values="seconds_per_100_tokens"
        )
        sentences = [_describe_limits(limits, slo), _describe_left_out(cells, limits)]
        if not times.empty:
            sentences += [_describe_growth(times, limits), _describe_prompts(times)]
        title = f"{titles.get(str(name), name)}, {protocol}"
        texts.append(f"{title}: " + " ".join(filter(None, sentences)))
    return texts


def _max_served(cells: pd.DataFrame) -> dict[str, Any]:
    served = cells.loc[cells["trials_served"] > 0, "concurrency"]
    if served.empty:
        return {}
    highest = int(served.max())
    is_bound = highest == int(cells["concurrency"].max())
    return {"max_served": highest, "max_served_is_lower_bound": is_bound}


def _max_within_slo(cells: pd.DataFrame, slo: Slo) -> dict[str, Any]:
    """The load that meets the SLO, of the cells of one prompt length."""
    curves = latency_curves(cells, None, slo)
    if isinstance(curves, str):
        return {"reason": curves}
    highest = len(curves.seconds[0])
    found, low, high = (
        None if rows is None else allowed_in_flight(curves, rows, slo)[0]
        for rows in (curves.seconds, curves.slow, curves.fast)
    )
    return {
        "max_within_slo": found or None,
        "max_within_slo_low": low,
        "max_within_slo_high": high,
        "max_within_slo_is_lower_bound": (found == highest and curves.untested_above)
        if found
        else None,
    }


def _n_half(cells: pd.DataFrame) -> dict[str, Any]:
    known = cells[cells["trials_valid"] > 0].dropna(subset="seconds_per_100_tokens")
    loads = requests_in_flight(known).tolist()
    fit = fit_line(loads, known["seconds_per_100_tokens"].astype(float).tolist())
    if fit is None:
        return {}
    row: dict[str, Any] = {"linear_fit_residual": fit.residual}
    if fit.residual <= MAX_RESIDUAL:
        ends = dict(zip(("n_half_low", "n_half_high"), fit.interval, strict=True))
        row |= {"n_half": fit.n_half, **ends}
    return row


def _describe_limits(limits: pd.DataFrame, slo: Slo) -> str:
    """The load that meets the SLO, for the shortest and the longest prompts."""
    parts = []
    rows = limits.to_dict("records")
    for row in (rows[0], rows[-1]) if len(rows) > 1 else rows:
        parts.append(f"{format_max_within_slo(row)} with prompts of {row['input_len']} tokens")
    return f"Most requests in flight that meet the SLO ({slo}): {', '.join(parts)}."


def _describe_left_out(cells: pd.DataFrame, limits: pd.DataFrame) -> str:
    """The prompt lengths that the table `frontier` does not have; see `summary.tried_cells`."""
    lengths = sorted(set(cells["input_len"]) - set(limits["input_len"]))
    if not lengths:
        return ""
    return (
        f"The search decided prompts of {', '.join(map(str, lengths))} tokens by cells of other "
        "lengths: `servegrid frontier` shows them."
    )


def format_max_within_slo(row: Mapping[Any, Any]) -> str:
    """`118 [112, 124]`, `at least 128`, `none` or `unknown (reason)`, from a row of
    `columns.FRONTIER`.

    An end of the range that is the highest measured load is `at least` this load.
    """
    if not pd.isna(row["reason"]):
        return f"unknown ({row['reason']})"
    highest, low, high = (row[f"max_within_slo{end}"] for end in ("", "_low", "_high"))
    if pd.isna(highest):
        return "none"
    text = f"at least {highest}" if row["max_within_slo_is_lower_bound"] else f"{highest}"
    if pd.isna(low) or pd.isna(high) or (low == highest and row["max_within_slo_is_lower_bound"]):
        return text
    is_open = row["max_served_is_lower_bound"] and high >= row["max_served"]
    is_open |= row["max_within_slo_is_lower_bound"]
    return f"{text} [{low}, {'at least ' if is_open else ''}{high}]"


def _describe_growth(times: pd.DataFrame, limits: pd.DataFrame) -> str:
    length = times.columns[0]
    seconds = times[length].dropna().astype(float)
    if len(seconds) < 2:
        return ""
    row = next(iter(limits[limits["input_len"] == length].to_dict("records")), None)
    text = (
        f"With prompts of {length} tokens, the time grows by a factor of "
        f"{seconds.iloc[-1] / seconds.iloc[0]:.2g} from concurrency {seconds.index[0]} to "
        f"{seconds.index[-1]}."
    )
    if row is None:  # a search has decided this length by other ones
        return text
    if not pd.isna(row["n_half"]):
        text += (
            " It grows linearly: the throughput reaches half of its limit with "
            f"{format_n_half(row)} requests in flight."
        )
    elif not pd.isna(row["linear_fit_residual"]):
        text += (
            " It does not grow linearly: measured times differ from a straight line by up to "
            f"{row['linear_fit_residual']:.0%}."
        )
    return text


def format_n_half(row: Mapping[Any, Any]) -> str:
    """`24 [20, 29]`, from a row of `columns.FRONTIER`; `–` if it is not known."""
    if pd.isna(row["n_half"]):
        return "–"
    high = "∞" if math.isinf(row["n_half_high"]) else f"{row['n_half_high']:.2g}"
    return f"{row['n_half']:.2g} [{row['n_half_low']:.2g}, {high}]"


def _describe_prompts(times: pd.DataFrame) -> str:
    complete = times.dropna(axis="columns", how="all").dropna()
    if complete.empty or len(complete.columns) < 2:
        return ""
    shortest, longest = complete.columns[0], complete.columns[-1]
    ratios = (complete[longest] / complete[shortest]).astype(float)
    text = (
        f"Prompts of {longest} tokens take {ratios.iloc[0]:.2g} × the time of prompts of "
        f"{shortest} tokens at concurrency {ratios.index[0]}"
    )
    if len(ratios) > 1:
        text += f", and {ratios.iloc[-1]:.2g} × at concurrency {ratios.index[-1]}"
    return f"{text}."
