"""Measurements of the mock server: what is recorded, and how every fault is reported."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from helpers.demo_model import DemoModel
from helpers.faulty_server import MODEL, FaultScript, MockServer, start_faulty_server
from servegrid.client import measure, schedule
from servegrid.errors import LoadError
from servegrid.records import columns, parquet
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Workload

BURST = Workload("burst", 4, 9, 5, 8, warmup_waves=0, timeout_s=60, idle_timeout_s=20)
CLOSED_LOOP = replace(BURST, protocol="closed_loop", requests=10, concurrency=3)


def measure_rows(server: MockServer, workload: Workload) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = measure(
        server.endpoint, workload, None, "cell"
    ).requests.to_pylist()
    return rows


@pytest.mark.parametrize("usage", ["continuous", "final"])
@pytest.mark.parametrize("chunk_tokens", [(1,), (1, 3)])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_tokens_of_all_chunks_add_up_to_the_servers_count(
    usage: str, chunk_tokens: tuple[int, ...], newline: str
) -> None:
    script = FaultScript(
        itl_s=0.002,
        usage=usage,  # type: ignore[arg-type]
        chunk_tokens=chunk_tokens,
        empty_every=3,
        newline=newline,
    )
    with start_faulty_server(script) as server:
        rows = measure_rows(server, replace(BURST, output_len=20))
    for row in rows:
        assert row["error"] is None
        assert sum(row["chunk_tokens"]) == row["completion_tokens"] == 20
        assert row["prompt_tokens"] == 9
        assert row["chunk_tokens_estimated"] is (usage == "final")
        assert row["first_token_ns"] == row["token_ns"][0]
        assert row["token_ns"] == sorted(row["token_ns"])
    if usage == "continuous":
        # 20 tokens in ones, or alternately in ones and threes.
        expected = [1] * 20 if chunk_tokens == (1,) else [1, 3] * 5
        assert rows[0]["chunk_tokens"] == expected


def test_responses_in_tiny_pieces_give_the_same_tokens() -> None:
    for size in (1, 7):
        with start_faulty_server(FaultScript(piece_bytes=size, itl_s=0.0001)) as server:
            rows = measure_rows(server, replace(BURST, concurrency=2, requests=2))
        assert [row["chunk_tokens"] for row in rows] == [[1] * 5] * 2
        assert [row["error"] for row in rows] == [None] * 2


def test_a_burst_sends_one_wave_after_another() -> None:
    with start_faulty_server(FaultScript(ttft_s=0.02, itl_s=0.01)) as server:
        measurement = measure(server.endpoint, replace(BURST, warmup_waves=2), None, "cell")
        log = server.log()
    table = measurement.requests
    assert table.schema.equals(parquet.arrow_schema(columns.REQUESTS))
    rows = table.to_pylist()
    assert [row["request_id"] for row in rows] == [f"cell/{number}" for number in range(8)]
    assert [row["wave"] for row in rows] == [0] * 4 + [1] * 4
    for wave in (rows[:4], rows[4:]):
        assert sorted(row["user"] for row in wave) == [0, 1, 2, 3]
        assert len({row["scheduled_ns"] for row in wave}) == 1
    assert max(row["done_ns"] for row in rows[:4]) < rows[4]["scheduled_ns"]
    names = Counter(seen["headers"]["x-request-id"].partition("/")[2] for seen in log.requests)
    warmup = [f"warmup/{number}" for number in range(8)]
    assert names == Counter(["probe", *warmup, *map(str, range(8))])
    facts = measurement.facts
    assert facts["window_ns"] == [rows[0]["scheduled_ns"], max(row["done_ns"] for row in rows)]
    assert facts["warmup_errors"] == {}
    assert facts["warmup_s"] > 2 * 0.06
    assert facts["stamps"] == "kernel"
    assert facts["token_chunks"] == 40
    assert 0 <= facts["send_lag_ns_p50"] <= facts["send_lag_ns_max"]
    json.dumps(facts)


def test_a_closed_loop_keeps_all_users_busy_until_all_requests_are_sent() -> None:
    with start_faulty_server(FaultScript(ttft_s=0.02, itl_s=0.01)) as server:
        rows = measure_rows(server, CLOSED_LOOP)
    assert len(rows) == 10
    assert {row["error"] for row in rows} == {None}
    assert {row["wave"] for row in rows} == {0}
    users = Counter(row["user"] for row in rows)
    assert sorted(users) == [0, 1, 2] and min(users.values()) >= 3
    for user in users:
        own_rows = [row for row in rows if row["user"] == user]
        ends = [row["done_ns"] for row in own_rows]
        assert [row["scheduled_ns"] for row in own_rows][1:] == ends[:-1]


def test_a_closed_loop_with_a_duration_sends_nothing_later_and_finishes_what_was_sent() -> None:
    workload = replace(CLOSED_LOOP, requests=None, duration_s=0.5, warmup_waves=1)
    with start_faulty_server(FaultScript(ttft_s=0.02, itl_s=0.01)) as server:
        measurement = measure(server.endpoint, workload, None, "cell")
        sent = server.log().requests
    rows = measurement.requests.to_pylist()
    start_ns = rows[0]["scheduled_ns"]
    due = [(row["scheduled_ns"] - start_ns) / 1e9 for row in rows]
    # A request takes 60 ms: each of 3 users sends 8 or 9, fewer on a slow machine.
    assert 3 < len(rows) <= 27
    assert max(due) <= 0.5 < (max(row["done_ns"] for row in rows) - start_ns) / 1e9
    assert {row["error"] for row in rows} == {None}
    assert measurement.facts["left"] > 0
    assert len(sent) == 1 + 3 + len(rows)


def test_users_think_between_a_response_and_their_next_request() -> None:
    workload = replace(CLOSED_LOOP, requests=30, think_time_s=0.03)
    with start_faulty_server(FaultScript(ttft_s=0.005)) as server:
        rows = measure_rows(server, workload)
    assert len(rows) == 30
    thinks = []
    for user in range(3):
        own_rows = [row for row in rows if row["user"] == user]
        for before, after in pairwise(sorted(own_rows, key=lambda row: row["scheduled_ns"])):
            thinks.append((after["scheduled_ns"] - before["done_ns"]) / 1e9)
            assert after["sent_ns"] >= before["done_ns"]
    assert len(thinks) == 27
    assert min(thinks) > 0
    # Exponential with a mean of 30 ms: the mean of 27 lies within 4 standard errors of 5.8 ms.
    assert 0.007 < statistics.mean(thinks) < 0.053
    endless = schedule.think_times(workload, "cell")
    assert endless is not None
    drawn = list(islice(endless, 30))
    assert drawn is not None
    assert set(map(microseconds, thinks)) <= set(map(microseconds, drawn))


def microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def test_an_open_loop_sends_requests_when_they_are_due_even_to_a_slow_server() -> None:
    workload = Workload(
        "poisson", None, 9, 5, 40, request_rate=20.0, warmup_waves=0, idle_timeout_s=20
    )
    with start_faulty_server(FaultScript(ttft_s=1.5)) as server:
        rows = measure_rows(server, workload)
    arrivals = schedule.arrival_times(workload, "cell")
    assert arrivals is not None
    start_ns = rows[0]["scheduled_ns"] - round(arrivals[0] * 1e9)
    assert [row["scheduled_ns"] - start_ns for row in rows] == [round(a * 1e9) for a in arrivals]
    assert {row["error"] for row in rows} == {None}
    assert all(row["sent_ns"] >= row["scheduled_ns"] for row in rows)
    # Requests due before the first response have different users: 20 at the start (the arrivals
    # of one second) and additional ones.
    early = sum(arrival < arrivals[0] + 1.4 for arrival in arrivals)
    assert early > 20
    assert len({row["user"] for row in rows}) >= early
    assert max(row["user"] for row in rows) >= 20


def test_an_open_loop_with_a_duration_sends_the_arrivals_within_it() -> None:
    workload = Workload(
        "poisson", None, 9, 5, None, request_rate=50.0, duration_s=0.4, idle_timeout_s=20
    )
    with start_faulty_server(FaultScript()) as server:
        rows = measure_rows(server, workload)
    assert len(rows) == len(schedule.arrival_times(workload, "cell") or ())
    assert (rows[-1]["scheduled_ns"] - rows[0]["scheduled_ns"]) / 1e9 < 0.4


def test_output_lengths_vary_and_each_response_has_the_requested_one() -> None:
    workload = replace(BURST, concurrency=8, output_len=10, output_spread=0.5)
    with start_faulty_server(FaultScript()) as server:
        rows = measure_rows(server, workload)
        limits = [seen["body"]["max_tokens"] for seen in server.log().requests]
    lengths = [row["requested_tokens"] for row in rows]
    assert set(lengths) <= set(range(5, 16)) and len(set(lengths)) > 1
    assert [row["completion_tokens"] for row in rows] == lengths
    assert sorted(limits) == sorted([1, *lengths])
    assert {row["error"] for row in rows} == {None}


def test_counters_are_read_before_and_after_the_measurement_without_warm_up() -> None:
    seen: list[tuple[int, int]] = []
    with start_faulty_server(FaultScript()) as server:

        def counters(finished: int) -> dict[str, float]:
            seen.append((finished, len(server.log().requests)))
            return {"reads": float(len(seen))}

        workload = replace(BURST, warmup_waves=1)
        measurement = measure(server.endpoint, workload, None, "cell", counters)
    # First the probe and the four requests of the warm-up, then the eight.
    assert seen == [(0, 5), (8, 13)]
    assert measurement.counters_before == {"reads": 1.0}
    assert measurement.counters_after == {"reads": 2.0}


def test_progress_is_reported_after_the_warm_up_and_after_each_wave() -> None:
    for workload, expected in (
        (replace(BURST, warmup_waves=1), [(0, 8), (4, 8), (8, 8)]),
        (CLOSED_LOOP, [(0, 10), (10, 10)]),
    ):
        calls: list[tuple[int, int]] = []
        with start_faulty_server(FaultScript()) as server:

            def progress(done: int, total: int, calls: list[tuple[int, int]] = calls) -> None:
                calls.append((done, total))

            measure(server.endpoint, workload, None, "cell", progress=progress)
        assert calls == expected


def test_the_total_of_the_progress_is_0_if_it_is_unknown() -> None:
    workload = replace(CLOSED_LOOP, requests=None, duration_s=0.2, warmup_waves=1)
    calls: list[tuple[int, int]] = []
    with start_faulty_server(FaultScript(ttft_s=0.02)) as server:
        measurement = measure(
            server.endpoint,
            workload,
            None,
            "cell",
            progress=lambda done, total: calls.append((done, total)),
        )
    assert calls == [(0, 0), (len(measurement.errors), 0)]


def test_the_request_follows_the_workload() -> None:
    with start_faulty_server(FaultScript(), api_key="secret") as server:
        measure(server.endpoint, BURST, None, "cell")
        log = server.log()
    bodies = {seen["headers"]["x-request-id"]: seen["body"] for seen in log.requests}
    measured = [bodies[f"cell/{number}"] for number in range(8)]
    assert len({tuple(body["prompt"]) for body in measured}) == 8
    assert all(len(body["prompt"]) == 9 for body in measured)
    assert {key: value for key, value in measured[0].items() if key != "prompt"} == {
        "model": MODEL,
        "max_tokens": 5,
        "min_tokens": 5,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    assert {seen["headers"]["authorization"] for seen in log.requests} == {"Bearer secret"}
    assert {seen["headers"]["accept-encoding"] for seen in log.requests} == {"identity"}
    assert {seen["path"] for seen in log.requests} == {"/v1/completions"}


def test_a_server_on_a_unix_socket_is_measured_with_read_times(tmp_path: Path) -> None:
    with start_faulty_server(FaultScript(itl_s=0.002, unix_socket=str(tmp_path / "s"))) as server:
        for workload in (BURST, CLOSED_LOOP):
            measurement = measure(server.endpoint, workload, None, "cell")
            assert measurement.errors == [None] * workload.requests
            assert measurement.facts["stamps"] == "reader"


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"fault": "status", "status": 429}, "http_status: 429 mock status 429"),
    ({"fault": "status", "status": 500}, "http_status: 500 mock status 500"),
    ({"fault": "status", "status": 503}, "http_status: 503 mock status 503"),
    ({"fault": "reset", "fault_after": 2}, "reset: Connection reset by peer"),
    ({"fault": "reset", "fault_after": 0}, "reset: Connection reset by peer"),
    (
        {"fault": "close", "fault_after": 0},
        "reset: the server closed the connection without a response",
    ),
    ({"fault": "close", "fault_after": 2}, "truncated: the server closed the connection after "),
    ({"fault": "end_early", "fault_after": 2}, "truncated: the stream ended without"),
    ({"fault": "malformed_json", "fault_after": 2}, "malformed: an event is not JSON"),
    ({"fault": "malformed_chunk"}, "malformed: not an HTTP response: a chunk size is"),
    ({"fault": "not_a_stream"}, "malformed: the response is not an event stream"),
    ({"fault": "error_object", "fault_after": 2}, "mid_stream_error: mock failure"),
    ({"fault": "stall", "fault_after": 2}, "stalled: no byte for 0.3 s"),
    ({"fault": "stall", "fault_after": 0}, "stalled: no byte for 0.3 s"),
    ({"fault": "fewer_tokens"}, "wrong_completion_tokens: 4 generated, 5 requested"),
    ({"fault": "wrong_prompt_usage"}, "wrong_prompt_tokens: 10 counted by the server, 9 sent"),
]


@pytest.mark.parametrize(
    ("fault", "error"), FAULTS, ids=[error.partition(",")[0] for _, error in FAULTS]
)
def test_a_fault_fails_only_its_own_request(fault: dict[str, Any], error: str) -> None:
    """The sixth of eight requests has the fault. Its connection has served a request before."""
    script = FaultScript(itl_s=0.001, fault_on=r"cell/5$", **fault)
    with start_faulty_server(script) as server:
        for workload in (BURST, replace(CLOSED_LOOP, requests=8)):
            rows = measure_rows(server, replace(workload, idle_timeout_s=0.3))
            failed = rows.pop(5)
            assert failed["error"].startswith(error)
            assert [row["error"] for row in rows] == [None] * 7
            assert failed["done_ns"] >= failed["sent_ns"]
            if fault.get("fault_after") == 2:
                assert len(failed["token_ns"]) == 2


def test_missing_usage_fails_every_request() -> None:
    with start_faulty_server(FaultScript(usage="none")) as server:
        rows = measure_rows(server, BURST)
    assert {row["error"].partition(":")[0] for row in rows} == {"usage_missing"}
    assert {row["completion_tokens"] for row in rows} == {None}


def test_the_timeout_fails_requests_in_flight_and_unsent_requests() -> None:
    script = FaultScript(itl_s=0.05, fault="stall", fault_after=1, fault_on=r"/[0-3]$")
    with start_faulty_server(script) as server:
        burst = measure_rows(server, replace(BURST, timeout_s=0.6))
        closed_loop = measure_rows(server, replace(CLOSED_LOOP, concurrency=4, timeout_s=0.6))
    for rows in (burst, closed_loop):
        assert {row["error"].partition(":")[0] for row in rows} == {"timeout"}
        assert all(len(row["token_ns"]) == 1 and row["sent_ns"] for row in rows[:4])
        assert {row["sent_ns"] for row in rows[4:]} == {None}
        assert all(row["done_ns"] for row in rows)


def test_a_server_that_accepts_late_causes_no_failure() -> None:
    with start_faulty_server(FaultScript(accept_after_s=0.5)) as server:
        assert {row["error"] for row in measure_rows(server, BURST)} == {None}


def test_failures_of_the_warm_up_are_in_the_facts_but_have_no_rows() -> None:
    script = FaultScript(fault="status", status=503, fault_on=r"warmup/[01]$")
    with start_faulty_server(script) as server:
        measurement = measure(server.endpoint, replace(BURST, warmup_waves=1), None, "cell")
    assert measurement.errors == [None] * 8
    assert measurement.facts["warmup_errors"] == {"http_status: 503 mock status 503": 2}


def test_usage_per_chunk_is_omitted_if_the_server_refuses_it() -> None:
    script = FaultScript(fault="refuse_key", refused_key="continuous_usage_stats")
    with start_faulty_server(script) as server:
        measurement = measure(server.endpoint, BURST, None, "cell")
    assert measurement.errors == [None] * 8
    assert measurement.facts["continuous_usage"] is False
    assert measurement.requests["chunk_tokens_estimated"].to_pylist() == [True] * 8


@pytest.mark.parametrize("key", ["min_tokens", "ignore_eos"])
def test_keys_that_fix_the_length_are_omitted_if_the_server_refuses_them(
    key: str,
) -> None:
    with start_faulty_server(FaultScript(fault="refuse_key", refused_key=key)) as server:
        measurement = measure(server.endpoint, BURST, None, "cell")
        bodies = [seen["body"] for seen in server.log().requests]
    assert measurement.errors == [None] * 8
    assert measurement.facts["keys_refused"] == [key]
    assert [key in body for body in bodies] == [True, False] + [False] * 8


def test_the_refusal_of_any_other_key_is_an_error_that_names_it() -> None:
    with (
        start_faulty_server(
            FaultScript(fault="refuse_key", refused_key="stream_options")
        ) as server,
        pytest.raises(LoadError, match=r"the key `stream_options` of the request .HTTP 400"),
    ):
        measure(server.endpoint, BURST, None, "cell")


def test_a_server_that_refuses_token_ids_gets_text(demo_model: DemoModel) -> None:
    with start_faulty_server(FaultScript(fault="refuse_ids")) as server:
        measurement = measure(server.endpoint, BURST, demo_model.folder, "cell")
        sent = [seen["body"]["prompt"] for seen in server.log().requests][-8:]
        with pytest.raises(LoadError, match=r"refuses the key `prompt` of the request .HTTP 422"):
            measure(server.endpoint, BURST, None, "cell")
    assert measurement.errors == [None] * 8
    assert measurement.facts["prompt_form"] == "text"
    # The mock server counts characters, and texts of 9 tokens differ in their characters.
    counted = measurement.requests["prompt_tokens"].to_pylist()
    assert counted == [len(text) for text in sent] and len(set(counted)) > 1
    assert measurement.facts["prompt_tokens_added"] is None
    tokenizer = Tokenizer.from_file(str(demo_model.folder / "tokenizer.json"))
    assert {len(tokenizer.encode(text, add_special_tokens=False).ids) for text in sent} == {9}


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses the API key.*with --api-key-env"), (404, "does not know the model.*streams")],
)
def test_a_refusal_of_all_requests_is_one_error(status: int, message: str) -> None:
    script = FaultScript(fault="status", status=status, fault_on="")
    with start_faulty_server(script) as server, pytest.raises(LoadError, match=message):
        measure(server.endpoint, BURST, None, "cell")


def test_an_overloaded_server_is_measured() -> None:
    with start_faulty_server(FaultScript(fault="status", status=429, fault_on="")) as server:
        errors = measure(server.endpoint, BURST, None, "cell").errors
    assert errors == ["http_status: 429 mock status 429"] * 8


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def test_a_missing_server_is_one_error(closed_port: int) -> None:
    endpoint = Endpoint(f"http://127.0.0.1:{closed_port}", MODEL)
    with pytest.raises(LoadError, match=f"{closed_port}/v1/completions: no connection"):
        measure(endpoint, BURST, None, "cell")


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (
            replace(BURST, requests=6),
            "requests 6: a burst workload of concurrency 4 needs a multiple",
        ),
        (
            replace(CLOSED_LOOP, requests=2),
            "requests 2: a closed_loop workload of concurrency 3 needs at least",
        ),
    ],
)
def test_requests_that_do_not_fill_the_waves_are_an_error(workload: Workload, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        measure(Endpoint("http://127.0.0.1:1", MODEL), workload, None, "cell")


# The command.


def command(url: str, out: Path, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "servegrid.cli.main", "load", "--url", url, "--model", MODEL),
            *("--concurrency", "2", "--requests", "4", "--input-len", "9", "--output-len", "5"),
            *("--protocol", "burst", "--output", str(out), *more),
        ],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )


@pytest.fixture
def server() -> Iterator[MockServer]:
    with start_faulty_server(FaultScript(ttft_s=0.01, itl_s=0.002)) as running:
        yield running


def test_the_command_writes_a_record_and_prints_a_summary(
    server: MockServer, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "cell.parquet"
    done = command(
        f"{server.endpoint.base_url}/v1/", out, "--api-key-env", "KEY", "--salt", "s", KEY="secret"
    )
    assert (done.returncode, done.stderr) == (0, "")
    table = pq.read_table(out)
    assert table["request_id"].to_pylist() == ["s/0", "s/1", "s/2", "s/3"]
    record = parquet.read_record(out)
    assert Workload(**record["workload"]) == Workload("burst", 2, 9, 5, 4)
    assert (record["endpoint"]["model"], record["facts"]["salt"]) == (MODEL, "s")
    assert "secret" not in str(pq.read_schema(out).metadata) + done.stdout
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (lines["requests"], lines["failed"]) == ("4", "0")
    assert server.log().requests[0]["headers"]["authorization"] == "Bearer secret"


def test_two_runs_of_the_command_send_different_prompts(server: MockServer, tmp_path: Path) -> None:
    for _ in range(2):
        assert command(server.endpoint.base_url, tmp_path / "cell.parquet").returncode == 0
    prompts = [tuple(seen["body"]["prompt"]) for seen in server.log().requests]
    assert len({prompt for prompt in prompts if len(prompt) == 9}) == 2 * (4 + 2)


def test_the_command_measures_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with start_faulty_server(FaultScript(unix_socket=str(path))):
        assert command(f"unix://{path}", tmp_path / "cell.parquet").returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "poisson"], "--protocol poisson: use --request-rate"),
        (["--think-time", "1"], "--protocol burst: --think-time is only for closed_loop"),
    ],
)
def test_options_that_contradict_the_protocol_are_errors(
    options: list[str], message: str, tmp_path: Path
) -> None:
    done = command("http://127.0.0.1:1", tmp_path / "cell.parquet", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_exit_status_is_1_if_a_request_failed(tmp_path: Path) -> None:
    out = tmp_path / "cell.parquet"
    with start_faulty_server(FaultScript(fault="status", status=503, fault_on="/2$")) as server:
        done = command(server.endpoint.base_url, out)
    assert done.returncode == 1
    assert "http_status: 503 mock status 503" in done.stdout
    assert pq.read_table(out)["error"].null_count == 3


def test_the_command_says_in_one_line_why_it_measured_nothing(
    closed_port: int, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{closed_port}"
    blocked = tmp_path / "file"
    blocked.touch()
    cases = {
        "no connection": command(url, tmp_path / "cell.parquet"),
        "contains no API key": command(url, tmp_path / "cell.parquet", "--api-key-env", "NOT_SET"),
        "the folder is not writable": command(url, blocked / "cell.parquet"),
    }
    for message, done in cases.items():
        assert done.returncode == 2
        assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "cell.parquet").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--url", "localhost:8000", "is not a URL"),
        ("--url", "unix://", "is not a URL"),
        ("--concurrency", "0", "is not an integer above 0"),
        ("--warmup-waves", "-1", "is not an integer"),
        ("--idle-timeout", "nan", "is not a number above 0"),
        ("--timeout", "0", "is not a number above 0"),
        ("--salt", "a\nb", "must be 1 to 64 letters"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(
    option: str, value: str, message: str, tmp_path: Path
) -> None:
    done = command("http://127.0.0.1:1", tmp_path / "cell.parquet", option, value)
    assert done.returncode == 2
    assert f"argument {option}: {value!r} {message}" in done.stderr


# The real engine.


def test_a_real_engine_confirms_every_count(llamacpp_endpoint: tuple[Endpoint, Path]) -> None:
    endpoint, tokenizer = llamacpp_endpoint
    for workload in (
        replace(BURST, concurrency=2, requests=2, input_len=31, output_len=12, warmup_waves=1),
        replace(CLOSED_LOOP, concurrency=2, requests=4, input_len=40, output_len=6),
    ):
        measurement = measure(endpoint, workload, tokenizer, workload.protocol)
        assert measurement.errors == [None] * workload.requests
        for row in measurement.requests.to_pylist():
            assert row["prompt_tokens"] == workload.input_len
            assert sum(row["chunk_tokens"]) == row["completion_tokens"] == workload.output_len
            assert row["sent_ns"] < row["first_token_ns"] <= row["done_ns"]
