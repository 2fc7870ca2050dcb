"""How deployments and loads are called where people read: in titles, notes and legends."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from servegrid.study.deployment import EMULATED
from servegrid.study.text import pluralize

PROTOCOLS = {
    "burst": "all requests sent at once, time until the last has finished",
    "closed_loop": "every user sends again as soon as the answer is complete",
    "poisson": "requests come at random times, at a given rate",
}
"""What each protocol does, in words."""

SAME_PROMPT_FACTOR = 1.5
"""Prompt lengths this close are compared with each other."""

_ENGINES = {"vllm": "vLLM", "llamacpp": "llama.cpp", EMULATED: "emulated by servegrid"}


def deployment_title(cells: pd.DataFrame) -> str:
    """The deployment that the rows `cells` belong to, in words.

    >>> deployment_title(cells)
    'mistral-7b · fp16 · 2 × V100 16 GB · vLLM 0.32.0'
    """
    first = cells.iloc[0]
    hardware = hardware_title(first["gpu"], first["gpu_count"])
    return " · ".join([first["model"], first["quantization"], hardware, _engine_title(cells)])


def deployment_titles(cells: pd.DataFrame) -> dict[str, str]:
    """Each deployment's name and title, in study order; titles that are alike get the name too."""
    titles = {
        str(name): deployment_title(rows) for name, rows in cells.groupby("deployment", sort=False)
    }
    alike = {title for title, count in Counter(titles.values()).items() if count > 1}
    return {
        name: f"{title} ({name})" if title in alike else title for name, title in titles.items()
    }


def hardware_title(gpu: str, gpu_count: int) -> str:
    """`2 × A100 40 GB` for `a100-40gb`, `CPU` for `cpu`."""
    name = re.sub(r"(\d)GB\b", r"\1 GB", gpu.upper().replace("-", " "))
    return name if gpu == "cpu" else f"{gpu_count} × {name}"


def emulation(cells: pd.DataFrame) -> str | None:
    """`emulated` where all of the rows are, `partly emulated` where some are, else None."""
    emulated = cells["engine"] == EMULATED
    if not emulated.any():
        return None
    return "emulated" if emulated.all() else "partly emulated"


def emulation_notes(cells: pd.DataFrame) -> list[str]:
    """The sentence that must stand beside emulated numbers; nothing for measured ones."""
    mark = emulation(cells)
    if mark is None:
        return []
    scales = sorted(cells["time_scale"].dropna().unique())
    scaled = "" if scales == [1.0] else f" at {' and '.join(f'{each:g}' for each in scales)} × time"
    return [f"{mark.capitalize()}{scaled}: no hardware was measured for it."]


INTERVAL_TITLE = "95% interval, Student's t on the logarithms"


def axis_title(protocol: str) -> str:
    """What the intensity of a load counts: `concurrent requests`, or `requests per second`."""
    return "requests per second" if protocol == "poisson" else "concurrent requests"


def with_intensity(cells: pd.DataFrame) -> pd.DataFrame:
    """`cells` with the column `intensity`: the concurrency, or the rate of an open loop."""
    intensity = cells["concurrency"].astype("Float64").fillna(cells["request_rate"])
    return cells.assign(intensity=intensity.astype(float))


def nearest_length(lengths: Sequence[int], wanted: int) -> int | None:
    """Of the measured prompt lengths the one nearest to `wanted`, None where none is near.

    Tokenizers count the same text differently, so that deployments have lengths of their own.
    """
    nearest = min(lengths, key=lambda length: max(length, wanted) / min(length, wanted))
    return nearest if max(nearest, wanted) / min(nearest, wanted) <= SAME_PROMPT_FACTOR else None


def protocol_title(protocol: str) -> str:
    """`closed loop`."""
    return protocol.replace("_", " ")


def load_title(protocol: str, output_len: int) -> str:
    """`burst, 100 output tokens per request`."""
    return f"{protocol_title(protocol)}, {pluralize(output_len, 'output token')} per request"


def _engine_title(cells: pd.DataFrame) -> str:
    names = []
    for engine, rows in cells.groupby("engine", sort=False):
        versions = ", ".join(sorted(rows["engine_version"].dropna().unique()))
        names.append(f"{_ENGINES.get(str(engine), engine)} {versions}".strip())
    return " + ".join(names)
