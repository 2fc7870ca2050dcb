"""The page says why a cell has no value."""

from __future__ import annotations

from typing import Any

import pandas as pd

from servegrid.analysis import tables
from servegrid.analysis.capacity import Demand, HardwarePrices
from servegrid.analysis.summary import summarise
from servegrid.records import columns
from servegrid.report.page.payload import build_payload


def row(concurrency: int, **other: Any) -> dict[str, Any]:
    served = {"verdict": "ok", "valid": True, "seconds_per_100_tokens": 2.0}
    return {
        "deployment": "d",
        "model": "m",
        "quantization": "fp16",
        "gpu": "v100-16gb",
        "gpu_count": 2,
        "engine": "vllm",
        "protocol": "burst",
        "concurrency": concurrency,
        "input_len": 31,
        "output_len": 100,
        "output_len_exact": True,
        "trial": 1,
        "bring_up": 1,
        **(served | other),
    }


def test_the_page_has_the_reason_of_each_cell() -> None:
    nothing = {"valid": None, "seconds_per_100_tokens": None}
    rows = [
        row(1),
        row(2, verdict="queued", verdict_detail="requests spent 33% of their time in the queue"),
        row(4, verdict="oom", verdict_detail="CUDA\nout of memory", **nothing),
        row(8, verdict="not_run", verdict_detail="dominated by burst-c4: oom", **nothing),
        row(16, verdict="timeout", **nothing),
    ]
    cells = tables.from_rows(rows, columns.CELLS)
    payload = build_payload(
        "s", summarise(cells), cells, pd.DataFrame(), Demand(), HardwarePrices("USD", {})
    )
    found = {each["intensity"]: (each["state"], each.get("reason")) for each in payload["cells"]}
    assert found == {
        1: ("valid", None),
        2: ("valid", "queued: requests spent 33% of their time in the queue"),
        4: ("not served", "oom: CUDA out of memory"),
        8: ("not run", "not_run: dominated by burst-c4: oom"),
        16: ("not served", "timeout"),
    }
