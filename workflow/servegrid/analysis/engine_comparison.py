"""Compares engines that served the same model on the same hardware. Pure."""

from __future__ import annotations

import itertools

import pandas as pd

from servegrid.analysis.titles import deployment_title, stops_early, workload_title

METRIC_TITLES = {
    "output_tokens_per_s": "output tokens/s",
    "ttft_s_p50": "time to first token",
    "e2el_s_p50": "end-to-end latency",
}
COLUMN_TITLES = [
    "model and hardware",
    "workload",
    "deployments",
    "cells",
    *(f"ratio of {title}" for title in METRIC_TITLES.values()),
]


def compare_engines(summary: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of deployments with the same model and hardware and different engines.

    The values are texts, in the columns COLUMN_TITLES. The quantization may differ. A ratio is
    second / first: the median over the cells that are valid in both, with the lowest and the
    highest. `summary` and `cells` are tables of `columns.SUMMARY` and `CELLS`. Emulated cells are
    left out, and cells whose outputs may stop early.
    """
    comparable = summary["time_scale"].isna() & ~stops_early(summary)
    valid = summary[(summary["trials_valid"] > 0) & comparable]
    rows = []
    keys = ["model", "gpu", "gpu_count", "protocol", "output_len"]
    for (model, gpu, gpu_count, protocol, output_len), group in valid.groupby(keys, sort=False):
        by_deployment = dict(iter(group.groupby("deployment", sort=False)))
        for (first, one), (second, other) in itertools.combinations(by_deployment.items(), 2):
            if one["engine"].iloc[0] == other["engine"].iloc[0]:
                continue
            both = one.merge(other, on=["concurrency", "request_rate", "input_len"])
            if not both.empty:
                names = [_title(cells, str(deployment)) for deployment in (first, second)]
                rows.append(
                    [
                        f"{model} on {gpu_count} × {gpu}" if gpu_count else f"{model} on {gpu}",
                        workload_title(str(protocol), int(str(output_len))),
                        " → ".join(names),
                        str(len(both)),
                        *(_ratio(both[f"{name}_y"] / both[f"{name}_x"]) for name in METRIC_TITLES),
                    ]
                )
    return pd.DataFrame(rows, columns=COLUMN_TITLES)


def _title(cells: pd.DataFrame, deployment: str) -> str:
    parts = deployment_title(cells[cells["deployment"] == deployment]).split(" · ")
    return f"{parts[-1]}, {parts[1]}"


def _ratio(ratios: pd.Series[float]) -> str:
    known = ratios.dropna().astype(float)
    if known.empty:
        return "–"
    return f"{known.median():.2f} ({known.min():.2f} to {known.max():.2f})"
