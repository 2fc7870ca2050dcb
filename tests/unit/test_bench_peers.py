"""The comparison with other clients: reading their results, and the tables."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from peer_results import (
    ClientErrors,
    PeerError,
    ReportedRequest,
    compute_errors,
    key_by_request,
    read_aiperf,
    read_guidellm,
    read_servegrid,
    read_vllm,
)
from peer_table import Outcome, format_comparison
from servegrid.records import columns, parquet

MS = 1_000_000


def reported(
    key: str, tokens: int = 3, gaps: tuple[float, ...] | None = (0.02, 0.03)
) -> ReportedRequest:
    return ReportedRequest(key, tokens, ttft=0.112, mean_itl=0.025, gaps=gaps)


def test_servegrids_rows_are_read(tmp_path: Path) -> None:
    served = {
        "request_id": "bench/0",
        "sent_ns": 5 * MS,
        "first_token_ns": 105 * MS,
        "token_ns": [105 * MS, 125 * MS, 155 * MS],
    }
    failed = {"request_id": "bench/1", "sent_ns": 5 * MS, "token_ns": [], "error": "status: 500"}
    table = parquet.arrow_table(columns.REQUESTS, [served, failed])
    pq.write_table(table, tmp_path / "requests.parquet")
    (request,) = read_servegrid(tmp_path)
    assert (request.key, request.tokens, request.ttft) == ("bench/0", 3, 0.1)
    assert request.gaps == pytest.approx((0.02, 0.03))
    assert request.mean_itl == pytest.approx(0.025)


def test_vllms_result_is_read(tmp_path: Path) -> None:
    result = {
        "completed": 2,
        "failed": 1,
        "output_lens": [3, 0, 2],
        "ttfts": [0.108, 0.0, 0.111],
        "itls": [[0.0197, 0.0203], [], [0.021]],
        "errors": ["", "Internal Server Error", ""],
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_vllm(tmp_path) == [
        ReportedRequest("peer-0", 3, 0.108, pytest.approx(0.02), (0.0197, 0.0203)),
        ReportedRequest("peer-2", 2, 0.111, 0.021, (0.021,)),
    ]


def test_guidellms_result_is_read(tmp_path: Path) -> None:
    body = {"model": "mock", "stream": True, "max_tokens": 100, "prompt": "1 0 m0 Hard pass"}
    request = {
        "type_": "generative_request_stats",
        "request_id": "0d018aaf-b125-4e72-91bc-a1f3f2951610",
        "request_args": json.dumps({"method": None, "stream": True, "body": body}),
        "output_tokens": 100,
        "time_to_first_token_ms": 112.0,
        "inter_token_latency_ms": 19.5,
    }
    requests = {"successful": [request], "errored": [{}], "incomplete": [{}], "total": None}
    result = {"metadata": {}, "benchmarks": [{"requests": requests}]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_guidellm(tmp_path) == [
        ReportedRequest("1 0 m0 Hard pass", 100, 0.112, 0.0195, None)
    ]


def aiperf_record(
    key: str, gaps: list[float] | None, error: Any = None, cancelled: bool = False
) -> str:
    metrics: dict[str, Any] = {
        "time_to_first_token": {"value": 125.5, "unit": "ms"},
        "output_sequence_length": {"value": 3, "unit": "tokens"},
    }
    if gaps is not None:
        metrics["inter_chunk_latency"] = {"value": gaps, "unit": "ms"}
    metadata = {"x_request_id": key, "was_cancelled": cancelled}
    return json.dumps({"metadata": metadata, "metrics": metrics, "error": error})


def test_aiperfs_records_are_read(tmp_path: Path) -> None:
    lines = [
        aiperf_record("3fc10075", [17.5, 20.5]),
        aiperf_record("failed", [17.5, 20.5], {"code": 500, "message": "Internal Server Error"}),
        aiperf_record("cancelled", [17.5], cancelled=True),
        aiperf_record("one token", None),
    ]
    (tmp_path / "profile_export.jsonl").write_text("\n".join(lines) + "\n")
    (request,) = read_aiperf(tmp_path)
    assert (request.key, request.tokens, request.ttft) == ("3fc10075", 3, 0.1255)
    assert request.gaps == pytest.approx((0.0175, 0.0205))
    assert request.mean_itl == pytest.approx(0.019)


def test_the_log_is_keyed_by_request_id_or_prompt() -> None:
    times = {"peer-0": 1, "#1": 2, "#2": 3, "#3": 4}
    prompts = ["with id", "once", "twice", "twice"]
    requests = [{"body": {"prompt": prompt}} for prompt in prompts]
    assert key_by_request(times, requests) == {"peer-0": 1, "once": 2}


SENDS = {"a": [100 * MS, 121 * MS, 150 * MS], "b": [7 * MS, 27 * MS, 47 * MS]}


def test_errors_are_computed_from_gaps() -> None:
    errors = compute_errors([reported("a"), reported("b")], SENDS, request_count=4, ttft=0.1)
    assert errors.ttft == pytest.approx([0.012, 0.012])
    # Server: 21 and 29 ms, 20 and 20 ms; reported: 20 and 30 ms.
    assert errors.itl == pytest.approx([0.001, 0.001, 0.0, 0.01])
    assert errors.mean_itl == pytest.approx([0.0, 0.005])
    assert errors.lost == 2


def test_errors_are_computed_from_means_without_gaps() -> None:
    errors = compute_errors([reported("b", gaps=None)], SENDS, request_count=1, ttft=0.1)
    assert errors.itl is None
    assert errors.mean_itl == pytest.approx([0.005])
    assert errors.lost == 0


def test_a_request_with_fewer_tokens_is_lost() -> None:
    short = reported("a", tokens=2, gaps=(0.02,))
    errors = compute_errors([short, reported("b")], SENDS, request_count=2, ttft=0.1)
    assert len(errors.ttft) == 1
    assert errors.lost == 1
    with pytest.raises(PeerError, match="no request that received all of its tokens"):
        compute_errors([short], SENDS, request_count=2, ttft=0.1)


def test_a_reported_request_must_be_in_the_servers_log() -> None:
    with pytest.raises(PeerError, match=r"'c'.*not in the server's log"):
        compute_errors([reported("c")], SENDS, request_count=1, ttft=0.1)


def outcome(
    client: str, concurrency: int, itl_ms: float | None, cpu_s: float = 0.02, lost: int = 0
) -> Outcome:
    itl = None if itl_ms is None else [itl_ms / 1e3] * 9
    errors = ClientErrors(ttft=[0.001, 0.002, 0.003], mean_itl=[0.0005], itl=itl, lost=lost)
    return Outcome(client, concurrency, 160, errors, cpu_s)


OUTCOMES = [
    outcome("ours", 16, 0.5),
    outcome("vllm", 16, 1.0, cpu_s=0.08),
    outcome("ours", 128, 0.5, lost=1),
    outcome("vllm", 128, 2.0, cpu_s=0.01),
    outcome("guidellm", 128, None, cpu_s=0.04),
    outcome("ours", 512, 0.1),
    outcome("vllm", 512, 1.0),
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def find_rows(table: str, first: str) -> list[list[str]]:
    """The cells of the lines that start with the cell `first`."""
    return [row for row in map(cells, table.splitlines()) if row[0] == first]


def test_the_table_has_the_values_of_all_clients() -> None:
    table = format_comparison("ours", OUTCOMES, {"ours": "1", "vllm": "2"}, {})
    assert cells(table.splitlines()[0])[3:] == [
        *("TTFT, median", "TTFT, p99", "ITL, median", "ITL, p99", "mean ITL, p99"),
        *("CPU s", "lost"),
    ]
    # The p99 of 1, 2 and 3 ms lies 0.98 of the way from the second to the third.
    latencies = ["2.0", "3.0", "0.5000", "0.5000", "0.5000"]
    assert find_rows(table, "16")[0] == ["16", "160", "ours", *latencies, "0.020", "0"]
    assert find_rows(table, "128")[2][5:7] == ["–", "–"]
    assert "Clients: ours 1, vllm 2." in table


def test_servegrid_is_compared_with_the_best_peer() -> None:
    table = format_comparison("ours", OUTCOMES, {}, {})
    at_16, at_128, at_512 = (
        find_rows(table, concurrency)[-1] for concurrency in ("16", "128", "512")
    )
    assert at_16 == [
        *("16", "equal", "equal", "better: 0.5 × vllm", "better: 0.5 × vllm"),
        *("equal", "better: 0.25 × vllm", "equal"),
    ]
    assert at_128[4] == "better: 0.25 × vllm (target ≤ 0.1: missed)"
    assert at_128[6:] == ["worse: 2 × vllm", "worse: vllm has 0"]
    assert at_512[4] == "better: 0.1 × vllm (target ≤ 0.1: met)"


def test_a_failed_client_is_listed_with_the_reason() -> None:
    table = format_comparison(
        "ours", OUTCOMES[:1], {}, {"aiperf": "it exited with 1: no tokenizer"}
    )
    assert "aiperf failed: it exited with 1: no tokenizer." in table
    assert "best peer" not in table
