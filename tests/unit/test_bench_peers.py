"""What the comparison with other clients reads from their files, and what it makes of it."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from peer_results import (
    Distances,
    PeerError,
    Reported,
    distances,
    keyed,
    of_aiperf,
    of_guidellm,
    of_servegrid,
    of_vllm,
)
from peer_table import Outcome, table_of
from servegrid.records import columns, parquet

MS = 1_000_000


def reported(key: str, tokens: int = 3, gaps: tuple[float, ...] | None = (0.02, 0.03)) -> Reported:
    return Reported(key, tokens, ttft=0.112, mean_itl=0.025, gaps=gaps)


def test_servegrids_rows(tmp_path: Path) -> None:
    served = {
        "request_id": "bench/0",
        "sent_ns": 5 * MS,
        "first_token_ns": 105 * MS,
        "token_ns": [105 * MS, 125 * MS, 155 * MS],
    }
    failed = {"request_id": "bench/1", "sent_ns": 5 * MS, "token_ns": [], "error": "status: 500"}
    table = parquet.table_of(columns.REQUESTS, [served, failed])
    pq.write_table(table, tmp_path / "requests.parquet")
    (found,) = of_servegrid(tmp_path)
    assert (found.key, found.tokens, found.ttft) == ("bench/0", 3, 0.1)
    assert found.gaps == pytest.approx((0.02, 0.03))
    assert found.mean_itl == pytest.approx(0.025)


def test_vllms_result(tmp_path: Path) -> None:
    result = {
        "completed": 2,
        "failed": 1,
        "output_lens": [3, 0, 2],
        "ttfts": [0.108, 0.0, 0.111],
        "itls": [[0.0197, 0.0203], [], [0.021]],
        "errors": ["", "Internal Server Error", ""],
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert of_vllm(tmp_path) == [
        Reported("peer-0", 3, 0.108, pytest.approx(0.02), (0.0197, 0.0203)),
        Reported("peer-2", 2, 0.111, 0.021, (0.021,)),
    ]


def test_guidellms_result(tmp_path: Path) -> None:
    body = {"model": "scripted", "stream": True, "max_tokens": 100, "prompt": "1 0 m0 Hard pass"}
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
    assert of_guidellm(tmp_path) == [Reported("1 0 m0 Hard pass", 100, 0.112, 0.0195, None)]


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


def test_aiperfs_records(tmp_path: Path) -> None:
    lines = [
        aiperf_record("3fc10075", [17.5, 20.5]),
        aiperf_record("failed", [17.5, 20.5], {"code": 500, "message": "Internal Server Error"}),
        aiperf_record("cancelled", [17.5], cancelled=True),
        aiperf_record("one token", None),
    ]
    (tmp_path / "profile_export.jsonl").write_text("\n".join(lines) + "\n")
    (found,) = of_aiperf(tmp_path)
    assert (found.key, found.tokens, found.ttft) == ("3fc10075", 3, 0.1255)
    assert found.gaps == pytest.approx((0.0175, 0.0205))
    assert found.mean_itl == pytest.approx(0.019)


def test_the_log_by_identifier_or_prompt() -> None:
    times = {"peer-0": 1, "#1": 2, "#2": 3, "#3": 4}
    prompts = ["named", "once", "twice", "twice"]
    requests = [{"body": {"prompt": prompt}} for prompt in prompts]
    assert keyed(times, requests) == {"peer-0": 1, "once": 2}


SENDS = {"a": [100 * MS, 121 * MS, 150 * MS], "b": [7 * MS, 27 * MS, 47 * MS]}


def test_distances_of_gaps() -> None:
    found = distances([reported("a"), reported("b")], SENDS, asked=4, ttft=0.1)
    assert found.ttft == pytest.approx([0.012, 0.012])
    # Server: 21 and 29 ms, 20 and 20 ms; reported: 20 and 30 ms.
    assert found.itl == pytest.approx([0.001, 0.001, 0.0, 0.01])
    assert found.mean_itl == pytest.approx([0.0, 0.005])
    assert found.lost == 2


def test_distances_of_means_alone() -> None:
    found = distances([reported("b", gaps=None)], SENDS, asked=1, ttft=0.1)
    assert found.itl is None
    assert found.mean_itl == pytest.approx([0.005])
    assert found.lost == 0


def test_a_request_with_fewer_tokens_is_lost() -> None:
    short = reported("a", tokens=2, gaps=(0.02,))
    found = distances([short, reported("b")], SENDS, asked=2, ttft=0.1)
    assert len(found.ttft) == 1
    assert found.lost == 1
    with pytest.raises(PeerError, match="no request with all of its tokens"):
        distances([short], SENDS, asked=2, ttft=0.1)


def test_a_report_that_the_server_knows_nothing_of() -> None:
    with pytest.raises(PeerError, match=r"'c'.*not in the server's log"):
        distances([reported("c")], SENDS, asked=1, ttft=0.1)


def outcome(
    client: str, streams: int, itl_ms: float | None, cpu_s: float = 0.02, lost: int = 0
) -> Outcome:
    itl = None if itl_ms is None else [itl_ms / 1e3] * 9
    found = Distances(ttft=[0.001, 0.002, 0.003], mean_itl=[0.0005], itl=itl, lost=lost)
    return Outcome(client, streams, 160, found, cpu_s)


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


def rows_of(table: str, first: str) -> list[list[str]]:
    """Cells of the lines whose first cell is `first`."""
    return [row for row in map(cells, table.splitlines()) if row[0] == first]


def test_the_figures() -> None:
    table = table_of("ours", OUTCOMES, {"ours": "1", "vllm": "2"}, {})
    assert cells(table.splitlines()[0])[3:] == [
        *("TTFT, median", "TTFT, p99", "ITL, median", "ITL, p99", "mean ITL, p99"),
        *("CPU s", "lost"),
    ]
    # The p99 of 1, 2 and 3 ms lies 0.98 of the way from the second to the third.
    latencies = ["2.0", "3.0", "0.5000", "0.5000", "0.5000"]
    assert rows_of(table, "16")[0] == ["16", "160", "ours", *latencies, "0.020", "0"]
    assert rows_of(table, "128")[2][5:7] == ["–", "–"]
    assert "Clients: ours 1, vllm 2." in table


def test_the_comparison() -> None:
    table = table_of("ours", OUTCOMES, {}, {})
    sixteen, more, most = (rows_of(table, streams)[-1] for streams in ("16", "128", "512"))
    assert sixteen == [
        *("16", "equal", "equal", "better: 0.5 × vllm", "better: 0.5 × vllm"),
        *("equal", "better: 0.25 × vllm", "equal"),
    ]
    assert more[4] == "better: 0.25 × vllm (wanted ≤ 0.1: missed)"
    assert more[6:] == ["worse: 2 × vllm", "worse: vllm has 0"]
    assert most[4] == "better: 0.1 × vllm (wanted ≤ 0.1: met)"


def test_a_client_that_failed_is_named_with_the_reason() -> None:
    table = table_of("ours", OUTCOMES[:1], {}, {"aiperf": "it ended with 1: no tokenizer"})
    assert "aiperf gave no (further) figures: it ended with 1: no tokenizer." in table
    assert "best peer" not in table
