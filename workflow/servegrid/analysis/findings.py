"""What a study found, computed: how time grows, and up to which load it serves. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from servegrid.analysis import tables
from servegrid.analysis.capacity import CLOSED
from servegrid.records import columns

LINEAR = math.log2(1.8)
"""The exponent of growth from which time counts as linear in the number of requests: work that is
strictly shared has 1; a tenth less per doubling is of the size of noise."""


@dataclass(frozen=True)
class Slo:
    """What a user must get: at least so many tokens per second, the time for the prompt included,
    and at most so many seconds until the first and the last token, medians; None is no limit."""

    tokens_per_s_per_user: float = 5.0
    ttft_s: float | None = None
    e2el_s: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.tokens_per_s_per_user:g} tokens/s"]
        if self.ttft_s is not None:
            parts.append(f"the first token within {self.ttft_s:g} s")
        if self.e2el_s is not None:
            parts.append(f"the last within {self.e2el_s:g} s")
        return ", ".join(parts)


def parse_slo(study: Mapping[str, Any]) -> Slo:
    """The SLO of a study's configuration; it fits the schema."""
    return Slo(**study.get("slo", {}))


def frontier(summary: pd.DataFrame, slo: Slo) -> pd.DataFrame:
    """How far each deployment goes: a row of `columns.FRONTIER` for each prompt length.

    `summary` has the columns of `columns.SUMMARY`. Cells that are not valid count as served,
    and not as within the SLO.
    """
    keys = ["deployment", "engine", "protocol", "output_len", "input_len"]
    closed = summary[summary["protocol"].isin(CLOSED)]
    rows = [
        dict(zip(keys, key, strict=True)) | _reach(own.sort_values("concurrency"), slo)
        for key, own in closed.groupby(keys, sort=False)
    ]
    frame = pd.DataFrame(rows, columns=[column.name for column in columns.FRONTIER])
    return tables.typed(frame.astype(object).where(frame.notna(), None), columns.FRONTIER)


def knee(times: Mapping[int, float]) -> int | None:
    """From which number of requests on time grows linearly, None where it does not.

    `times` are seconds by requests at once. It is the first from which every further step has
    d log(time) / d log(requests) of at least LINEAR.
    """
    levels = sorted(times)
    found = None
    for fewer, more in reversed(list(itertools.pairwise(levels))):
        if math.log(times[more] / times[fewer]) / math.log(more / fewer) < LINEAR:
            break
        found = fewer
    return found


def statements(
    summary: pd.DataFrame, reach: pd.DataFrame, slo: Slo, titles: Mapping[str, str]
) -> list[str]:
    """What was found of each deployment and closed-loop load, in sentences made from its figures.

    `reach` is the frontier of `summary`; `titles` are the deployments' names for people.
    """
    sentences_of_all = []
    for (name, protocol, output_len), own in reach.groupby(
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
        sentences = [_reached(own, slo)]
        if not times.empty:
            sentences += [_growth(times, own), _prompts(times)]
        title = f"{titles.get(str(name), name)}, {protocol}"
        sentences_of_all.append(f"{title}: " + " ".join(filter(None, sentences)))
    return sentences_of_all


def _reach(own: pd.DataFrame, slo: Slo) -> dict[str, Any]:
    levels = own["concurrency"].astype(int).tolist()
    served = own.loc[own["trials_served"] > 0, "concurrency"]
    most_served = None if served.empty else int(served.max())
    kept = _within(own, slo).tolist()
    first_broken = kept.index(False) if False in kept else len(kept)
    within = levels[first_broken - 1] if first_broken else None
    figures = own.dropna(subset="seconds_per_100_tokens")
    times = dict(
        zip(
            figures["concurrency"].astype(int),
            figures["seconds_per_100_tokens"].astype(float),
            strict=True,
        )
    )
    return {
        "max_served": most_served,
        "max_served_is_lower_bound": None if most_served is None else most_served == levels[-1],
        "max_within_slo": within,
        "max_within_slo_is_lower_bound": None if within is None else within == levels[-1],
        "knee": knee(times),
    }


def _within(own: pd.DataFrame, slo: Slo) -> pd.Series[bool]:
    kept = own["trials_valid"] > 0
    scale = own["time_scale"].fillna(1.0).astype(float)
    speed = own["output_tokens_per_s_per_user"].astype(float) * scale
    kept &= speed.ge(slo.tokens_per_s_per_user)
    for column, most in (("ttft_s_p50", slo.ttft_s), ("e2el_s_p50", slo.e2el_s)):
        if most is not None:
            kept &= (own[column].astype(float) / scale).le(most)
    return kept.astype(bool)


def _reached(own: pd.DataFrame, slo: Slo) -> str:
    """`Each gets 5 tokens/s with up to 64 requests at once of 31 prompt tokens, 16 of 2193.`"""
    parts = []
    for row in (own.iloc[0], own.iloc[-1]) if len(own) > 1 else (own.iloc[0],):
        most = row["max_within_slo"]
        least = "at least " if not pd.isna(most) and row["max_within_slo_is_lower_bound"] else ""
        count = "none" if pd.isna(most) else f"{least}{most}"
        parts.append(f"{count} of {row['input_len']} prompt tokens")
    return f"Requests at once that get {slo}: {', '.join(parts)}."


def _growth(times: pd.DataFrame, own: pd.DataFrame) -> str:
    length = times.columns[0]
    column = times[length].dropna().astype(float)
    if len(column) < 2:
        return ""
    fewest, most = column.index[0], column.index[-1]
    bend = own.set_index("input_len")["knee"].get(length)
    linear = (
        "nowhere as fast as their number"
        if bend is None or pd.isna(bend)
        else f"as fast as their number from {bend} on"
    )
    return (
        f"From {fewest} to {most} of {length} prompt tokens the time grows "
        f"{column.iloc[-1] / column.iloc[0]:.2g}-fold, {linear}."
    )


def _prompts(times: pd.DataFrame) -> str:
    whole = times.dropna(axis="columns", how="all").dropna()
    if whole.empty or len(whole.columns) < 2:
        return ""
    shortest, longest = whole.columns[0], whole.columns[-1]
    ratios = (whole[longest] / whole[shortest]).astype(float)
    return (
        f"Prompts of {longest} tokens take {ratios.iloc[0]:.2g} × the time of {shortest} with "
        f"{ratios.index[0]} at once and {ratios.iloc[-1]:.2g} × with {ratios.index[-1]}."
    )
