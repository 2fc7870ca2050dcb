"""The data of the page as JSON-compatible values. page.js and planner.js use nothing else. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import Any

import pandas as pd

from servegrid.analysis.capacity import Demand, HardwarePrices
from servegrid.analysis.latency_curves import requests_in_flight
from servegrid.analysis.slo import Slo
from servegrid.analysis.summary import CELL_KEYS, lacks_low_loads, trial_medians
from servegrid.analysis.titles import (
    deployment_titles,
    figure_notes,
    intensity_title,
    stops_early,
    with_intensity,
    workload_title,
)
from servegrid.records.columns import SUMMARY_METRICS
from servegrid.records.verdict import OK
from servegrid.study.deployment import EMULATED

Json = Any
_MAX_REASON = 160

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#777777")
"""Okabe and Ito's colours, as in the figures. Grey replaces black, which dark mode would hide."""


@dataclass(frozen=True)
class PageMetric:
    """A metric that the reader can select.

    `factor` converts the column's unit into `unit`. `title_has_unit` says that the title needs no
    unit after it.
    """

    column: str
    title: str
    unit: str
    more_is_better: bool
    factor: float = 1.0
    title_has_unit: bool = False

    @property
    def label(self) -> str:
        """The title for an axis or a caption, with the unit."""
        return self.title if self.title_has_unit else f"{self.title} ({self.unit})"


METRICS = (
    PageMetric(
        "output_tokens_per_s_per_user", "Output tokens/s per user", "tokens/s", True, 1.0, True
    ),
    PageMetric("output_tokens_per_s", "Output tokens/s, all users", "tokens/s", True, 1.0, True),
    PageMetric("seconds_per_100_tokens", "Seconds per 100 tokens", "s", False, 1.0, True),
    PageMetric("ttft_s_p50", "Time to first token, median", "s", False),
    PageMetric("tpot_s_p50", "Time per output token, median", "ms", False, 1e3),
    PageMetric("itl_s_p50", "Inter-token latency, median", "ms", False, 1e3),
    PageMetric("e2el_s_p50", "End-to-end latency, median", "s", False),
    PageMetric("goodput_requests_per_s", "Goodput: requests that meet the SLO", "requests/s", True),
    PageMetric("slo_attainment", "Requests that meet the SLO", "%", True, 100.0),
    PageMetric("memory_peak_bytes", "Peak memory", "GiB", False, 2.0**-30),
    PageMetric("power_w_mean", "Mean power of the GPUs", "W", False),
    PageMetric("energy_j_per_output_token", "Energy per output token", "J", False),
)

RATIO = PageMetric(
    "published_ratio", "Seconds per 100 tokens, measured / published", "×", False, 1.0, True
)
"""Only cells that were also published have this metric. 1 means no difference."""

EFFICIENCY = (
    PageMetric(
        *("measured_over_bound", "Seconds per 100 tokens, measured / lower bound", "×"),
        *(False, 1.0, True),
    ),
    PageMetric(
        *("measured_over_predicted", "Seconds per 100 tokens, measured / predicted", "×"),
        *(False, 1.0, True),
    ),
)
"""Medians over the valid trials of `columns.CELLS`; `columns.SUMMARY` does not have them."""


def build_payload(
    name: str,
    summary: pd.DataFrame,
    cells: pd.DataFrame,
    pairs: pd.DataFrame,
    demand: Demand,
    hardware: HardwarePrices,
    slo_classes: Mapping[str, Slo] | None = None,
    attainment: pd.DataFrame | None = None,
) -> dict[str, Json]:
    """All data and assumptions of the page.

    `summary`, `cells` and `pairs` are tables of `columns.SUMMARY`, `CELLS` and
    `PUBLISHED_COMPARISON`. Of `cells`, only the verdicts and the columns that titles need are
    used. `attainment` is a table of `columns.SLO`, for the `slo_classes`.
    """
    reasons = _reasons(cells)
    ratios = {
        tuple(row[key] for key in _PAIR_KEYS): [row["ratio"], row["ratio_low"], row["ratio_high"]]
        for row in pairs.to_dict("records")
    }
    metrics = [metric for metric in METRICS if summary[metric.column].notna().any()]
    efficiency = _efficiency(cells)
    metrics += [metric for metric in EFFICIENCY if metric.column in efficiency]
    titles = deployment_titles(cells)
    indices = {deployment: index for index, deployment in enumerate(titles)}
    sparse = lacks_low_loads(summary)
    shown = with_intensity(summary)
    workloads = list_workloads(summary)
    return {
        "study": name,
        "notes": figure_notes(cells),
        "metrics": [
            asdict(metric) | {"label": metric.label} for metric in metrics + [RATIO] * bool(ratios)
        ],
        "workloads": [_workload(*workload) for workload in workloads],
        "deployments": [
            _deployment(deployment, titles[deployment], index, summary)
            | {"lacks_low_loads": deployment in sparse}
            for deployment, index in indices.items()
        ],
        "cells": [
            _cell(row, indices, workloads, ratios)
            | ({"reason": reason} if (reason := reasons.get(_cell_key(row))) else {})
            | {
                name: [each[key]]
                for name, each in efficiency.items()
                if (key := _cell_key(row)) in each
            }
            for row in shown.assign(in_flight=requests_in_flight(shown)).to_dict(orient="records")
        ],
        "slo_classes": {name: asdict(slo) for name, slo in (slo_classes or {}).items()},
        "goodput": [] if attainment is None else _goodput_rows(attainment, indices, workloads),
        "demand": asdict(demand),
        "hardware": asdict(hardware),
    }


def _goodput_rows(
    attainment: pd.DataFrame, indices: Mapping[str, int], workloads: Sequence[tuple[str, int]]
) -> list[dict[str, Json]]:
    """Goodput and throughput of each open loop's cell and SLO class, in requests per second."""
    by_rate = attainment[attainment["request_rate"].notna()]
    return [
        {
            "deployment": indices[row["deployment"]],
            "workload": workloads.index((row["protocol"], row["output_len"])),
            "input_len": int(row["input_len"]),
            "slo_class": row["slo_class"],
            "rate": _known(row["request_rate"]),
            "answered": _known(row["requests_per_s"]),
            "attainment": _known(row["slo_attainment"]),
            "whole_run": row["whole_run"] is True,
            **{
                name: _known(row[f"goodput_requests_per_s{end}"])
                for name, end in (("goodput", ""), ("low", "_low"), ("high", "_high"))
            },
        }
        for row in by_rate.to_dict("records")
    ]


def count_results(summary: pd.DataFrame, cells: pd.DataFrame) -> dict[str, int]:
    """The numbers of deployments, cells, trials, served and valid cells, and requests."""
    return {
        "deployments": summary["deployment"].nunique(),
        "cells": len(summary),
        "trials": len(cells),
        "served": int((summary["trials_served"] > 0).sum()),
        "valid": int((summary["trials_valid"] > 0).sum()),
        "requests": int(cells["requests"].fillna(0).sum()),
    }


def list_workloads(summary: pd.DataFrame) -> list[tuple[str, int]]:
    """Each protocol and output length of a table of `columns.SUMMARY`, in study order.

    Those without a known rate are left out: nothing of them can be drawn.
    """
    shown = with_intensity(summary)
    return list(shown[["protocol", "output_len"]].drop_duplicates().itertuples(index=False))


def _state(row: Mapping[Any, Any]) -> str:
    if row["trials"] == 0:
        return "not run"
    if row["trials_served"] == 0:
        return "not served"
    if _known(row["seconds_per_100_tokens"]) is None and _known(row["output_tokens_per_s"]) is None:
        return "no value"
    return "valid" if row["trials_valid"] > 0 else "not valid"


def _reasons(cells: pd.DataFrame) -> dict[tuple[Any, ...], str]:
    """Why cells were not served, or waited: the first such verdict of their trials."""
    if "verdict" not in cells:
        return {}
    found: dict[tuple[Any, ...], str] = {}
    for row in cells[cells["verdict"] != OK].to_dict("records"):
        detail = row["verdict_detail"]
        text = row["verdict"] if pd.isna(detail) else f"{row['verdict']}: {detail}"
        found.setdefault(_cell_key(row), shorten(" ".join(text.split()), _MAX_REASON))
    return found


def _cell_key(row: Mapping[Any, Any]) -> tuple[Any, ...]:
    """What identifies a cell in the tables of cells and of their summary."""
    values = (row[key] for key in ("deployment", *CELL_KEYS))
    return tuple(None if pd.isna(value) else value for value in values)


def _workload(protocol: str, output_len: int) -> dict[str, Json]:
    return {
        "output_len": int(output_len),
        "title": workload_title(protocol, output_len),
        "axis": intensity_title(protocol),
    }


def _deployment(name: str, title: str, index: int, summary: pd.DataFrame) -> dict[str, Json]:
    rows = summary[summary["deployment"] == name]
    first = rows.iloc[0]
    return {
        "name": name,
        "title": title,
        "gpu": first["gpu"],
        "gpu_count": int(first["gpu_count"]),
        "emulated": first["engine"] == EMULATED,
        "output_len_exact": not stops_early(rows).any(),
        "time_scale": _known(first["time_scale"]),
        "colour": COLOURS[index % len(COLOURS)],
    }


_PAIR_KEYS = ("deployment", "protocol", "concurrency", "input_len", "output_len")


def _efficiency(cells: pd.DataFrame) -> dict[str, dict[tuple[Any, ...], float]]:
    """The columns of EFFICIENCY that have values: the median of each cell.

    As in `columns.SUMMARY`, it is that of the valid trials, or of all if none is valid.
    """
    if "predicted_over_measured" in cells:
        cells = cells.assign(measured_over_predicted=1 / cells["predicted_over_measured"])
    known = {metric.column for metric in EFFICIENCY} & set(cells.columns)
    found = {}
    rows: Any = cells[["deployment", *CELL_KEYS]].to_dict("records")
    keyed = cells.assign(key=pd.Series(map(_cell_key, rows), cells.index, dtype=object))
    for name in sorted(name for name in known if cells[name].notna().any()):
        medians = trial_medians(keyed, "key", name)
        found[name] = {key: each.value for key, each in medians.items() if each.value is not None}
    return found


def _cell(
    row: Mapping[Any, Any],
    indices: Mapping[str, int],
    workloads: Sequence[tuple[str, int]],
    ratios: Mapping[tuple[Any, ...], list[float]],
) -> dict[str, Json]:
    figures: dict[str, Json] = {}
    if ratio := ratios.get(tuple(row[key] for key in _PAIR_KEYS)):
        figures[RATIO.column] = ratio
    for name in SUMMARY_METRICS:
        value, low, high = (_known(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
        if value is not None:
            figures[name] = [value] if low is None else [value, low, high]
    return {
        "deployment": indices[row["deployment"]],
        "workload": workloads.index((row["protocol"], row["output_len"])),
        "intensity": _known(row["intensity"]),
        "in_flight": _known(row["in_flight"]),
        "input_len": int(row["input_len"]),
        "trials": [int(row["trials_valid"]), int(row["trials_served"]), int(row["trials"])],
        "state": _state(row),
        **figures,
    }


def _known(value: Any) -> float | None:
    if value is None or pd.isna(value) or math.isinf(value):
        return None
    return float(value)
