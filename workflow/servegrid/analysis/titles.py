"""The names of deployments, protocols and workloads in titles, notes and legends. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from servegrid.study.deployment import EMULATED
from servegrid.study.grid import OPEN_LOOPS
from servegrid.study.text import pluralize

PROTOCOL_DESCRIPTIONS = {
    "burst": "all requests sent at once; time until the last one has finished",
    "closed_loop": "every user sends the next request when the response is complete",
    "poisson": "requests arrive at random times, at a given rate",
    "constant": "requests arrive at equal intervals, at a given rate",
}

SAME_PROMPT_FACTOR = 1.5
"""Prompt lengths that differ by up to this factor are compared with each other."""


def interval_title(bring_ups: int) -> str:
    """What a 95% interval covers, by the number of bring-ups of a cell."""
    covers = f"between {bring_ups} bring-ups" if bring_ups > 1 else "within one bring-up"
    return f"95% interval {covers}, Student's t on the logarithms"


_ENGINE_TITLES = {"vllm": "vLLM", "llamacpp": "llama.cpp", EMULATED: "emulated by servegrid"}


def deployment_title(cells: pd.DataFrame) -> str:
    """The title of the deployment of `cells`, rows of one deployment.

    >>> deployment_title(cells)
    'mistral-7b · fp16 · 2 × V100 16 GB · vLLM 0.32.0'
    """
    first = cells.iloc[0]
    hardware = hardware_title(first["gpu"], first["gpu_count"])
    return " · ".join([first["model"], first["quantization"], hardware, _engine_title(cells)])


def deployment_titles(cells: pd.DataFrame) -> dict[str, str]:
    """The titles of all deployments by name, in study order. Equal titles also get the name."""
    titles = {
        str(name): deployment_title(rows) for name, rows in cells.groupby("deployment", sort=False)
    }
    repeated = {title for title, count in Counter(titles.values()).items() if count > 1}
    return {
        name: f"{title} ({name})" if title in repeated else title for name, title in titles.items()
    }


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
    """The note that must be shown with emulated figures; empty if all figures are measured."""
    label = emulation_label(cells)
    if label is None:
        return []
    scales = sorted(cells["time_scale"].dropna().unique())
    scaled = "" if scales == [1.0] else f", times × {' and '.join(f'{each:g}' for each in scales)}"
    return [f"{label.capitalize()}{scaled}: these figures do not come from hardware."]


def intensity_title(protocol: str) -> str:
    """The title of an axis that shows `intensity`."""
    return "requests per second" if protocol in OPEN_LOOPS else "concurrent requests"


def with_intensity(cells: pd.DataFrame) -> pd.DataFrame:
    """`cells` with the column `intensity`: the concurrency, or the request rate."""
    intensity = cells["concurrency"].astype("Float64").fillna(cells["request_rate"])
    return cells.assign(intensity=intensity.astype(float))


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
    return " + ".join(titles)
