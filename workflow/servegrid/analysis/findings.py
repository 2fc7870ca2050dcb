"""The findings of a study: the concurrency that meets the SLO, and how latency grows. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from servegrid.analysis import tables
from servegrid.records import columns
from servegrid.study.grid import CONCURRENCY_PROTOCOLS

LINEAR_EXPONENT = math.log2(1.8)
"""From this exponent on, time counts as linear in the concurrency. Work that is strictly shared has
the exponent 1, a factor of 2 per doubling; a tenth less can be noise."""


@dataclass(frozen=True)
class Slo:
    """The service level objective: what every user must get.

    `tokens_per_s_per_user` is a minimum and includes the time to first token. `ttft_s` and `e2el_s`
    are maxima of the median latencies; None means no limit.
    """

    tokens_per_s_per_user: float = 5.0
    ttft_s: float | None = None
    e2el_s: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.tokens_per_s_per_user:g} tokens/s"]
        if self.ttft_s is not None:
            parts.append(f"the first token within {self.ttft_s:g} s")
        if self.e2el_s is not None:
            parts.append(f"the last token within {self.e2el_s:g} s")
        return ", ".join(parts)


def parse_slo(study: Mapping[str, Any]) -> Slo:
    """The SLO in a study's configuration, which matches the schema."""
    return Slo(**study.get("slo", {}))


def compute_frontier(summary: pd.DataFrame, slo: Slo) -> pd.DataFrame:
    """A table of `columns.FRONTIER`, one row per deployment, workload and prompt length.

    `summary` is a table of `columns.SUMMARY`. A cell that is not valid counts as served, but does
    not meet the SLO.
    """
    keys = ["deployment", "engine", "protocol", "output_len", "input_len"]
    cells = summary[summary["protocol"].isin(CONCURRENCY_PROTOCOLS)]
    rows = [
        dict(zip(keys, key, strict=True)) | _limits(rows.sort_values("concurrency"), slo)
        for key, rows in cells.groupby(keys, sort=False)
    ]
    return tables.from_rows(rows, columns.FRONTIER)


def knee(times: Mapping[int, float]) -> int | None:
    """The concurrency from which on time grows linearly; None if there is none.

    `times` are seconds by concurrency. The knee is the lowest concurrency from which every further
    step has d log(time) / d log(concurrency) of at least LINEAR_EXPONENT.
    """
    levels = sorted(times)
    found = None
    for lower, higher in reversed(list(itertools.pairwise(levels))):
        exponent = math.log(times[higher] / times[lower]) / math.log(higher / lower)
        if exponent < LINEAR_EXPONENT:
            break
        found = lower
    return found


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
        times = cells.dropna(subset="seconds_per_100_tokens").pivot(
            index="concurrency", columns="input_len", values="seconds_per_100_tokens"
        )
        sentences = [_describe_limits(limits, slo)]
        if not times.empty:
            sentences += [_describe_growth(times, limits), _describe_prompts(times)]
        title = f"{titles.get(str(name), name)}, {protocol}"
        texts.append(f"{title}: " + " ".join(filter(None, sentences)))
    return texts


def _limits(cells: pd.DataFrame, slo: Slo) -> dict[str, Any]:
    """The values of one row of the frontier. `cells` are sorted by concurrency."""
    levels = cells["concurrency"].astype(int).tolist()
    served = cells.loc[cells["trials_served"] > 0, "concurrency"]
    max_served = None if served.empty else int(served.max())
    meets_slo = _meets_slo(cells, slo).tolist()
    first_failure = meets_slo.index(False) if False in meets_slo else len(meets_slo)
    max_within_slo = levels[first_failure - 1] if first_failure else None
    known = cells.dropna(subset="seconds_per_100_tokens")
    times = dict(
        zip(
            known["concurrency"].astype(int),
            known["seconds_per_100_tokens"].astype(float),
            strict=True,
        )
    )
    return {
        "max_served": max_served,
        "max_served_is_lower_bound": None if max_served is None else max_served == levels[-1],
        "max_within_slo": max_within_slo,
        "max_within_slo_is_lower_bound": None
        if max_within_slo is None
        else max_within_slo == levels[-1],
        "knee": knee(times),
    }


def _meets_slo(cells: pd.DataFrame, slo: Slo) -> pd.Series[bool]:
    meets = cells["trials_valid"] > 0
    scale = cells["time_scale"].fillna(1.0).astype(float)
    speed = cells["output_tokens_per_s_per_user"].astype(float) * scale
    meets &= speed.ge(slo.tokens_per_s_per_user)
    for column, maximum in (("ttft_s_p50", slo.ttft_s), ("e2el_s_p50", slo.e2el_s)):
        if maximum is not None:
            meets &= (cells[column].astype(float) / scale).le(maximum)
    return meets.astype(bool)


def _describe_limits(limits: pd.DataFrame, slo: Slo) -> str:
    """The highest concurrency that meets the SLO, for the shortest and the longest prompts."""
    parts = []
    for row in (limits.iloc[0], limits.iloc[-1]) if len(limits) > 1 else (limits.iloc[0],):
        highest = row["max_within_slo"]
        text = "none" if pd.isna(highest) else str(highest)
        if not pd.isna(highest) and row["max_within_slo_is_lower_bound"]:
            text = f"at least {text}"
        parts.append(f"{text} with prompts of {row['input_len']} tokens")
    return f"Highest concurrency that meets the SLO ({slo}): {', '.join(parts)}."


def _describe_growth(times: pd.DataFrame, limits: pd.DataFrame) -> str:
    length = times.columns[0]
    seconds = times[length].dropna().astype(float)
    if len(seconds) < 2:
        return ""
    bend = limits.set_index("input_len")["knee"].get(length)
    linear = (
        "The growth is not linear at the highest concurrency."
        if bend is None or pd.isna(bend)
        else f"The growth is linear from concurrency {bend} on."
    )
    return (
        f"With prompts of {length} tokens, the time grows by a factor of "
        f"{seconds.iloc[-1] / seconds.iloc[0]:.2g} from concurrency {seconds.index[0]} to "
        f"{seconds.index[-1]}. {linear}"
    )


def _describe_prompts(times: pd.DataFrame) -> str:
    complete = times.dropna(axis="columns", how="all").dropna()
    if complete.empty or len(complete.columns) < 2:
        return ""
    shortest, longest = complete.columns[0], complete.columns[-1]
    ratios = (complete[longest] / complete[shortest]).astype(float)
    return (
        f"Prompts of {longest} tokens take {ratios.iloc[0]:.2g} × the time of prompts of "
        f"{shortest} tokens at concurrency {ratios.index[0]}, and {ratios.iloc[-1]:.2g} × at "
        f"concurrency {ratios.index[-1]}."
    )
