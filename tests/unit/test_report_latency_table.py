"""Latency tables, against texts written by hand."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from servegrid.reference.data import published_cells
from servegrid.report.latency_table import (
    format_seconds,
    latency_csv,
    latency_markdown,
    latency_tables,
    write_latency_tables,
)


def row(concurrency: int, input_len: int, seconds: float | None, **other: Any) -> dict[str, Any]:
    """One row of the table of cells. Without seconds, the cell was not served."""
    verdict = (
        {"verdict": "ok"} if seconds else {"verdict": "timeout", "verdict_detail": "stalled: 120 s"}
    )
    return {
        "deployment": "d",
        "model": "mistral-7b",
        "quantization": "fp16",
        "gpu": "v100-16gb",
        "gpu_count": 2,
        "engine": "vllm",
        "engine_version": "0.32.0",
        "protocol": "burst",
        "concurrency": concurrency,
        "request_rate": None,
        "input_len": input_len,
        "output_len": 100,
        "trial": 1,
        "verdict_detail": None,
        "valid": True if seconds else None,
        "invalid_rules": None,
        "invalid_evidence": None,
        "seconds_per_100_tokens": seconds,
        **verdict,
        **other,
    }


def cells(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    numbers = dict.fromkeys(("request_rate", "seconds_per_100_tokens"), "float64")
    return frame.astype({"verdict_detail": "str"} | numbers)


PLAIN = cells(
    [
        row(128, 31, 10.6),
        row(1, 31, 1.84),
        row(1, 2193, 2.3),
        row(128, 2193, None),
        row(1, 31, 9.9, deployment="other"),
    ]
)


def markdown(frame: pd.DataFrame) -> str:
    return latency_markdown("A title", latency_tables(frame, "d"))


def test_one_row_per_concurrency_and_one_column_per_prompt_length() -> None:
    assert (
        markdown(PLAIN)
        == """\
# A title

Seconds per 100 tokens. Rows: concurrent requests. Columns: prompt tokens.

| Concurrency |   31 | 2193 |
| ----------: | ---: | ---: |
|           1 |  1.8 |  2.3 |
|         128 | 10.6 |    - |

Burst (all requests sent at once; time until the last one has finished), 100 output tokens per \
request, 1 trial.

`-`: not served (concurrency × prompt tokens):

- 128 × 2193: `timeout`, `stalled: 120 s`
"""
    )


def test_csv_has_the_same_figures() -> None:
    assert latency_csv(latency_tables(PLAIN, "d")) == (
        "protocol,output_len,requests,31,2193\nburst,100,1,1.8,2.3\nburst,100,128,10.6,-\n"
    )


def test_all_four_files_are_written_and_the_title_names_the_deployment(tmp_path: Path) -> None:
    write_latency_tables(PLAIN, "d", files(tmp_path))
    first, blank, second, *_ = (tmp_path / "d.md").read_text().split("\n")
    assert first == "# mistral-7b · fp16 · 2 × V100 16 GB · vLLM 0.32.0"
    assert (blank, second.split(".")[0]) == ("", "Seconds per 100 tokens")
    assert (tmp_path / "d.csv").read_text().startswith("protocol,output_len,requests,31,2193\n")
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "d.csv",
        "d.md",
        "d.parquet",
        "d.tex",
    ]
    assert "burst & 100 & 128 & 10.6 & - \\\\" in (tmp_path / "d.tex").read_text().split("\n")
    table = pq.read_table(tmp_path / "d.parquet").to_pylist()
    assert table[1] == {
        "protocol": "burst",
        "output_len": 100,
        "requests": 128,
        "31": 10.6,
        "2193": None,
    }


def files(folder: Path) -> dict[str, Path]:
    ends = {"markdown": "md", "csv": "csv", "latex": "tex", "parquet": "parquet"}
    return {name: folder / f"d.{end}" for name, end in ends.items()}


def test_the_published_figures_reproduce_the_published_tables() -> None:
    source = published_cells("inria-2024")
    names = source["model"] + "_" + source["quantization"] + "_" + source["gpu_count"].astype(str)
    served = source["seconds_per_100_tokens"].notna()
    frame = source.assign(
        deployment=names,
        trial=1,
        request_rate=None,
        verdict=served.map({True: "ok", False: "timeout"}),
        valid=served.map({True: True, False: None}),
        verdict_detail=None,
        invalid_rules=None,
        invalid_evidence=None,
    )
    for name, group in frame.groupby("deployment"):
        (table,) = latency_tables(frame, str(name))
        assert len(table.entries) == len(group) == 56
        for (concurrency, length), entry in table.entries.items():
            (printed,) = group[
                (group["concurrency"] == concurrency) & (group["input_len"] == length)
            ]["seconds_per_100_tokens"]
            assert entry.text == ("-" if pd.isna(printed) else f"{printed:.1f}")
    # Rows as printed in the article.
    assert printed_rows(frame, "mixtral-8x22b_awq-4bit_4")[-2:] == [
        "64 28.0 31.8 35.9 56.0 71.7 - -",
        "128 52.0 55.3 67.0 111.7 - - -",
    ]
    assert printed_rows(frame, "llama-3-70b_awq-4bit_2")[0] == "1 3.6 3.7 3.7 3.9 4.0 4.2 4.8"


def printed_rows(frame: pd.DataFrame, name: str) -> list[str]:
    lines = latency_csv(latency_tables(frame, name)).splitlines()[1:]
    return [" ".join(line.split(",")[2:]) for line in lines]


def test_emulated_tables_begin_with_a_note(tmp_path: Path) -> None:
    emulated = PLAIN.assign(engine="emulated", time_scale=1.0)
    write_latency_tables(emulated, "d", files(tmp_path))
    lines = (tmp_path / "d.md").read_text().split("\n")
    assert lines[2] == "Emulated: these results do not come from hardware."


def test_a_cell_shows_the_median_of_its_served_trials() -> None:
    trials = [(1, 1.0), (2, 5.0), (3, 2.0), (4, None)]
    frame = cells(
        [row(8, 31, seconds, trial=trial) for trial, seconds in trials]
        + [row(8, 63, 3.0, trial=trial) for trial in (1, 2, 3, 4)]
    )
    text = markdown(frame)
    # Logarithms of 1, 2 and 5: mean 0.7675, s 0.8073; ± 4.303 × 0.8073 / sqrt(3) = 2.0056.
    assert "|           8 | 2.0 [0.29, 16.0]* | 3.0 [3.0, 3.0] |\n" in text
    expected = (
        "median of 4 trials [95% interval within one bring-up, Student's t on the logarithms]."
    )
    assert f"per request, {expected}" in text
    assert text.endswith(
        "\\*: median without the trials that were not served or not valid "
        "(concurrency × prompt tokens):\n\n"
        "- 8 × 31: 1 of 4 trials, `timeout`, `stalled: 120 s`\n"
    )
    assert latency_csv(latency_tables(frame, "d")).endswith("\nburst,100,8,2.0,3.0\n")


def test_the_median_uses_only_valid_trials_if_there_are_any() -> None:
    invalid = {"valid": False, "invalid_rules": ["preempted"], "invalid_evidence": ["2 times"]}
    text = markdown(cells([row(8, 31, 2.0), row(8, 31, 9.0, trial=2, **invalid)]))
    assert "|           8 | 2.0* |\n" in text
    assert text.endswith("- 8 × 31: 1 of 2 trials, `preempted`, `2 times`\n")
    neither = [row(8, 31, 2.0, **invalid), row(8, 31, 4.0, trial=2, **invalid)]
    text = markdown(cells([*neither, row(8, 31, None, trial=3)]))
    # Logarithms to base 2 are 1 and 2, so that the interval is 1.5 ± 12.706 / 2.
    assert "|           8 | 3.0 [0.035, 231.2]*! |\n" in text
    assert "\n\n- 8 × 31: 1 of 3 trials, `timeout`, `stalled: 120 s`\n\n!: not valid" in text
    assert text.endswith("- 8 × 31: 2 of 3 trials, `preempted`, `2 times`\n")


def test_poisson_rows_are_request_rates() -> None:
    workload = {"protocol": "poisson", "concurrency": None}
    frame = cells(row(0, 31, 2.0) | workload | {"request_rate": rate} for rate in (0.5, 2.0))
    text = markdown(frame)
    assert "Rows: requests per second. Columns: prompt tokens." in text
    assert "| Requests/s |  31 |\n" in text
    assert "|        0.5 | 2.0 |\n|          2 | 2.0 |\n" in text
    assert latency_csv(latency_tables(frame, "d")).endswith(
        "\npoisson,100,0.5,2.0\npoisson,100,2,2.0\n"
    )


def test_concurrency_stays_an_integer_next_to_fractional_rates() -> None:
    rate = {"protocol": "poisson", "concurrency": None, "request_rate": 0.5}
    frame = cells([row(8, 31, 1.0), row(8, 63, 3.0), row(0, 31, 2.0) | rate])
    assert latency_csv(latency_tables(frame, "d")) == (
        "protocol,output_len,requests,31,63\nburst,100,8,1.0,3.0\npoisson,100,0.5,2.0,\n"
    )


def test_a_cell_without_steady_state_has_a_question_mark_and_the_reason() -> None:
    invalid = {
        "valid": False,
        "invalid_rules": ["no_steady_state"],
        "invalid_evidence": ["it grew"],
        "verdict": "ok",
    }
    text = markdown(cells([row(8, 31, None, protocol="closed_loop", **invalid), row(16, 31, 4.0)]))
    assert "|           8 | ?! |\n" in text
    assert "`?`: served, but without a stationary part and therefore without a value." in text
    assert "- 8 × 31: `no_steady_state`, `it grew`" in text


def test_a_cell_that_is_not_valid_is_marked_with_the_reason() -> None:
    invalid = {"valid": False, "invalid_rules": ["preempted"], "invalid_evidence": ["2 times"]}
    frame = cells([row(8, 31, 2.0, **invalid), row(8, 63, 3.0), row(16, 31, 4.0, **invalid)])
    text = markdown(frame)
    assert "|           8 | 2.0! | 3.0 |\n" in text
    assert text.endswith(
        "!: not valid (concurrency × prompt tokens):\n\n- all × 31: `preempted`, `2 times`\n"
    )
    assert latency_csv(latency_tables(frame, "d")).splitlines()[1] == "burst,100,8,2.0,3.0"


def test_a_cell_that_was_not_served_lists_each_reason_once() -> None:
    reasons = ["stalled: 120 s", "`a`\n|b|  *c*", "stalled: 120 s"]
    frame = cells(
        row(8, 31, None, trial=trial, verdict_detail=reason)
        for trial, reason in enumerate(reasons, 1)
    )
    assert markdown(frame).endswith("- 8 × 31: `timeout`, `stalled: 120 s`; `'a' |b| *c*`\n")


def test_cells_with_the_same_reason_share_a_line() -> None:
    frame = cells([row(1, 31, 1.0), row(2, 31, None), row(4, 31, None)])
    assert markdown(frame).endswith("\n\n- 2 × 31, 4 × 31: `timeout`, `stalled: 120 s`\n")


def test_a_cell_outside_the_study_is_empty() -> None:
    frame = cells([row(1, 31, 1.0), row(2, 31, 1.5), row(1, 63, 2.0)])
    text = markdown(frame)
    assert "|           2 | 1.5 |     |\n" in text
    assert text.endswith("\n\nEmpty: not part of the study.\n")
    assert latency_csv(latency_tables(frame, "d")).endswith("\nburst,100,2,1.5,\n")


def test_each_protocol_and_output_length_has_its_own_table() -> None:
    frame = cells(
        [
            row(1, 31, 1.0),
            row(1, 63, 2.0, protocol="closed_loop"),
            row(1, 31, 3.0, output_len=1),
        ]
    )
    tables = latency_tables(frame, "d")
    assert [(table.protocol, table.output_len) for table in tables] == [
        ("burst", 100),
        ("closed_loop", 100),
        ("burst", 1),
    ]
    headings = [line for line in markdown(frame).split("\n") if line.startswith("## ")]
    assert headings == [
        "## Burst, 100 output tokens",
        "## Closed loop, 100 output tokens",
        "## Burst, 1 output token",
    ]
    assert latency_csv(tables) == (
        "protocol,output_len,requests,31,63\nburst,100,1,1.0,\nclosed_loop,100,1,,2.0\nburst,1,1,3.0,\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (111.74, "111.7"),
        (2.0, "2.0"),
        (1.96, "2.0"),
        (0.84, "0.84"),
        (0.8, "0.80"),
        (0.996, "1.0"),
        (0.0512, "0.051"),
        (0.00996, "0.010"),
    ],
)
def test_numbers_have_one_decimal_or_two_significant_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_dash_has_its_reason_and_a_workload_that_waited_keeps_its_figure() -> None:
    oom = {"verdict": "oom", "verdict_detail": "CUDA out of memory"}
    left_out = {
        "verdict": "not_run",
        "verdict_detail": "dominated by burst-c8-i31-o100/trial-1: oom",
    }
    waited = {"verdict": "queued", "verdict_detail": "requests spent 33% of their time in queue"}
    frame = cells(
        [
            row(1, 31, 2.0),
            row(1, 63, 3.0, **waited),
            row(8, 31, None, **oom),
            row(8, 63, None, **left_out),
        ]
    )
    text = markdown(frame)
    assert "|           1 | 2.0 | 3.0~ |" in text
    assert "|           8 |   - |    - |" in text
    assert (
        """\
`-`: not served (concurrency × prompt tokens):

- 8 × 31: `oom`, `CUDA out of memory`
- 8 × 63: `not_run`, `dominated by burst-c8-i31-o100/trial-1: oom`

\\~: served, but requests waited or were preempted (concurrency × prompt tokens):

- 1 × 63: `queued`, `requests spent 33% of their time in queue`
"""
        in text
    )
