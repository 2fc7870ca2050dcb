"""The comparison of engines, calculated by hand."""

from typing import Any

import pandas as pd

from servegrid.analysis.engine_comparison import compare_engines
from servegrid.analysis.summary import summarise
from servegrid.analysis.tables import cast_columns
from servegrid.records import columns


def cell(engine: str, concurrency: int, speed: float, **other: Any) -> dict[str, Any]:
    return {
        "deployment": engine,
        "model": "m",
        "quantization": "bf16",
        "gpu": "cpu",
        "gpu_count": 0,
        "engine": engine,
        "engine_version": "1",
        "protocol": "burst",
        "concurrency": concurrency,
        "input_len": 31,
        "output_len": 100,
        "trial": 1,
        "verdict": "ok",
        "valid": True,
        "output_tokens_per_s": speed,
        **other,
    }


def table(*rows: dict[str, Any]) -> list[dict[str, str]]:
    frame = pd.DataFrame(list(rows), columns=[column.name for column in columns.CELLS])
    cells = cast_columns(frame, columns.CELLS)
    found: list[dict[str, str]] = compare_engines(summarise(cells), cells).to_dict("records")
    return found


def test_ratios_cover_the_cells_that_are_valid_in_both() -> None:
    (row,) = table(
        *(cell("vllm", n, 10.0 * n) for n in (1, 2, 4, 8)),
        *(
            cell("llamacpp", n, speed, quantization="q4")
            for n, speed in ((1, 20), (2, 30), (4, 20))
        ),
        cell("llamacpp", 8, 8.0, valid=False),
    )
    # 20 / 10, 30 / 20 and 20 / 40. The cell that is not valid is left out.
    assert row == {
        "model and hardware": "m on cpu",
        "workload": "burst, 100 output tokens per request",
        "deployments": "vLLM 1, bf16 → llama.cpp 1, q4",
        "cells": "3",
        "ratio of output tokens/s": "1.50 (0.50 to 2.00)",
        "ratio of time to first token": "–",
        "ratio of end-to-end latency": "–",
    }


def test_other_models_hardware_workloads_and_emulations_are_not_compared() -> None:
    one = cell("vllm", 1, 10.0)
    for other in (
        {"model": "n"},
        {"gpu": "a100"},
        {"protocol": "closed_loop"},
        {"engine": "vllm", "deployment": "second"},
        {"engine": "emulated", "time_scale": 1.0},
        {"concurrency": 2},
    ):
        assert table(one, cell("llamacpp", 1, 5.0) | other) == []
