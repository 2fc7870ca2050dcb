"""Engines beside each other where they served the same model on the same hardware. Pure."""

from __future__ import annotations

import itertools

import pandas as pd

from servegrid.analysis.titles import deployment_title, load_title

FIGURES = {
    "output_tokens_per_s": "output tokens/s",
    "ttft_s_p50": "first token",
    "e2el_s_p50": "last token",
}
HEAD = [
    "model and hardware",
    "workload",
    "deployments",
    "cells",
    *(f"ratio, {each}" for each in FIGURES.values()),
]


def compared(summary: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """A row for each two deployments that differ in their engine, and in no more than quantization.

    Texts under HEAD; ratios are those of the second to the first, the median over all cells that
    both have valid cells for, with the lowest and the highest of them.
    """
    usable = summary[(summary["trials_valid"] > 0) & summary["time_scale"].isna()]
    rows = []
    alike = ["model", "gpu", "gpu_count", "protocol", "output_len"]
    for key, own in usable.groupby(alike, sort=False):
        by_deployment = {str(name): each for name, each in own.groupby("deployment", sort=False)}
        for (first, one), (second, other) in itertools.combinations(by_deployment.items(), 2):
            if one["engine"].iloc[0] == other["engine"].iloc[0]:
                continue
            both = one.merge(other, on=["concurrency", "request_rate", "input_len"])
            if not both.empty:
                names = [_title(cells, deployment) for deployment in (first, second)]
                rows.append(
                    [
                        f"{key[0]} on {key[2]} × {key[1]}" if key[2] else f"{key[0]} on {key[1]}",
                        load_title(str(key[3]), int(str(key[4]))),
                        " → ".join(names),
                        str(len(both)),
                        *(_ratio(both[f"{name}_y"] / both[f"{name}_x"]) for name in FIGURES),
                    ]
                )
    return pd.DataFrame(rows, columns=HEAD)


def _title(cells: pd.DataFrame, deployment: str) -> str:
    parts = deployment_title(cells[cells["deployment"] == deployment]).split(" · ")
    return f"{parts[-1]}, {parts[1]}"


def _ratio(ratios: pd.Series[float]) -> str:
    known = ratios.dropna().astype(float)
    if known.empty:
        return "–"
    return f"{known.median():.2f} ({known.min():.2f} to {known.max():.2f})"
