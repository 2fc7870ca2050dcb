"""Prefix caching off and on, side by side: figures that were calculated by hand."""

from __future__ import annotations

from typing import Any

import pandas as pd

from servegrid.analysis.caching_comparison import HEAD, compare_caching
from servegrid.analysis.slo import Slo
from servegrid.analysis.summary import summarise
from servegrid.analysis.tables import cast_columns
from servegrid.records import columns
from servegrid.report import findings_report
from servegrid.report.page import sections


def trial(deployment: str, number: int, speed: float | None, **other: Any) -> dict[str, Any]:
    return {
        "deployment": deployment,
        "model": "m",
        "quantization": "bf16",
        "gpu": "cpu",
        "gpu_count": 0,
        "engine": "vllm",
        "protocol": "closed_loop",
        "concurrency": 4,
        "input_len": 100,
        "output_len": 50,
        "trial": number,
        "verdict": "timeout" if speed is None else "ok",
        "valid": speed is not None,
        "output_tokens_per_s": speed,
        **other,
    }


def compared(*rows: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=[column.name for column in columns.CELLS])
    cells = cast_columns(frame, columns.CELLS)
    return compare_caching(summarise(cells), cells, {"d": "the deployment"})


CELLS = (
    *(
        trial("d", number, speed, ttft_s_p50=2.0, prompt_tokens_mean=325.0)
        for number, speed in enumerate((90.0, 100.0, 110.0), 1)
    ),
    trial("d-prefix_caching", 1, 250.0, ttft_s_p50=0.5, prompt_tokens_mean=325.0)
    | {"prefix_hit_rate": 0.612, "expected_prefix_hit_rate": 0.615},
    trial("other", 1, 7.0),
)


def test_both_states_of_a_cell_stand_in_one_row() -> None:
    (row,) = compared(*CELLS).to_dict("records")
    # The logarithms of 90, 100, 110 have the mean ln 99.67 and the standard deviation 0.1004; with
    # t = 4.303, exp(4.303 · 0.1004 / √3) = 1.283: from 77.7 to 127.9.
    assert row == {
        "deployment": "the deployment",
        "workload": "closed loop, 50 output tokens per request",
        "users or requests/s": "4",
        "prompt tokens": "325",
        "output tokens/s: off": "100 [77.7, 128]",
        "output tokens/s: on": "250",
        "median ttft, s: off": "2 [2, 2]",
        "median ttft, s: on": "0.5",
        "ratio of tokens/s, on / off": "2.50",
        "hit rate (expected)": "61.2% (61.5%)",
    }


def test_a_cell_that_was_not_served_has_dashes_and_one_that_is_not_valid_a_star() -> None:
    rows = [
        trial("d", 1, 100.0, valid=False),
        trial("d-prefix_caching", 1, None),
        trial("d", 1, 10.0, concurrency=8),
    ]
    (row,) = compared(*rows).to_dict("records")
    values = {name: row[name] for name in HEAD[4:]}
    assert values == {
        "output tokens/s: off": "100 *",
        "output tokens/s: on": "–",
        "median ttft, s: off": "–",
        "median ttft, s: on": "–",
        "ratio of tokens/s, on / off": "–",
        "hit rate (expected)": "–",
    }


def test_page_and_findings_show_the_table_if_there_are_such_deployments() -> None:
    table = compared(*CELLS)
    section = sections.caching_section(table)
    assert section.title == "Prefix caching off and on"
    assert [list(each.rows) for each in section.tables] == [[list(table.iloc[0])]]
    frontier = pd.DataFrame()
    for statements in ([], ["One."]):
        text = findings_report.render_findings(statements, frontier, Slo(), [], table)
        assert "## Prefix caching off and on" in text
        assert text.rstrip().endswith("| 61.2% (61.5%) |")
        without = findings_report.render_findings(statements, frontier, Slo(), [], compared())
        assert "caching" not in without
