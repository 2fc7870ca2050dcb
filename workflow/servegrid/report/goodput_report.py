"""Attainment, goodput and saturation as texts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from servegrid.analysis.titles import protocol_title
from servegrid.report.markup import as_markdown, bullets
from servegrid.study.text import pluralize

CAPTION = (
    "Attainment: share of the requests that meet the SLO, with its 95% interval; a failed request "
    "misses it. Goodput: requests per second that meet it. Marked with *: there was no stationary "
    "part, so all requests of the run count, and the values depend on its length."
)
INVALID = "Marked with !: no trial is valid."


def slo_texts(slo: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """A table of `columns.SLO` as texts. `titles` are those of the deployments by name."""
    return pd.DataFrame([_row(row, titles) for row in slo.to_dict("records")], columns=list(HEAD))


HEAD = (
    *("deployment", "workload", "prompt tokens", "load", "SLO class"),
    *("attainment", "goodput (requests/s)", "answered (requests/s)"),
)


def _row(row: Mapping[Any, Any], titles: Mapping[str, str]) -> list[str]:
    mark = ("*" if row["whole_run"] is True else "") + ("" if row["valid"] else "!")
    attainment = [row[f"slo_attainment{end}"] for end in ("", "_low", "_high")]
    goodput = [row[f"goodput_requests_per_s{end}"] for end in ("", "_low", "_high")]
    workload = f"{protocol_title(row['protocol'])}, {row['output_len']} output tokens"
    return [
        titles.get(row["deployment"], row["deployment"]),
        workload,
        str(row["input_len"]),
        _load(row),
        row["slo_class"],
        f"{_with_range(attainment, 100, '%')}{mark}",
        f"{_with_range(goodput, 1, '')}{mark}",
        "–" if pd.isna(row["requests_per_s"]) else f"{row['requests_per_s']:.3g}",
    ]


def _load(row: Mapping[Any, Any]) -> str:
    """The requests or users at a time, or the rate; a dash for a sweep's rate that is not known."""
    if not pd.isna(row["concurrency"]):
        return pluralize(row["concurrency"], "request" if row["protocol"] == "burst" else "user")
    return "–" if pd.isna(row["request_rate"]) else f"{row['request_rate']:.3g} requests/s"


def _with_range(values: Sequence[Any], factor: float, unit: str) -> str:
    if pd.isna(values[0]):
        return "–"
    value, low, high = (None if pd.isna(each) else f"{factor * each:.3g}" for each in values)
    return f"{value}{unit}" + (f" [{low}, {high}]" if low is not None else "")


def describe_classes(slo: pd.DataFrame) -> list[str]:
    """One sentence per SLO class with its limits, from a table of `columns.SLO`."""
    classes = slo.drop_duplicates("slo_class")
    return [f"{row['slo_class']}: {row['slo']}." for row in classes.to_dict("records")]


def describe_saturation(saturation: pd.DataFrame, titles: Mapping[str, str]) -> list[str]:
    """One sentence per row of a table of `columns.SATURATION`."""
    return [_saturation(row, titles) for row in saturation.to_dict("records")]


def _saturation(row: Mapping[Any, Any], titles: Mapping[str, str]) -> str:
    name = titles.get(row["deployment"], row["deployment"])
    prefix = (
        f"{name}, {protocol_title(row['protocol'])}, prompts of "
        f"{pluralize(row['input_len'], 'token')}, {pluralize(row['output_len'], 'output token')}: "
    )
    below, above = row["rate_followed"], row["rate_not_followed"]
    if pd.isna(below):
        return f"{prefix}already saturated at {above:.3g} requests/s, the lowest measured rate."
    if pd.isna(above):
        return f"{prefix}not saturated up to {below:.3g} requests/s, the highest measured rate."
    return f"{prefix}becomes saturated between {below:.3g} and {above:.3g} requests/s."


def render_slo(
    slo: pd.DataFrame, saturation: pd.DataFrame, titles: Mapping[str, str], notes: Sequence[str]
) -> str:
    """Attainment, goodput and saturation as Markdown. `notes` come first."""
    blocks = ["# SLO attainment and goodput", *notes, bullets(describe_classes(slo)).rstrip()]
    if len(saturation):
        blocks += ["## Saturation", bullets(describe_saturation(saturation, titles)).rstrip()]
    blocks += [CAPTION, INVALID, as_markdown(slo_texts(slo, titles)).rstrip()]
    return "\n\n".join(blocks) + "\n"
