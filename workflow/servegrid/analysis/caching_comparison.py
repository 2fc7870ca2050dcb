"""Deployments with their prefix cache off and on, side by side. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from servegrid.analysis.summary import CELL_KEYS
from servegrid.analysis.titles import workload_title
from servegrid.records.verdict import SERVED
from servegrid.study.expand import PREFIX_CACHING_SUFFIX

METRICS = {"output tokens/s": "output_tokens_per_s", "median ttft, s": "ttft_s_p50"}
HEAD = (
    *("deployment", "workload", "users or requests/s", "prompt tokens"),
    *(f"{title}: {state}" for title in METRICS for state in ("off", "on")),
    *("ratio of tokens/s, on / off", "hit rate (expected)"),
)
CAPTION = (
    "Each cell with prefix caching off and on: medians, with their 95% intervals if there are "
    "several trials. Prompt tokens: the mean, with the history of conversations. Hit rate: the "
    "share of the prompt tokens that came from the cache, and in brackets the share that an "
    "unlimited cache would supply. A star marks values that are not valid. A dash: not served, or "
    "no stationary part."
)


def compare_caching(
    summary: pd.DataFrame, cells: pd.DataFrame, titles: Mapping[str, str]
) -> pd.DataFrame:
    """One row of texts per cell that was tried with prefix caching off and on; columns HEAD.

    `summary` and `cells` are tables of `columns.SUMMARY` and `CELLS`, `titles` the titles of
    deployments by name. A dash stands for a cell that was not served.
    """
    rows = []
    keys = ["deployment", *CELL_KEYS]
    by_cell = {
        tuple(None if pd.isna(row[key]) else row[key] for key in keys): row
        for row in summary.to_dict("records")
    }
    for (name, *cell), off in by_cell.items():
        on = by_cell.get((f"{name}{PREFIX_CACHING_SUFFIX}", *cell))
        if on is not None:
            rows.append(_row(titles.get(str(name), str(name)), off, on, cells))
    return pd.DataFrame(rows, columns=list(HEAD))


def _row(
    title: str, off: Mapping[Any, Any], on: Mapping[Any, Any], cells: pd.DataFrame
) -> list[str]:
    rate = off["request_rate"]
    speeds = [side["output_tokens_per_s"] for side in (off, on)]
    with_cache, without = _trials(cells, on), _trials(cells, off)
    sent = pd.concat([without, with_cache])["prompt_tokens_mean"].median()
    hits, expected = (
        with_cache[name].median() for name in ("prefix_hit_rate", "expected_prefix_hit_rate")
    )
    return [
        title,
        workload_title(str(off["protocol"]), int(off["output_len"])),
        _load(off["concurrency"], rate),
        "–" if pd.isna(sent) else f"{sent:.0f}",
        *(_with_interval(side, metric) for metric in METRICS.values() for side in (off, on)),
        "–" if any(map(pd.isna, speeds)) else f"{speeds[1] / speeds[0]:.2f}",
        "–" if pd.isna(hits) else f"{hits:.1%} ({_percent(expected)})",
    ]


def _trials(cells: pd.DataFrame, cell: Mapping[Any, Any]) -> pd.DataFrame:
    """The valid trials of a cell; the served ones if none is valid."""
    own = cells["deployment"].eq(cell["deployment"])
    for key in CELL_KEYS:
        own &= cells[key].isna() if pd.isna(cell[key]) else cells[key].eq(cell[key]).fillna(False)
    served = cells[own & cells["verdict"].isin(SERVED)]
    valid = served[served["valid"].eq(True).fillna(False)]
    return served if valid.empty else valid


def _load(concurrency: Any, rate: Any) -> str:
    if not pd.isna(rate):
        return f"{rate:g}"
    return "–" if pd.isna(concurrency) else str(concurrency)


def _percent(share: Any) -> str:
    return "–" if pd.isna(share) else f"{share:.1%}"


def _with_interval(row: Mapping[Any, Any], name: str) -> str:
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if pd.isna(value):
        return "–"
    star = "" if row["trials_valid"] else " *"
    between = "" if pd.isna(low) or pd.isna(high) else f" [{low:.3g}, {high:.3g}]"
    return f"{value:.3g}{between}{star}"
