"""Published figures in the shape of measured ones, and measured ones beside them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from servegrid.analysis import tables
from servegrid.analysis.titles import EMULATED, counted
from servegrid.records import columns
from servegrid.reference import data


def summary_of(study: str) -> pd.DataFrame:
    """The figures of a published study, one of `reference.STUDIES`, as a table of columns.SUMMARY.

    A row per cell; what was not served has trials_served 0. Speeds follow from the seconds per
    100 tokens of a burst: with n requests at once, each gets 100 / seconds tokens per second.
    The engine's column says what is known of it.
    """
    cells = data.published(study)
    seconds = cells["seconds_per_100_tokens"]
    gpus = cells["gpu_count"].astype(str) + "x" + cells["gpu"]
    served = seconds.notna().astype(int)
    frame = cells.assign(
        deployment=cells["model"] + "_" + cells["quantization"] + "_" + gpus,
        engine="vllm",
        trials=1,
        trials_served=served,
        trials_valid=served,
        output_tokens_per_s_per_user=100 / seconds,
        output_tokens_per_s=100 * cells["concurrency"] / seconds,
    ).reindex(columns=[column.name for column in columns.SUMMARY])
    return tables.typed(frame.astype(object).where(frame.notna(), None), columns.SUMMARY)


ROUNDING_S = 0.05
"""Half of the last digit in which the article gives its seconds."""

SAME = (
    *("model", "quantization", "gpu", "gpu_count"),
    *("protocol", "concurrency", "input_len", "output_len"),
)
"""What must be alike in two cells to hold one against the other."""


def beside(measured: pd.DataFrame, published: pd.DataFrame, emulated: bool = False) -> pd.DataFrame:
    """Measured cells beside the published ones, a row of `columns.BESIDE` each.

    Both are tables of `columns.SUMMARY`. Of `measured`, only figures that may be believed count,
    and emulated ones only if asked for. The ratio is measured / published seconds; its range takes
    the published figure anywhere within its rounding and the measured one anywhere in its interval.
    """
    own = measured[measured["trials_valid"] > 0].dropna(subset="seconds_per_100_tokens")
    is_emulated = own["engine"] == EMULATED
    own = own.assign(emulated=is_emulated)[is_emulated <= emulated]
    theirs = published.dropna(subset="seconds_per_100_tokens")[[*SAME, "seconds_per_100_tokens"]]
    theirs = theirs.rename(columns={"seconds_per_100_tokens": "published_s"})
    both = own.merge(theirs, on=list(SAME))
    scale = both["time_scale"].fillna(1.0)
    value, low, high = (
        both[f"seconds_per_100_tokens{end}"].astype(float) / scale for end in ("", "_low", "_high")
    )
    both = both.assign(
        measured_s=value,
        ratio=value / both["published_s"],
        ratio_low=low.fillna(value) / (both["published_s"] + ROUNDING_S),
        ratio_high=high.fillna(value) / (both["published_s"] - ROUNDING_S),
    )
    names = [column.name for column in columns.BESIDE]
    table = both.reindex(columns=names)
    return tables.typed(table.astype(object).where(table.notna(), None), columns.BESIDE)


def statements(pairs: pd.DataFrame, titles: Mapping[str, str]) -> list[str]:
    """What a table of `columns.BESIDE` says, a sentence for each deployment.

    `titles` are the deployments' names for people.
    """
    told = []
    for name, own in pairs.groupby("deployment", sort=False):
        median = own["ratio"].median()
        apart = int(((own["ratio_low"] > 1) | (own["ratio_high"] < 1)).sum())
        mark = " (emulated)" if own["emulated"].any() else ""
        title = titles.get(str(name), str(name))
        told.append(
            f"{title}{mark}: {counted(len(own), 'cell')} in both; the median takes {median:.3g} × "
            f"the published time; {apart} differ by more than rounding and intervals explain."
        )
    return told


def differences(cells: pd.DataFrame, prompts: Sequence[str]) -> list[str]:
    """What is known to differ between a study and the article, apart from the hardware.

    `cells` is its table of `columns.CELLS`, `prompts` the kinds of prompts of its loads.
    """
    engines = sorted(
        {
            f"{engine} {version}"
            for engine, version in zip(cells["engine"], cells["engine_version"], strict=True)
            if not pd.isna(version)
        }
    )
    return [
        f"Prompts: {' and '.join(sorted(set(prompts)))} here; the article does not say whether its "
        "simultaneous requests had the same one, which a prefix cache would answer faster.",
        f"Software: {', '.join(engines) or 'not known'} here; vLLM there, of a version that the "
        "article does not give.",
        f"Repeats: {counted(int(cells['trial'].max()), 'trial')} per cell after a warm-up here; "
        "the article says neither how often it measured nor whether it warmed up.",
        "Time: here from the first request's being sent until the last token of the wave; there "
        "the time required to generate 100 tokens.",
    ]
