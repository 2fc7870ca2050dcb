"""Published latencies as a table of the study's shape, and measured cells next to them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from servegrid.analysis import tables
from servegrid.analysis.summary import count_trials
from servegrid.analysis.titles import stops_early
from servegrid.records import columns
from servegrid.reference.published import PublishedData
from servegrid.study.deployment import EMULATED
from servegrid.study.text import pluralize

MATCH_COLUMNS = (
    *("model", "quantization", "gpu", "gpu_count"),
    *("protocol", "concurrency", "input_len", "output_len"),
)
"""Columns in which a measured and a published cell must be equal to be compared."""


def published_summary(published: PublishedData) -> pd.DataFrame:
    """Published latencies as a table of `columns.SUMMARY`, one row per cell.

    A cell that was not served has `trials_served` 0. Throughput follows from the seconds per 100
    tokens: with n requests in flight, each gets 100 / seconds tokens per second.
    """
    cells = pd.DataFrame(published.rows)
    seconds = cells["seconds_per_100_tokens"]
    gpus = cells["gpu_count"].astype(str) + "x" + cells["gpu"]
    served = seconds.notna().astype(int)
    table = cells.assign(
        deployment=cells["model"] + "_" + cells["quantization"] + "_" + gpus,
        engine="vllm",
        trials=1,
        trials_served=served,
        trials_valid=served,
        output_tokens_per_s_per_user=100 / seconds,
        output_tokens_per_s=100 * cells["concurrency"] / seconds,
    ).reindex(columns=[column.name for column in columns.SUMMARY])
    return tables.fill_nulls(table, columns.SUMMARY)


def compare_with_published(
    measured: pd.DataFrame, published: PublishedData | None, emulated: bool = False
) -> pd.DataFrame:
    """Measured cells next to the published ones: one row of `columns.PUBLISHED_COMPARISON` each.

    `measured` is a table of `columns.SUMMARY`. Only valid values of exact output lengths count,
    and emulated ones only if `emulated`. The ratio is measured / published seconds. Its range
    assumes the published value anywhere within its rounding, and the measured value anywhere in its
    95% interval. Deployments with several replicas are left out. Without published data, the table
    has no rows.
    """
    if published is None:
        return tables.from_rows([], columns.PUBLISHED_COMPARISON)
    # Published tables are of one copy of the model, which had all the GPUs.
    alone = measured["replicas"].fillna(1).eq(1).astype(bool)
    usable = (measured["trials_valid"] > 0) & ~stops_early(measured) & alone
    valid = measured[usable].dropna(subset="seconds_per_100_tokens")
    is_emulated = valid["engine"] == EMULATED
    valid = valid.assign(emulated=is_emulated)[is_emulated <= emulated]
    theirs = published_summary(published).dropna(subset="seconds_per_100_tokens")
    theirs = theirs[[*MATCH_COLUMNS, "seconds_per_100_tokens"]]
    theirs = theirs.rename(columns={"seconds_per_100_tokens": "published_s"})
    both = valid.merge(theirs, on=list(MATCH_COLUMNS))
    scale = both["time_scale"].fillna(1.0)
    value, low, high = (
        both[f"seconds_per_100_tokens{end}"].astype(float) / scale for end in ("", "_low", "_high")
    )
    both = both.assign(
        measured_s=value,
        ratio=value / both["published_s"],
        ratio_low=low.fillna(value) / (both["published_s"] + published.rounding_s),
        ratio_high=high.fillna(value) / (both["published_s"] - published.rounding_s),
    )
    names = [column.name for column in columns.PUBLISHED_COMPARISON]
    return tables.fill_nulls(both.reindex(columns=names), columns.PUBLISHED_COMPARISON)


def describe_comparison(pairs: pd.DataFrame, titles: Mapping[str, str]) -> list[str]:
    """A table of `columns.PUBLISHED_COMPARISON` as sentences: one text per deployment.

    `titles` maps names of deployments to their titles.
    """
    sentences = []
    for name, rows in pairs.groupby("deployment", sort=False):
        median = rows["ratio"].median()
        differing = int(((rows["ratio_low"] > 1) | (rows["ratio_high"] < 1)).sum())
        mark = " (emulated)" if rows["emulated"].any() else ""
        title = titles.get(str(name), str(name))
        sentences.append(
            f"{title}{mark}: {pluralize(len(rows), 'cell')} in both. The median ratio of measured "
            f"to published time is {median:.3g}. {pluralize(differing, 'cell')} differ by more "
            "than rounding and intervals can explain."
        )
    return sentences


def method_differences(
    cells: pd.DataFrame, prompts: Sequence[str], published: PublishedData
) -> pd.DataFrame:
    """How the study and the published measurement differ in method: texts, one row per aspect.

    `cells` is the table of `columns.CELLS`, `prompts` are the kinds of prompts of the workloads.
    """
    engines = sorted(
        {
            f"{engine} {version}"
            for engine, version in zip(cells["engine"], cells["engine_version"], strict=True)
            if not pd.isna(version)
        }
    )
    trials = "–" if cells.empty else pluralize(count_trials(cells)[0], "trial")
    measured = {
        "prompts": " and ".join(sorted(set(prompts))),
        "software": ", ".join(engines) or "not known",
        "trials": f"{trials} per cell, after a warm-up",
        "time": "from the first request sent to the last token of the wave",
    }
    return pd.DataFrame(
        [
            (aspect, text, published.source.method.get(aspect, "not known"))
            for aspect, text in measured.items()
        ],
        columns=["aspect", "this study", "published"],
    )
