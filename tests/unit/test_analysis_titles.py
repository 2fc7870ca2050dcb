"""The names of deployments, protocols and workloads in titles and legends."""

import pandas as pd
import pytest

from servegrid.analysis.titles import (
    deployment_titles,
    emulation_notes,
    hardware_title,
    intensity_title,
    prompt_notes,
    with_intensity,
    workload_title,
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
def test_hardware_titles(gpu: str, count: int, title: str) -> None:
    assert hardware_title(gpu, count) == title


def test_titles_are_in_study_order() -> None:
    cells = pd.DataFrame([ROW, ROW | {"deployment": "a", "engine": "vllm"}, ROW])
    assert deployment_titles(cells) == {
        "d": "m · q4_1 · CPU · llama.cpp 0.9",
        "a": "m · q4_1 · CPU · vLLM 0.9",
    }
    assert list(deployment_titles(cells)) == ["d", "a"]


def test_a_note_says_what_the_prompt_length_of_conversations_and_files_is() -> None:
    def notes(*sources: str | None) -> list[str]:
        return prompt_notes(pd.DataFrame([ROW | {"source": each} for each in sources]))

    assert prompt_notes(pd.DataFrame([ROW])) == []  # an older table
    assert notes(None, "text", "trace 0a1b2c3d") == []
    (conversations,) = notes("text", "random, 3 turns")
    assert conversations.startswith("Conversations: ") and "one turn" in conversations
    for source in ("file 0a1b2c3d", "file 0a1b2c3d, all turns"):
        (file,) = notes(source)
        assert file.startswith("Prompts from a file: ") and "the longest" in file
    assert notes("file 0a1b2c3d", "text, 2 turns") == [conversations, file]


def test_equal_titles_are_distinguished_by_name() -> None:
    cells = pd.DataFrame([ROW, ROW | {"deployment": "long-context"}])
    assert list(deployment_titles(cells).values()) == [
        "m · q4_1 · CPU · llama.cpp 0.9 (d)",
        "m · q4_1 · CPU · llama.cpp 0.9 (long-context)",
    ]


def test_of_a_sweep_titles_have_the_settings_and_not_the_whole_name() -> None:
    start = "m_q4_1_llamacpp_cpu"
    names = [start, f"{start}-prefix_caching", f"{start}_n_batch-8_n_ubatch-4", f"{start}2"]
    cells = pd.DataFrame([ROW | {"deployment": name} for name in names])
    title = "m · q4_1 · CPU · llama.cpp 0.9"
    assert list(deployment_titles(cells).values()) == [
        title,
        f"{title} (prefix_caching)",
        f"{title} (n_batch-8_n_ubatch-4)",
        f"{title} ({start}2)",
    ]


def test_titles_list_all_known_versions() -> None:
    versions = ["0.9", "0.10", None]
    cells = pd.DataFrame([ROW | {"engine_version": version} for version in versions])
    assert deployment_titles(cells) == {"d": "m · q4_1 · CPU · llama.cpp 0.10, 0.9"}
    unknown = pd.DataFrame([ROW | {"engine": "tgi", "engine_version": None}])
    assert deployment_titles(unknown) == {"d": "m · q4_1 · CPU · tgi"}


def test_nouns_are_in_the_plural_except_for_one() -> None:
    assert (pluralize(1, "trial"), pluralize(3, "trial")) == ("1 trial", "3 trials")
    assert workload_title("closed_loop", 1) == "closed loop, 1 output token per request"


EMULATED = {"engine": "emulated", "time_scale": 1.0}


def test_emulated_figures_have_a_note_and_measured_ones_do_not() -> None:
    measured, emulated = pd.DataFrame([ROW]), pd.DataFrame([ROW | EMULATED])
    assert emulation_notes(measured) == []
    assert emulation_notes(emulated) == ["Emulated: these results do not come from hardware."]
    scaled = emulated.assign(time_scale=0.01)
    notes = ["Emulated, times × 0.01: these results do not come from hardware."]
    assert emulation_notes(scaled) == notes
    both = pd.concat([measured, emulated])
    assert emulation_notes(both) == ["Partly emulated: these results do not come from hardware."]


def test_the_intensity_is_the_concurrency_or_the_request_rate() -> None:
    workloads = pd.DataFrame(
        {"concurrency": [8, None], "request_rate": [None, 0.5]}, dtype="Float64"
    )
    assert with_intensity(workloads)["intensity"].tolist() == [8.0, 0.5]
    assert intensity_title("closed_loop") == "concurrent requests"
    assert intensity_title("poisson") == "requests per second"
