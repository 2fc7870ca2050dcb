"""Engines beside each other, by hand."""

from typing import Any

import pandas as pd

from servegrid.analysis.engine_comparison import compared
from servegrid.analysis.summary import summarise
from servegrid.analysis.tables import typed
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
    cells = typed(frame, columns.CELLS)
    found: list[dict[str, str]] = compared(summarise(cells), cells).to_dict("records")
    return found


def test_ratios_over_the_cells_that_both_have() -> None:
    (row,) = table(
        *(cell("vllm", n, 10.0 * n) for n in (1, 2, 4, 8)),
        *(
            cell("llamacpp", n, speed, quantization="q4")
            for n, speed in ((1, 20), (2, 30), (4, 20))
        ),
        cell("llamacpp", 8, 8.0, valid=False),
    )
    # 20 / 10, 30 / 20 and 20 / 40; what may not be believed is left out.
    assert row == {
        "model and hardware": "m on cpu",
        "workload": "burst, 100 output tokens per request",
        "deployments": "vLLM 1, bf16 → llama.cpp 1, q4",
        "cells": "3",
        "ratio, output tokens/s": "1.50 (0.50 to 2.00)",
        "ratio, first token": "–",
        "ratio, last token": "–",
    }


def test_other_models_hardware_loads_and_emulations_are_not_compared() -> None:
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
