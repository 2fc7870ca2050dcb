"""Responses that a gateway held back. The streams are made by hand: 100 tokens, 10 ms each."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from helpers.deployments import SMALL_VLLM
from servegrid.analysis.buffering import describe_buffering, held_back
from servegrid.analysis.metrics import cell_row
from servegrid.analysis.slo import DEFAULT_SLO, Slo
from servegrid.records import columns, parquet
from servegrid.study.grid import Trial, Workload

MS = 1_000_000


def requests(stamps_ms: list[float], tokens: list[int], count: int = 4, **other: Any) -> pa.Table:
    """`count` equal requests of one wave, sent at 0, with chunks at these times."""
    row = {
        "user": 0,
        "wave": 0,
        "scheduled_ns": 0,
        "sent_ns": 0,
        "first_token_ns": round(stamps_ms[0] * MS),
        "token_ns": [round(stamp * MS) for stamp in stamps_ms],
        "chunk_tokens": tokens,
        "done_ns": round(stamps_ms[-1] * MS),
        "status": 200,
        "error": None,
        "completion_tokens": sum(tokens),
        "requested_tokens": sum(tokens),
    }
    return parquet.arrow_table(columns.REQUESTS, [row | other] * count)


STEADY = [100.0 + 10 * number for number in range(100)]


def in_pieces(size: int) -> list[float]:
    """The chunks reach the client `size` at a time, with the last one of the piece."""
    return [STEADY[min(number - number % size + size, 100) - 1] for number in range(100)]


@pytest.mark.parametrize(
    ("stamps", "tokens", "evidence"),
    [
        # nginx with proxy_buffering: everything at the end, ttft = e2el.
        ([STEADY[-1]] * 100, [1] * 100, "99% of the chunks with tokens"),
        # A buffer of 4 kB: 13 chunks in one read.
        (in_pieces(13), [1] * 100, "92% of the chunks with tokens"),
        (in_pieces(2), [1] * 100, "50% of the chunks with tokens"),
        # A gateway that writes one event with the whole text.
        ([STEADY[-1]], [100], "4 of 4 responses arrived in one piece"),
        ([STEADY[-1]], [16], "4 of 4 responses arrived in one piece"),
    ],
)
def test_held_back_responses_are_found(
    stamps: list[float], tokens: list[int], evidence: str
) -> None:
    found = describe_buffering(requests(stamps, tokens))
    assert found is not None and found.startswith(evidence)


@pytest.mark.parametrize(
    ("stamps", "tokens"),
    [
        (STEADY, [1] * 100),
        # The last token, and what follows it, in one read.
        ([*STEADY[:99], STEADY[98]], [1] * 100),
        # vLLM merges tokens if its API server lags, and with --stream-interval.
        (STEADY[::4], [4] * 25),
        ([STEADY[0], *STEADY[19::20]], [1, *[20] * 5]),
        # 0.2 ms per token: two chunks may share a read.
        ([0.2 * number for number in (1, 1, 3, 3, 5, 5, 7, 7)], [1] * 8),
        # One token, and a few tokens of one step of speculative decoding.
        ([100.0], [1]),
        ([100.0], [5]),
    ],
)
def test_responses_that_stream_are_not(stamps: list[float], tokens: list[int]) -> None:
    assert describe_buffering(requests(stamps, tokens)) is None


# llama.cpp with speculative decoding: after the first token, steps of 9 tokens, each in a chunk of
# its own. Of each step, 8 tokens were drafted and accepted.
STEPS_OF_NINE = [100.0, *(100.0 + 150 * (1 + number // 9) for number in range(36))]


@pytest.mark.parametrize(
    ("stamps", "accepted", "evidence"),
    [
        (STEPS_OF_NINE, 32, None),
        # The same stream without a word of drafts: something held the tokens back.
        (STEPS_OF_NINE, None, "86% of the chunks with tokens"),
        # More chunks share a read than were accepted.
        (STEPS_OF_NINE, 20, "32% of the chunks with tokens"),
        # A gateway that sends everything at the end.
        ([700.0] * 37, 32, "4 of 4 responses arrived in one piece"),
    ],
)
def test_tokens_of_one_step_of_speculative_decoding_are_not_held_back(
    stamps: list[float], accepted: int | None, evidence: str | None
) -> None:
    table = requests(stamps, [1] * 37, draft_tokens=40, accepted_draft_tokens=accepted)
    found = describe_buffering(table)
    assert found == evidence or (found is not None and found.startswith(str(evidence)))


@pytest.mark.parametrize("step", [2, 5, 17])
def test_chunks_with_all_tokens_of_a_step_are_not_held_back(step: int) -> None:
    """vLLM with speculative decoding: the first token, then a chunk of several every 40 ms."""
    stamps = [100.0 + 40 * number for number in range(7)]
    assert describe_buffering(requests(stamps, [1, *[step] * 6])) is None
    assert describe_buffering(requests(stamps[:2], [1, step])) is None


def test_failed_requests_and_empty_tables_show_nothing() -> None:
    assert describe_buffering(requests([1.0], [1], count=0)) is None
    assert describe_buffering(requests([500.0] * 9, [1] * 9, error="reset: x")) is None


def cell(table: pa.Table, slo: Slo = DEFAULT_SLO) -> dict[str, Any]:
    trial = Trial(SMALL_VLLM, Workload("burst", 4, 31, 100, 4), 1)
    record = {
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "verdict": "ok",
        "verdict_detail": None,
        "engine": {"engine": "vllm"},
        "environment": {"allocation": "a", "started": "t"},
        "client": {},
        "calibration": None,
        "metrics_before": None,
        "metrics_after": None,
    }
    return cell_row(record, table, parquet.arrow_table(columns.TELEMETRY, []), slo=slo)


def test_ttft_tpot_and_itl_are_withheld_and_the_rest_is_kept() -> None:
    row = cell(requests(in_pieces(13), [1] * 100))
    withheld = {name for name, value in row.items() if name.startswith(("ttft", "tpot", "itl"))}
    assert {row[name] for name in withheld} == {None}
    # 4 × 100 tokens until the last token, 100 + 99 × 10 ms after the start.
    assert row["e2el_s_p50"] == pytest.approx(1.09)
    assert row["output_tokens_per_s"] == pytest.approx(400 / 1.09)
    assert row["coalesced_chunk_fraction"] == pytest.approx(0.92)
    assert row["slo_attainment"] == 1.0


def test_goodput_is_withheld_if_it_needs_ttft() -> None:
    held, steady = requests(in_pieces(13), [1] * 100), requests(STEADY, [1] * 100)
    slo = Slo(ttft_s=0.2)
    assert cell(held, slo)["slo_attainment"] is None
    assert cell(held, slo)["goodput_requests_per_s"] is None
    assert cell(steady, slo)["slo_attainment"] == 1.0
    assert cell(held, Slo(e2el_s=2.0))["slo_attainment"] == 1.0


def test_an_emulated_engine_has_no_gateway() -> None:
    # 30 tokens in 3 s, all in one piece.
    late = requests([3000.0] * 30, [1] * 30)
    assert held_back({"engine": {"engine": "external"}}, late) is not None
    assert held_back({"engine": {"engine": "emulated"}}, late) is None
