"""Workloads from files and traces on a mock server: what is sent, and when."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

from helpers.faulty_server import FaultScript, start_faulty_server
from helpers.sources import DEPLOYMENT, sourced_workloads
from servegrid.client import measure
from servegrid.study.config import parse_study

MAX_MEDIAN_LAG_S = 0.001


def test_the_first_minutes_of_a_trace_are_replayed_ten_times_faster(tmp_path: Path) -> None:
    """A made trace of 6 minutes with two bursts, in the columns of BurstGPT."""
    rng = random.Random(1)
    times = sorted(
        [rng.uniform(0, 360) for _ in range(250)] + [rng.uniform(100, 104) for _ in range(60)]
    )
    rows = [(0.0, 20, 5), *((time, rng.randint(5, 90), rng.randint(1, 20)) for time in times)]
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        + "".join(f"{at:.3f},m,{own},{out},{own + out},API log\n" for at, own, out in rows),
        encoding="utf-8",
    )
    source = {"kind": "trace", "path": str(trace), "speedup": 10, "first_s": 300}
    study = parse_study({"study": "s", "workload": {"source": source}, "deployments": [DEPLOYMENT]})
    (trial,) = study.trials
    with start_faulty_server(FaultScript(ttft_s=0.05, itl_s=0.005)) as server:
        measured = measure(server.endpoint, trial.workload, None, "cell", source_file=trace)
    sent = measured.requests.to_pylist()
    expected = [row for row in rows if row[0] < 300]
    assert measured.errors == [None] * len(expected)
    assert [(row["prompt_tokens"], row["completion_tokens"]) for row in sent] == [
        (own, out) for _, own, out in expected
    ]
    start_ns = sent[0]["scheduled_ns"]
    due_s = [(row["scheduled_ns"] - start_ns) / 1e9 for row in sent]
    # The file has three digits of a second, so a tenth of a millisecond here.
    assert all(
        abs(due - time / 10) < 1e-4 for due, (time, _, _) in zip(due_s, expected, strict=True)
    )
    lag_s = [(row["sent_ns"] - row["scheduled_ns"]) / 1e9 for row in sent]
    assert min(lag_s) >= 0
    assert statistics.median(lag_s) < MAX_MEDIAN_LAG_S


def test_what_is_sent_has_the_lengths_of_the_source(tmp_path: Path) -> None:
    for workload, file in sourced_workloads(tmp_path):
        if workload.source is None or workload.source.kind not in ("random", "trace"):
            continue
        with start_faulty_server(FaultScript()) as server:
            measured = measure(server.endpoint, workload, None, "cell", source_file=file)
            bodies = [
                seen["body"]
                for seen in server.log().requests
                if seen["headers"]["x-request-id"].partition("/")[2].isdecimal()
            ]
        rows = measured.requests.to_pylist()
        assert measured.errors == [None] * len(rows)
        asked = sorted((row["sent_tokens"], row["requested_tokens"]) for row in rows)
        assert sorted((len(body["prompt"]), body["max_tokens"]) for body in bodies) == asked
        assert len(asked) == workload.requests == 3
