"""Reasons in few lines, against text written by hand."""

from typing import Any

import pandas as pd
import pytest

from servegrid.report.failure_notes import Reason, doubts, failures, listed


def trials(*rows: dict[str, Any]) -> pd.DataFrame:
    served = {
        "verdict": "ok",
        "verdict_detail": None,
        "invalid_rules": None,
        "invalid_evidence": None,
    }
    return pd.DataFrame([served | row for row in rows], dtype=object)


def test_failures_are_told_by_verdict_with_each_evidence_once() -> None:
    timeout = {"verdict": "timeout", "verdict_detail": "stalled: 120 s"}
    died = {"verdict": "server_died", "verdict_detail": None}
    assert failures(trials(timeout, {}, died, timeout)) == [
        Reason("timeout", ("stalled: 120 s",), "2 of 4 trials"),
        Reason("server_died", (), "1 of 4 trials"),
    ]
    assert failures(trials({})) == []


def test_doubts_are_told_by_rule_and_only_a_rule_begins_one() -> None:
    broken = "preempted: 2 times; distorted: not known: refused; tried: 3 times"
    assert doubts(
        trials(
            {"invalid_reason": broken},
            {"invalid_rules": ["preempted"], "invalid_evidence": ["5 times"]},
        )
    ) == [
        Reason("preempted", ("2 times", "5 times"), ""),
        Reason("client_timing_error", ("not known: refused; tried: 3 times",), "1 of 2 trials"),
    ]


GRID = [(float(n), length) for n in (1, 2, 4) for length in (31, 63)]


def lines(reasons: dict[tuple[float, int], list[Reason]]) -> list[str]:
    return listed({cell: reasons.get(cell, []) for cell in GRID})


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ([(2, 31)], "2 × 31"),
        ([(4, 31), (1, 63)], "1 × 63, 4 × 31"),
        ([(4, 31), (4, 63), (1, 63)], "4 × all, 1 × 63"),
        ([(1, 31), (2, 31), (4, 31)], "all × 31"),
        ([(1, 31), (2, 31), (4, 31), (4, 63)], "4 × all, all × 31"),
        (GRID, "all"),
    ],
)
def test_cells_are_named_by_the_rows_and_columns_that_they_fill(
    cells: list[tuple[float, int]], told: str
) -> None:
    assert lines({cell: [Reason("server_queueing", ("full",), "")] for cell in cells}) == [
        f"- {told}: `server_queueing`, `full`"
    ]


def test_a_table_of_one_cell_names_it() -> None:
    assert listed({(0.5, 31): [Reason("server_queueing", (), "")]}) == [
        "- 0.5 × 31: `server_queueing`"
    ]


def test_each_evidence_has_its_line_while_these_are_few() -> None:
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


def test_many_of_one_rule_share_a_line_that_says_how_many_more_there_are() -> None:
    reasons = {cell: [Reason("server_queueing", (f"by {k}",), "")] for k, cell in enumerate(GRID)}
    assert lines(reasons) == ["- all: `server_queueing`, `by 0`; `by 1`; `by 2` and 3 more"]
    reasons[GRID[0]] = [Reason("server_queueing", ("by 0",), "1 of 2 trials")]
    assert lines(reasons) == [
        "- all: some trials, `server_queueing`, `by 0`; `by 1`; `by 2` and 3 more"
    ]


def test_text_of_a_server_stays_text() -> None:
    assert lines({(1, 31): [Reason("http_error", ("`a`\n|b|  *c*",), "")]}) == [
        "- 1 × 31: `http_error`, `'a' |b| *c*`"
    ]
