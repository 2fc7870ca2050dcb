"""The names of deployments, protocols and workloads in titles, notes and legends. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from servegrid.study.deployment import CPU, EMULATED
from servegrid.study.grid import OPEN_LOOPS
from servegrid.study.text import pluralize

PROTOCOL_DESCRIPTIONS = {
    "burst": "all requests sent at once; time until the last one has finished",
    "closed_loop": "every user sends the next request when the response is complete",
    "poisson": "requests arrive at random times, at a given rate",
    "gamma": "requests arrive in a more or less bursty way, at a given rate",
    "profile": "requests arrive at random times, at a rate that changes",
    "trace": "requests arrive at the times of a trace",
    "constant": "requests arrive at equal intervals, at a given rate",
}

SAME_PROMPT_FACTOR = 1.5
"""Prompt lengths that differ by up to this factor are compared with each other."""


def interval_title(bring_ups: int) -> str:
    """What a 95% interval covers, by the number of bring-ups of a cell."""
    covers = f"between {bring_ups} bring-ups" if bring_ups > 1 else "within one bring-up"
    return f"95% interval {covers}, Student's t on the logarithms"


EARLY_STOP = "outputs may stop early"
"""The mark of deployments whose outputs do not have the exact length."""
_ENGINE_TITLES = {"vllm": "vLLM", "llamacpp": "llama.cpp", EMULATED: "emulated by servegrid"}


def deployment_title(cells: pd.DataFrame) -> str:
    """The title of the deployment of `cells`, rows of one deployment.

    For example, `mistral-7b · fp16 · 2 × V100 16 GB · vLLM 0.32.0`.
    """
    first = cells.iloc[0]
    replicas = first["replicas"] if "replicas" in cells else 1
    hardware = hardware_title(first["gpu"], first["gpu_count"])
    if not pd.isna(replicas) and replicas > 1:
        hardware += f" in {replicas:.0f} replicas"
    return " · ".join([first["model"], first["quantization"], hardware, _engine_title(cells)])


def deployment_titles(cells: pd.DataFrame) -> dict[str, str]:
    """The titles of all deployments by name, in study order.

    Equal titles also get what their name says beyond the title, such as the settings of a sweep.
    """
    by_name = {str(name): rows for name, rows in cells.groupby("deployment", sort=False)}
    titles = {name: deployment_title(rows) for name, rows in by_name.items()}
    repeated = {title for title, count in Counter(titles.values()).items() if count > 1}
    own = {name: _own_part(name, by_name[name].iloc[0]) for name in titles}
    return {
        name: f"{title} ({own[name]})" if title in repeated and own[name] else title
        for name, title in titles.items()
    }


def _own_part(name: str, row: pd.Series[Any]) -> str:
    """A deployment's name without the start that servegrid makes from what a title says too."""
    gpus = row["gpu"] if row["gpu"] == CPU else f"{row['gpu_count']}x{row['gpu']}"
    start = "_".join(map(str, (row["model"], row["quantization"], row["engine"], gpus)))
    rest = name.removeprefix(start)
    return name if rest[:1] not in ("", "_", "-") else rest[1:]


def hardware_title(gpu: str, gpu_count: int) -> str:
    """`2 × A100 40 GB` for `a100-40gb`, `CPU` for `cpu`."""
    name = re.sub(r"(\d)GB\b", r"\1 GB", gpu.upper().replace("-", " "))
    return name if gpu == "cpu" else f"{gpu_count} × {name}"


def emulation_label(cells: pd.DataFrame) -> str | None:
    """`emulated` if all rows are emulated, `partly emulated` if some are, otherwise None."""
    emulated = cells["engine"] == EMULATED
    if not emulated.any():
        return None
    return "emulated" if emulated.all() else "partly emulated"


def emulation_notes(cells: pd.DataFrame) -> list[str]:
    """The note that must be shown with emulated results; empty if all are measured."""
    label = emulation_label(cells)
    if label is None:
        return []
    scales = sorted(cells["time_scale"].dropna().unique())
    scaled = "" if scales == [1.0] else f", times × {' and '.join(f'{each:g}' for each in scales)}"
    return [f"{label.capitalize()}{scaled}: these results do not come from hardware."]


def stops_early(cells: pd.DataFrame) -> pd.Series[bool]:
    """Whether the outputs of each row may stop early, so that it must not pass for an exact one.

    Older tables have no such column, and only exact rows.
    """
    if "output_len_exact" not in cells:
        return pd.Series(False, index=cells.index)
    return cells["output_len_exact"].eq(False).fillna(False).astype(bool)


def early_stop_notes(cells: pd.DataFrame) -> list[str]:
    """One note per deployment whose outputs may stop early; it must be shown with its results."""
    return [
        f"{name}: {EARLY_STOP}. Its responses had {_tokens_range(rows)} of "
        f"{_join_lengths(rows['output_len'])} output tokens on average. Its times per token and "
        "rates come from the tokens that came. Do not compare them with those of exact lengths."
        for name, rows in cells[stops_early(cells)].groupby("deployment", sort=False)
    ]


def prompt_notes(cells: pd.DataFrame) -> list[str]:
    """What `input_len` is where it is not the length of the prompts: conversations and files."""
    if "source" not in cells:  # an older table, or published data
        return []
    sources = cells["source"].dropna().astype(str)
    is_file, has_turns = sources.str.startswith("file"), sources.str.endswith("turns")
    notes = []
    if (has_turns & ~is_file).any():
        notes.append(
            'Conversations: "prompt tokens" are those of one turn, without the history before it. '
            "The column prompt_tokens_mean of the cells counts the history too."
        )
    if is_file.any():
        notes.append(
            'Prompts from a file: "prompt tokens" and "output tokens" are the longest that the '
            "study allows. The columns prompt_tokens_mean and completion_tokens_mean of the "
            "cells have the means. In the capacity plan, every response has the longest length."
        )
    return notes


def figure_notes(cells: pd.DataFrame) -> list[str]:
    """All notes that must be shown with results of these cells."""
    return [*emulation_notes(cells), *early_stop_notes(cells), *prompt_notes(cells)]


def _tokens_range(rows: pd.DataFrame) -> str:
    """`57.3`, `12 to 57.3`, or `an unknown number`."""
    known = rows["completion_tokens_mean"].dropna().astype(float)
    if known.empty:
        return "an unknown number"
    return " to ".join(dict.fromkeys(f"{each:.3g}" for each in (known.min(), known.max())))


def _join_lengths(lengths: pd.Series[int]) -> str:
    return " and ".join(f"{each}" for each in sorted(lengths.unique()))


def intensity_title(protocol: str) -> str:
    """The title of an axis that shows `intensity`."""
    return "requests per second" if protocol in OPEN_LOOPS else "concurrent requests"


def with_intensity(cells: pd.DataFrame) -> pd.DataFrame:
    """`cells` with the column `intensity`: the concurrency, or the request rate.

    Without trials of a sweep that were not tried: they have no rate.
    """
    intensity = cells["concurrency"].astype("Float64").fillna(cells["request_rate"])
    return cells.assign(intensity=intensity.astype(float)).dropna(subset="intensity")


def nearest_length(lengths: Sequence[int], wanted: int) -> int | None:
    """The prompt length nearest to `wanted`; None if none is within SAME_PROMPT_FACTOR.

    Tokenizers count the same text differently, so deployments can have different lengths.
    """
    nearest = min(lengths, key=lambda length: max(length, wanted) / min(length, wanted))
    return nearest if max(nearest, wanted) / min(nearest, wanted) <= SAME_PROMPT_FACTOR else None


def protocol_title(protocol: str) -> str:
    """`closed loop`."""
    return protocol.replace("_", " ")


def workload_title(protocol: str, output_len: int) -> str:
    """`burst, 100 output tokens per request`."""
    return f"{protocol_title(protocol)}, {pluralize(output_len, 'output token')} per request"


def _engine_title(cells: pd.DataFrame) -> str:
    titles = []
    for engine, rows in cells.groupby("engine", sort=False):
        versions = ", ".join(sorted(rows["engine_version"].dropna().unique()))
        titles.append(f"{_ENGINE_TITLES.get(str(engine), engine)} {versions}".strip())
    mark = f", {EARLY_STOP}" if stops_early(cells).any() else ""
    return " + ".join(titles) + mark
