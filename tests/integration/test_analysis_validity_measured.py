"""Cells measured on a mock server that breaks one rule of validity, or none.

tests/unit/test_analysis_validity.py covers the rules that no server can break, such as lateness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from helpers.deployments import SMALL_VLLM
from helpers.faulty_server import FaultScript, start_faulty_server
from servegrid.analysis.validity import Evidence, Validity, check_validity
from servegrid.client import measure
from servegrid.records import columns, parquet
from servegrid.records.verdict import decide_verdict
from servegrid.study.grid import Trial, Workload
from servegrid.telemetry import sampler, server
from servegrid.telemetry.sampler import Sampler

BURST = Workload("burst", 4, 9, 5, 8, idle_timeout_s=20)
CLOSED_LOOP = Workload("closed_loop", 2, 9, 5, 80, idle_timeout_s=20)
SLOW = FaultScript(ttft_s=0.1, itl_s=0.02)
# A perfect calibration: the machine that runs the tests may be busy with other work.
PERFECT_CALIBRATION = {
    "requests": 1,
    "lost": 0,
    "arrival_error_s_p99": 0.0,
    "itl_error_s_p99": 0.0,
    "cpu_s_per_1000_events": 0.01,
}
DEPLOYMENT = replace(SMALL_VLLM, max_model_len=64, max_num_seqs=4)


@dataclass(frozen=True)
class Case:
    """A workload on a mock server, facts about the engine, and the expected rule with evidence."""

    reason: str | None
    script: FaultScript = SLOW
    workload: Workload = BURST
    engine: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "a valid burst": Case(None),
    "a valid closed loop": Case(None, workload=CLOSED_LOOP),
    "a valid cell with a prefix cache that the study enables": Case(
        None,
        # 56 hits: 8 tokens of each prompt but the first one; the last token is always computed.
        script=replace(SLOW, counters=(("vllm:prefix_cache_hits_total", 7.0),)),
        workload=replace(BURST, prompts="identical"),
        engine={"prefix_caching": True},
    ),
    "more from the prefix cache than the prompts share": Case(
        "prefix_cache: 64 prompt tokens came from the prefix cache, but prompts share only 0",
        script=replace(SLOW, counters=(("vllm:prefix_cache_hits_total", 8.0),)),
        engine={"prefix_caching": True},
    ),
    "prompts from the prefix cache": Case(
        "prefix_cache: 64 prompt tokens came from the prefix cache",
        script=replace(SLOW, counters=(("vllm:prefix_cache_hits_total", 8.0),)),
    ),
    "preemptions": Case(
        "preempted: 8 preemptions",
        script=replace(SLOW, counters=(("vllm:num_preemptions_total", 1.0),)),
    ),
    "a concurrency above max_num_seqs": Case(
        "server_queueing: max_num_seqs 3 is less than concurrency 4", engine={"max_num_seqs": 3}
    ),
    "requests that wait in the server": Case(
        "server_queueing: on average, 1.0 of 2 requests waited in the server",
        script=replace(SLOW, gauges=(("vllm:num_requests_waiting", 1.0),)),
        workload=CLOSED_LOOP,
    ),
    "requests of somebody else": Case(
        "foreign_load: the server finished 16 requests, but only 8 were for this cell",
        script=replace(SLOW, counters=(("vllm:e2e_request_latency_seconds_count", 2.0),)),
    ),
    "nobody else": Case(
        None, script=replace(SLOW, counters=(("vllm:e2e_request_latency_seconds_count", 1.0),))
    ),
    "a server that becomes slower": Case(
        "no_steady_state: the latency", script=replace(SLOW, slowdown_s=0.008), workload=CLOSED_LOOP
    ),
}


def measure_case(case: Case, folder: Path) -> Evidence:
    """Measure the case with the real client, sampler and counters."""
    samples = folder / "telemetry.jsonl"
    with start_faulty_server(case.script) as up, Sampler([up.process.pid], samples, up.endpoint):
        counters = server.counter_reader(up.endpoint)
        measurement = measure(up.endpoint, case.workload, None, "cell", counters)
        rows = sampler.read_samples(samples, 0, *measurement.facts["window_ns"])
    verdict = decide_verdict(measurement.errors, engine_alive=True)
    record = {
        "spec": Trial(DEPLOYMENT, case.workload, 1).spec,
        **verdict.record,
        "client": measurement.facts,
        "engine": {"max_num_seqs": 4, "prefix_caching": False, **case.engine},
        "calibration": PERFECT_CALIBRATION,
        "metrics_before": measurement.counters_before,
        "metrics_after": measurement.counters_after,
    }
    return Evidence(record, measurement.requests, parquet.arrow_table(columns.TELEMETRY, rows))


@pytest.mark.parametrize("what", CASES)
def test_a_measured_cell_breaks_only_the_expected_rule(what: str, tmp_path: Path) -> None:
    case = CASES[what]
    found = check_validity(measure_case(case, tmp_path))
    if case.reason is None:
        assert found == Validity(True, [], [])
    else:
        assert found.valid is False and found.invalid_rules and found.invalid_evidence
        (rule,), (detail,) = found.invalid_rules, found.invalid_evidence
        assert f"{rule}: {detail}".startswith(case.reason)


def test_a_server_with_wrong_token_counts_gives_a_verdict_instead_of_validity(
    tmp_path: Path,
) -> None:
    evidence = measure_case(Case(None, script=FaultScript(fault="fewer_tokens")), tmp_path)
    assert evidence.record["verdict"] == "wrong_tokens"
    assert check_validity(evidence) == Validity(None, None, None)
