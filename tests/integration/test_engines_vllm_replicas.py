"""The real vLLM on the CPU with two replicas behind one endpoint (its data parallelism)."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from helpers.demo_model import DemoModel
from helpers.deployments import DEMO_VLLM
from helpers.serving import EngineProcess
from servegrid.analysis.server_metrics import server_columns
from servegrid.client import measure
from servegrid.records import columns, parquet
from servegrid.records.verdict import decide_verdict
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Workload
from servegrid.telemetry import sampler
from servegrid.telemetry.sampler import Sampler
from servegrid.telemetry.server import counter_reader

TWO = replace(
    DEMO_VLLM,
    name="smollm2-135m-instruct_fp32_vllm_cpu_replicas-2",
    max_num_seqs=2,
    engine_args={"dtype": "float32", "data_parallel_size": 2},
)
SEEN_S = 60.0

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(1200)]


def finished_by_engine(client: httpx.Client) -> Counter[str]:
    """The requests that each replica has finished."""
    found: Counter[str] = Counter()
    for line in client.get("/metrics").text.splitlines():
        if match := re.match(r'vllm:request_success_total\{.*?engine="(\d+)".*\} (\S+)', line):
            found[match[1]] += int(float(match[2]))
    return found


def cores(pid: int) -> str | None:
    """The cores on which a worker computes."""
    try:
        return psutil.Process(pid).environ().get("OMP_PLACES")
    except psutil.Error:
        return None


def check_load(serving: EngineProcess, demo_model: DemoModel, folder: Path) -> None:
    """Eight waves of four requests: one figure for both replicas, which get the same load."""
    endpoint = Endpoint(**serving.messages["endpoint"])
    workload = Workload("burst", concurrency=4, input_len=31, output_len=20, requests=32)
    file = folder / "telemetry.jsonl"
    with serving.client() as client:
        before = finished_by_engine(client)
        with Sampler(serving.messages["pids"], file, endpoint):
            measured = measure(
                endpoint, workload, demo_model.folder, "a trial", counter_reader(endpoint)
            )
        served = finished_by_engine(client) - before
    print(f"\nrequests by replica, with the warm-up: {dict(served)}")
    assert measured.errors == [None] * 32
    assert decide_verdict(measured.errors, True).name == "ok"
    assert served.total() == 32 + 4  # one wave of warm-up
    assert set(served) == {"0", "1"}
    assert min(served.values()) >= 12
    counted = {
        "metrics_before": measured.counters_before,
        "metrics_after": measured.counters_after,
    }
    samples = sampler.read_samples(file, 0, *measured.facts["window_ns"])
    row = server_columns(
        counted, measured.requests, parquet.arrow_table(columns.TELEMETRY, samples)
    )
    # The counters of both: as many first tokens as the client saw, else there is no such figure.
    assert row["ttft_client_overhead_s"] is not None
    assert 2 < row["running_mean"] <= 4  # more than one replica may run
    assert 0 < row["kv_cache_usage_max"] < 1


def test_one_endpoint_serves_both_replicas_and_the_loss_of_one_is_seen(
    demo_model: DemoModel, tmp_path: Path
) -> None:
    with EngineProcess(TWO, demo_model.models, tmp_path, startup_s=900) as serving:
        up = serving.wait_until_up()
        facts = up["facts"]
        assert (facts["data_parallel_size"], facts["max_num_seqs"]) == (2, 2)
        # Each replica holds 2 requests of 512 tokens.
        assert facts["kv_capacity_tokens"] == 2 * 2 * 512
        places = {cores(pid) for pid in up["pids"]} - {None}
        if len(os.sched_getaffinity(0)) == 2:
            assert places == {f"{{{core}}}" for core in os.sched_getaffinity(0)}
        for pid in up["pids"]:
            listening = psutil.Process(pid).net_connections("tcp")
            print(pid, psutil.Process(pid).cmdline()[:1], [each.laddr for each in listening if each.status == "LISTEN"], cores(pid))
        check_load(serving, demo_model, tmp_path)

        assert serving.healthy()
        titles = {pid: " ".join(psutil.Process(pid).cmdline()) for pid in up["pids"]}
        (second,) = [pid for pid, title in titles.items() if "EngineCore_DP1" in title]
        os.kill(second, signal.SIGKILL)
        began = time.monotonic()
        while serving.healthy():
            assert time.monotonic() - began < SEEN_S
            time.sleep(0.2)
        print(f"the loss of a replica was seen after {time.monotonic() - began:.1f} s")
        serving.finish()
