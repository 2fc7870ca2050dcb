"""Notes on cells without a valid figure, against texts written by hand."""

from typing import Any

import pandas as pd
import pytest

from servegrid.report.failure_notes import (
    Reason,
    format_reasons,
    serving_failures,
    validity_failures,
)


def trials(*rows: dict[str, Any]) -> pd.DataFrame:
    served = {
        "verdict": "ok",
        "verdict_detail": None,
        "invalid_rules": None,
        "invalid_evidence": None,
    }
    return pd.DataFrame([served | row for row in rows], dtype=object)


def test_serving_failures_are_grouped_by_verdict_with_each_evidence_once() -> None:
    timeout = {"verdict": "timeout", "verdict_detail": "stalled: 120 s"}
    died = {"verdict": "server_died", "verdict_detail": None}
    assert serving_failures(trials(timeout, {}, died, timeout)) == [
        Reason("timeout", ("stalled: 120 s",), "2 of 4 trials"),
        Reason("server_died", (), "1 of 4 trials"),
    ]
    assert serving_failures(trials({})) == []


def test_validity_failures_are_grouped_by_rule_and_evidence_is_kept_whole() -> None:
    assert validity_failures(
        trials(
            {
                "invalid_rules": ["preempted", "client_timing_error"],
                "invalid_evidence": ["2 times", "not known: refused; tried: 3 times"],
            },
            {"invalid_rules": ["preempted"], "invalid_evidence": ["5 times"]},
        )
    ) == [
        Reason("preempted", ("2 times", "5 times"), ""),
        Reason("client_timing_error", ("not known: refused; tried: 3 times",), "1 of 2 trials"),
    ]


GRID = [(float(n), length) for n in (1, 2, 4) for length in (31, 63)]


def lines(reasons: dict[tuple[float, int], list[Reason]]) -> list[str]:
    return format_reasons({cell: reasons.get(cell, []) for cell in GRID})


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([(2, 31)], "2 × 31"),
        ([(4, 31), (1, 63)], "1 × 63, 4 × 31"),
        ([(4, 31), (4, 63), (1, 63)], "4 × all, 1 × 63"),
        ([(1, 31), (2, 31), (4, 31)], "all × 31"),
        ([(1, 31), (2, 31), (4, 31), (4, 63)], "4 × all, all × 31"),
        (GRID, "all"),
    ],
)
def test_full_rows_and_columns_are_named_as_one(
    cells: list[tuple[float, int]], expected: str
) -> None:
    assert lines({cell: [Reason("server_queueing", ("full",), "")] for cell in cells}) == [
        f"- {expected}: `server_queueing`, `full`"
    ]


def test_the_only_cell_of_a_table_is_named() -> None:
    assert format_reasons({(0.5, 31): [Reason("server_queueing", (), "")]}) == [
        "- 0.5 × 31: `server_queueing`"
    ]


def test_up_to_three_different_reasons_have_a_line_each() -> None:
    assert lines(
        {
            (1, 31): [
                Reason("server_queueing", ("by 1",), ""),
                Reason("gpu_throttled", (), "1 of 2 trials"),
            ],
            (2, 31): [Reason("server_queueing", ("by 2",), "")],
            (4, 63): [Reason("server_queueing", ("by 1",), "")],
        }
    ) == [
        "- 1 × 31, 4 × 63: `server_queueing`, `by 1`",
        "- 2 × 31: `server_queueing`, `by 2`",
        "- 1 × 31: 1 of 2 trials, `gpu_throttled`",
    ]


def test_more_than_three_reasons_share_a_line_that_counts_the_rest() -> None:
    reasons = {cell: [Reason("server_queueing", (f"by {k}",), "")] for k, cell in enumerate(GRID)}
    assert lines(reasons) == ["- all: `server_queueing`, `by 0`; `by 1`; `by 2` and 3 more"]
    reasons[GRID[0]] = [Reason("server_queueing", ("by 0",), "1 of 2 trials")]
    assert lines(reasons) == [
        "- all: some trials, `server_queueing`, `by 0`; `by 1`; `by 2` and 3 more"
    ]


def test_markdown_in_a_servers_text_is_quoted() -> None:
    assert lines({(1, 31): [Reason("http_error", ("`a`\n|b|  *c*",), "")]}) == [
        "- 1 × 31: `http_error`, `'a' |b| *c*`"
    ]
