"""What the page shows, as plain data: its script draws from this and from nothing else. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from servegrid.analysis.capacity import CLOSED, Demand, Hardware
from servegrid.analysis.titles import (
    EMULATED,
    axis_title,
    deployment_titles,
    emulation_notes,
    hardware_title,
    load_title,
    with_intensity,
)
from servegrid.records.columns import SUMMARISED

Json = Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#777777")
"""Okabe and Ito's, as in the figures; grey in place of black, to be seen in the dark as well."""


@dataclass(frozen=True)
class Metric:
    """A figure that can be chosen. `factor` turns the column's unit into the one shown."""

    column: str
    title: str
    unit: str
    more_is_better: bool
    factor: float = 1.0


METRICS = (
    Metric("output_tokens_per_s_per_user", "output tokens/s per user", "tokens/s", True),
    Metric("output_tokens_per_s", "output tokens/s, all users", "tokens/s", True),
    Metric("seconds_per_100_tokens", "seconds per 100 tokens", "s", False),
    Metric("ttft_s_p50", "time to first token, median", "s", False),
    Metric("tpot_s_p50", "time per output token, median", "ms", False, 1e3),
    Metric("itl_s_p50", "inter-token latency, median", "ms", False, 1e3),
    Metric("e2el_s_p50", "end-to-end latency, median", "s", False),
    Metric("memory_peak_bytes", "peak memory", "GiB", False, 2.0**-30),
    Metric("power_w_mean", "mean power of the GPUs", "W", False),
    Metric("energy_j_per_output_token", "energy per output token", "J", False),
)

RATIO = Metric("published_ratio", "seconds per 100 tokens / published ones", "×", False)
"""The figure that cells have which were published, too; 1 is alike."""


def payload_of(
    name: str,
    summary: pd.DataFrame,
    cells: pd.DataFrame,
    pairs: pd.DataFrame,
    demand: Demand,
    hardware: Hardware,
) -> dict[str, Json]:
    """All that was measured and what is asked.

    `summary`, `cells` and `pairs` are tables of `columns.SUMMARY`, `CELLS` and `BESIDE`.
    """
    ratios = {
        tuple(row[key] for key in _PAIRED): [row["ratio"], row["ratio_low"], row["ratio_high"]]
        for row in pairs.to_dict("records")
    }
    metrics = [metric for metric in METRICS if summary[metric.column].notna().any()]
    titles = deployment_titles(cells)
    places = {deployment: place for place, deployment in enumerate(titles)}
    workloads = _loads(summary)
    return {
        "study": name,
        "notes": emulation_notes(cells),
        "metrics": [asdict(metric) for metric in metrics + [RATIO] * bool(ratios)],
        "loads": [_load(*workload) for workload in workloads],
        "deployments": [
            _deployment(deployment, titles[deployment], place, summary)
            for deployment, place in places.items()
        ],
        "cells": [
            _cell(row, places, workloads, ratios)
            for row in with_intensity(summary).to_dict(orient="records")
        ],
        "demand": asdict(demand),
        "hardware": asdict(hardware),
    }


def counts_of(summary: pd.DataFrame, cells: pd.DataFrame) -> dict[str, int]:
    """How many there are of what, for the page's first lines."""
    return {
        "deployments": summary["deployment"].nunique(),
        "cells": len(summary),
        "trials": len(cells),
        "served": int((summary["trials_served"] > 0).sum()),
        "valid": int((summary["trials_valid"] > 0).sum()),
        "requests": int(cells["requests"].fillna(0).sum()),
    }


def state_of(row: Mapping[Any, Any]) -> str:
    """Whether the figures of a row of a summary may be believed, or why there are none."""
    if row["trials_served"] == 0:
        return "not served"
    if _known(row["seconds_per_100_tokens"]) is None and _known(row["output_tokens_per_s"]) is None:
        return "no figure"
    return "valid" if row["trials_valid"] > 0 else "not valid"


def _loads(summary: pd.DataFrame) -> list[tuple[str, int]]:
    return list(summary[["protocol", "output_len"]].drop_duplicates().itertuples(index=False))


def _load(protocol: str, output_len: int) -> dict[str, Json]:
    return {
        "protocol": protocol,
        "output_len": int(output_len),
        "title": load_title(protocol, output_len),
        "closed": protocol in CLOSED,
        "axis": axis_title(protocol),
    }


def _deployment(name: str, title: str, place: int, summary: pd.DataFrame) -> dict[str, Json]:
    first = summary[summary["deployment"] == name].iloc[0]
    return {
        "name": name,
        "title": title,
        "gpu": first["gpu"],
        "gpu_count": int(first["gpu_count"]),
        "hardware": hardware_title(first["gpu"], first["gpu_count"]),
        "emulated": first["engine"] == EMULATED,
        "time_scale": _known(first["time_scale"]),
        "colour": COLOURS[place % len(COLOURS)],
    }


_PAIRED = ("deployment", "protocol", "concurrency", "input_len", "output_len")


def _cell(
    row: Mapping[Any, Any],
    places: Mapping[str, int],
    workloads: Sequence[tuple[str, int]],
    ratios: Mapping[tuple[Any, ...], list[float]],
) -> dict[str, Json]:
    figures: dict[str, Json] = {}
    if ratio := ratios.get(tuple(row[key] for key in _PAIRED)):
        figures[RATIO.column] = ratio
    for name in SUMMARISED:
        value, low, high = (_known(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
        if value is not None:
            figures[name] = [value] if low is None else [value, low, high]
    return {
        "deployment": places[row["deployment"]],
        "workload": workloads.index((row["protocol"], row["output_len"])),
        "intensity": _known(row["intensity"]),
        "input_len": int(row["input_len"]),
        "trials": [int(row["trials_valid"]), int(row["trials_served"]), int(row["trials"])],
        "state": state_of(row),
        **figures,
    }


def _known(value: Any) -> float | None:
    if value is None or pd.isna(value) or math.isinf(value):
        return None
    return float(value)
