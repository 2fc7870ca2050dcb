"""Cells measured on a server that breaks a rule on purpose, and on one that breaks none.

What no server can break, such as the client's own lateness, is in tests/unit/test_validity.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from helpers.faulty_server import FaultScript, start_faulty_server
from servegrid.analysis.validity import Evidence, Validity, check_validity
from servegrid.client import measure
from servegrid.records import columns, parquet
from servegrid.records.verdict import decide_verdict
from servegrid.study.grid import Deployment, Trial, Workload
from servegrid.telemetry import sampler, server
from servegrid.telemetry.sampler import Sampler

BURST = Workload("burst", 4, 9, 5, 8, idle_timeout_s=20)
STEADY = Workload("closed_loop", 2, 9, 5, 80, idle_timeout_s=20)
SLOW = FaultScript(ttft_s=0.1, itl_s=0.02)
# What the self-check finds is tested where it is made: here the machine may be busy otherwise.
TRUE_CLIENT = {
    "requests": 1,
    "lost": 0,
    "arrival_error_s_p99": 0.0,
    "itl_error_s_p99": 0.0,
    "cpu_s_per_1000_events": 0.01,
}
DEPLOYMENT = Deployment("d", "m", "c", "c", "fp16", "vllm", "cpu", 0, 64, 4)


@dataclass(frozen=True)
class Case:
    """A load on a mock server, and what the engine's facts say beside it."""

    reason: str | None
    script: FaultScript = SLOW
    workload: Workload = BURST
    engine: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "nothing, a burst": Case(None),
    "nothing, a steady load": Case(None, workload=STEADY),
    "nothing, and the cache that the study asks for": Case(
        None,
        script=replace(SLOW, counters=(("vllm:prefix_cache_hits_total", 8.0),)),
        engine={"prefix_caching": True},
    ),
    "prompts from a cache": Case(
        "prefix_cache: 64 tokens came from it",
        script=replace(SLOW, counters=(("vllm:prefix_cache_hits_total", 8.0),)),
    ),
    "preemptions": Case(
        "preempted: 8 times, for want of KV cache",
        script=replace(SLOW, counters=(("vllm:num_preemptions_total", 1.0),)),
    ),
    "fewer seats than requests": Case(
        "server_queueing: max_num_seqs 3 is less than concurrency 4", engine={"max_num_seqs": 3}
    ),
    "requests that wait in the server": Case(
        "server_queueing: 1.0 of 2 requests waited in the server on average",
        script=replace(SLOW, gauges=(("vllm:num_requests_waiting", 1.0),)),
        workload=STEADY,
    ),
    "a server that gets slower and slower": Case(
        "no_steady_state: the latency", script=replace(SLOW, slowdown_s=0.008), workload=STEADY
    ),
}


def measured(case: Case, folder: Path) -> Evidence:
    """The case's load through the real client, sampler and counters."""
    samples = folder / "telemetry.jsonl"
    with start_faulty_server(case.script) as up, Sampler([up.process.pid], samples, up.endpoint):
        counters = server.counter_reader(up.endpoint)
        measurement = measure(up.endpoint, case.workload, None, "cell", counters)
        rows = sampler.read_samples(samples, 0, *measurement.facts["window_ns"])
    verdict, reason = decide_verdict(measurement.errors, engine_alive=True)
    record = {
        "spec": Trial(DEPLOYMENT, case.workload, 1).spec,
        "verdict": verdict,
        "reason": reason,
        "client": measurement.facts,
        "engine": {"max_num_seqs": 4, "prefix_caching": False, **case.engine},
        "self_check": TRUE_CLIENT,
        "metrics_before": measurement.counters_before,
        "metrics_after": measurement.counters_after,
    }
    return Evidence(record, measurement.requests, parquet.arrow_table(columns.TELEMETRY, rows))


@pytest.mark.parametrize("what", CASES)
def test_a_cell_is_marked_with_what_was_broken_and_with_nothing_else(
    what: str, tmp_path: Path
) -> None:
    case = CASES[what]
    found = check_validity(measured(case, tmp_path))
    if case.reason is None:
        assert found == Validity(True, [], [])
    else:
        assert found.valid is False and found.invalid_rules and found.invalid_evidence
        (rule,), (detail,) = found.invalid_rules, found.invalid_evidence
        assert f"{rule}: {detail}".startswith(case.reason)


def test_a_server_with_other_tokens_than_asked_has_a_verdict_and_no_validity(
    tmp_path: Path,
) -> None:
    evidence = measured(Case(None, script=FaultScript(fault="fewer_tokens")), tmp_path)
    assert evidence.record["verdict"] == "wrong_tokens"
    assert check_validity(evidence) == Validity(None, None, None)
