"""Published figures in the shape of measured ones, and measured ones beside them. Pure."""

from __future__ import annotations

import pandas as pd

from servegrid import records, reference, tables


def summary_of(study: str) -> pd.DataFrame:
    """The figures of a published study, one of `reference.STUDIES`, as a table of records.SUMMARY.

    A row per cell; what was not served has trials_served 0. Speeds follow from the seconds per
    100 tokens of a burst: with n requests at once, each gets 100 / seconds tokens per second.
    The engine's column says what is known of it.
    """
    cells = reference.published(study)
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
    ).reindex(columns=[column.name for column in records.SUMMARY])
    return tables.typed(frame.astype(object).where(frame.notna(), None), records.SUMMARY)
