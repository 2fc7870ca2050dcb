"""What deployments are called in titles and legends."""

import pandas as pd
import pytest

from servegrid.analysis.titles import (
    axis_title,
    deployment_titles,
    emulation_notes,
    hardware_title,
    load_title,
    with_intensity,
)
from servegrid.study.text import pluralize

ROW = {
    "deployment": "d",
    "model": "m",
    "quantization": "q4_1",
    "gpu": "cpu",
    "gpu_count": 0,
    "engine": "llamacpp",
    "engine_version": "0.9",
}


@pytest.mark.parametrize(
    ("gpu", "count", "title"),
    [
        ("cpu", 0, "CPU"),
        ("a100-40gb", 4, "4 × A100 40 GB"),
        ("v100-16gb", 1, "1 × V100 16 GB"),
        ("h100", 8, "8 × H100"),
    ],
)
def test_hardware(gpu: str, count: int, title: str) -> None:
    assert hardware_title(gpu, count) == title


def test_titles_in_study_order() -> None:
    cells = pd.DataFrame([ROW, ROW | {"deployment": "a", "engine": "vllm"}, ROW])
    assert deployment_titles(cells) == {
        "d": "m · q4_1 · CPU · llama.cpp 0.9",
        "a": "m · q4_1 · CPU · vLLM 0.9",
    }
    assert list(deployment_titles(cells)) == ["d", "a"]


def test_titles_that_are_alike_are_told_apart_by_name() -> None:
    cells = pd.DataFrame([ROW, ROW | {"deployment": "long-context"}])
    assert list(deployment_titles(cells).values()) == [
        "m · q4_1 · CPU · llama.cpp 0.9 (d)",
        "m · q4_1 · CPU · llama.cpp 0.9 (long-context)",
    ]


def test_every_version_that_served_is_named_and_an_unknown_one_is_not() -> None:
    versions = ["0.9", "0.10", None]
    cells = pd.DataFrame([ROW | {"engine_version": version} for version in versions])
    assert deployment_titles(cells) == {"d": "m · q4_1 · CPU · llama.cpp 0.10, 0.9"}
    unknown = pd.DataFrame([ROW | {"engine": "tgi", "engine_version": None}])
    assert deployment_titles(unknown) == {"d": "m · q4_1 · CPU · tgi"}


def test_counts() -> None:
    assert (pluralize(1, "trial"), pluralize(3, "trial")) == ("1 trial", "3 trials")
    assert load_title("closed_loop", 1) == "closed loop, 1 output token per request"


EMULATED = {"engine": "emulated", "time_scale": 1.0}


def test_emulated_numbers_are_called_so_and_measured_ones_are_not() -> None:
    measured, emulated = pd.DataFrame([ROW]), pd.DataFrame([ROW | EMULATED])
    assert emulation_notes(measured) == []
    assert emulation_notes(emulated) == ["Emulated: no hardware was measured for it."]
    scaled = emulated.assign(time_scale=0.01)
    told = ["Emulated at 0.01 × time: no hardware was measured for it."]
    assert emulation_notes(scaled) == told
    both = pd.concat([measured, emulated])
    assert emulation_notes(both) == ["Partly emulated: no hardware was measured for it."]


def test_the_intensity_of_a_load_is_its_concurrency_or_its_rate() -> None:
    workloads = pd.DataFrame(
        {"concurrency": [8, None], "request_rate": [None, 0.5]}, dtype="Float64"
    )
    assert with_intensity(workloads)["intensity"].tolist() == [8.0, 0.5]
    assert axis_title("closed_loop") == "concurrent requests"
    assert axis_title("poisson") == "requests per second"
