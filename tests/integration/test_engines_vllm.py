"""The real vLLM on the CPU: two successful starts and several failed ones.

Each engine runs in a separate process, as in an allocation; see `serve_engine.py`.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from helpers.demo_model import DemoModel
from helpers.deployments import DEMO_VLLM
from helpers.serving import EngineProcess
from helpers.sources import check_counted_tokens, sourced_workloads
from servegrid.analysis.server_metrics import prefix_columns, server_columns
from servegrid.client import measure
from servegrid.records import columns, parquet
from servegrid.records.verdict import Verdict, decide_verdict
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Workload
from servegrid.study.source import Source
from servegrid.telemetry import sampler
from servegrid.telemetry.sampler import Sampler
from servegrid.telemetry.server import counter_reader
from servegrid.telemetry.strain import measure_strain

BLOCKED = {signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
DEPLOYMENT = DEMO_VLLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.crowded, pytest.mark.timeout(900)]


def blocked_signals(pid: int) -> set[int]:
    """The signals that the main thread of `pid` has blocked; see proc(5)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    mask = int(status.partition("SigBlk:")[2].split()[0], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def complete(client: httpx.Client, prompt: str | list[int], tokens: int) -> dict[str, Any]:
    response = client.post(
        "/v1/completions",
        json={
            "model": "smollm2-135m-instruct",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        },
    )
    response.raise_for_status()
    body: dict[str, Any] = response.json()
    return body


def metric(client: httpx.Client, name: str) -> float:
    """The sum over all labels."""
    lines = client.get("/metrics").text.splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{")]
    assert values, f"no metric {name}"
    return sum(values)


def check_server_metrics(
    endpoint: Endpoint, pids: list[int], demo_model: DemoModel, folder: Path
) -> None:
    """Two waves of four requests: vLLM's metrics agree with the client's."""
    workload = Workload("burst", concurrency=4, input_len=31, output_len=20, requests=8)
    file = folder / "telemetry.jsonl"
    with Sampler(pids, file, endpoint):
        counters = counter_reader(endpoint)
        measured = measure(endpoint, workload, demo_model.folder, "a trial", counters)
    assert measured.errors == [None] * 8
    before, after = measured.counters_before, measured.counters_after
    assert before and after
    for name, counted in {
        "time_to_first_token_seconds_count": 8,
        "e2e_request_latency_seconds_count": 8,
        "inter_token_latency_seconds_count": 8 * 19,
        "prompt_tokens_total": 8 * 31,
        "generation_tokens_total": 8 * 20,
    }.items():
        assert after[f"vllm:{name}"] - before[f"vllm:{name}"] == counted

    samples = parquet.arrow_table(
        columns.TELEMETRY, sampler.read_samples(file, 0, *measured.facts["window_ns"])
    )
    record = {"metrics_before": before, "metrics_after": after}
    row = server_columns(record, measured.requests, samples)
    assert None not in row.values()
    assert 0 < row["ttft_client_overhead_s"] < row["server_ttft_s_mean"] < row["server_e2el_s_mean"]
    assert 0 < row["server_itl_s_mean"] < row["server_e2el_s_mean"] / 19
    assert 0 < row["running_mean"] <= 4
    assert 0 < row["kv_cache_usage_max"] < 1
    assert (row["preemptions"], row["prefix_hit_tokens"]) == (0, 0)


def check_sources(endpoint: Endpoint, demo_model: DemoModel, folder: Path) -> None:
    """vLLM counts the prompts and outputs of every source to the token."""
    for workload, file in sourced_workloads(folder):
        measured = measure(endpoint, workload, demo_model.folder, "sources", source_file=file)
        assert measured.errors == [None] * (workload.requests or 0), workload
        check_counted_tokens(measured.requests)


def check_prefix_cache(endpoint: Endpoint, facts: dict[str, Any], demo_model: DemoModel) -> None:
    """Prompts with a shared start: vLLM's hit rate is the expected one."""
    assert (facts["prefix_caching"], facts["kv_block_tokens"]) == (True, 128)
    source = Source("text", prefix_len=260, prefix_groups=2)
    workload = Workload("closed_loop", 2, 300, 4, 12, source=source)
    counters = counter_reader(endpoint)
    measured = measure(endpoint, workload, demo_model.folder, "prefixes", counters)
    assert measured.errors == [None] * 12
    record = {
        "engine": facts,
        "metrics_before": measured.counters_before,
        "metrics_after": measured.counters_after,
    }
    rates = prefix_columns(record, measured.requests)
    # Two whole blocks of 128 tokens of the 260 shared ones, of 300: 256 / 300.
    assert rates["expected_prefix_hit_rate"] == pytest.approx(256 / 300)
    assert rates["prefix_hit_rate"] == pytest.approx(256 / 300, rel=0.02)


def test_it_serves_with_the_requested_settings_and_sigterm_ends_it(
    demo_model: DemoModel, tmp_path: Path
) -> None:
    with EngineProcess(DEPLOYMENT, demo_model.models, tmp_path) as serving:
        up = serving.wait_until_up()
        assert up["healthy"]
        assert up["environment_kept"]
        facts = up["facts"]
        expected = {
            "engine": "vllm",
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 8,
            "prefix_caching": False,
            "tensor_parallel_size": 1,
            "enforce_eager": True,
            "attention_backends": ["CPU_ATTN"],
            # 46,080 bytes per token, 8 requests of 512 tokens: see test_engines_arguments.py.
            "kv_capacity_tokens": 8 * 512 + 128,  # vLLM counts the block that it does not use
        }
        assert facts | expected == facts
        assert facts["bring_up_s"].keys() == {"import", "engine", "server"}
        assert up["endpoint"]["api_key"] not in repr(facts)

        job, *engine = up["pids"]
        assert job == serving.process.pid
        assert len(engine) == 2
        assert all(blocked_signals(pid) >= BLOCKED for pid in engine)
        assert not blocked_signals(job) & BLOCKED
        os.kill(engine[0], signal.SIGUSR2)
        os.kill(engine[1], signal.SIGINT)

        with serving.client() as client:
            text = complete(client, "The capital of France is", 3)["choices"][0]["text"]
            assert text.startswith(" Paris")
            prompt = list(range(1000, 1200))
            before = metric(client, "prompt_tokens_total")
            for _ in range(2):
                usage = complete(client, prompt, 4)["usage"]
                assert (usage["prompt_tokens"], usage["completion_tokens"]) == (200, 4)
            assert metric(client, "prompt_tokens_total") - before == 2 * 200
            assert metric(client, "prefix_cache_hits_total") == 0
            client.headers["Authorization"] = "Bearer another"
            prompt_of_another_user = {"prompt": "a", "max_tokens": 1}
            for path in (
                "/v1/models",
                "/metrics",
                "/metrics/",
                "/docs",
                "/openapi.json",
                "/version",
            ):
                assert client.get(path).status_code == 401, path
            for path in ("/v1/completions", "/invocations", "/tokenize", "/scale_elastic_ep"):
                answer = client.post(path, json=prompt_of_another_user)
                assert answer.status_code == 401, path
            assert client.get("/health").status_code == 200
        check_server_metrics(Endpoint(**up["endpoint"]), up["pids"], demo_model, tmp_path)
        check_sources(Endpoint(**up["endpoint"]), demo_model, tmp_path)
        assert serving.healthy()
        assert serving.send_signal(signal.SIGTERM) == 143


SMALL_CACHING = replace(
    DEPLOYMENT,
    engine_args={
        **DEPLOYMENT.engine_args,
        "num_gpu_blocks_override": 8,
        "enable_prefix_caching": True,
    },
)
"""Seven blocks of 128 tokens for requests, and one that vLLM keeps."""


def check_strain(endpoint: Endpoint, demo_model: DemoModel) -> None:
    """By vLLM's own counters: there is room for one request, and not for four."""
    found = {}
    for concurrency in (1, 4):
        workload = Workload("burst", concurrency, 120, 20, concurrency, warmup_waves=0)
        salt, counters = f"strain {concurrency}", counter_reader(endpoint)
        measured = measure(endpoint, workload, demo_model.folder, salt, counters)
        strain = measure_strain(measured.counters_before, measured.counters_after, [])
        found[concurrency] = decide_verdict(measured.errors, True, strain)
    assert found[1] == Verdict("ok")
    # Each of the four starts with one block and needs a second one from token 129 on: for eight
    # blocks there are seven.
    assert found[4].name == "preempted"
    assert found[4].evidence["preemptions"] >= 1
    assert str(found[4].detail).startswith("the server preempted requests ")


def test_a_killed_worker_is_noticed_and_nothing_is_left_behind(
    demo_model: DemoModel, tmp_path: Path
) -> None:
    with EngineProcess(SMALL_CACHING, demo_model.models, tmp_path, socket="unix") as serving:
        up = serving.wait_until_up()
        check_prefix_cache(Endpoint(**up["endpoint"]), up["facts"], demo_model)
        check_strain(Endpoint(**up["endpoint"]), demo_model)
        socket = Path(up["endpoint"]["socket"])
        assert socket.is_socket()
        assert socket.parent.stat().st_mode & 0o777 == 0o700
        with serving.client() as client:
            assert complete(client, "a b c", 2)["usage"]["completion_tokens"] == 2
        os.kill(up["pids"][-1], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while serving.healthy():
            assert time.monotonic() < deadline
        left = serving.finish()
        assert left["segments"]
        assert (left["pids_left"], left["segments_left"]) == ([], [])
        assert not socket.exists()


@pytest.mark.chaos
def test_a_failed_start_reports_its_cause(demo_model: DemoModel, tmp_path: Path) -> None:
    small = replace(DEPLOYMENT, engine_args={"dtype": "float32", "kv_cache_memory_bytes": 1000})
    with EngineProcess(small, demo_model.models, tmp_path) as serving:
        error = serving.read_message()["error"]
        assert error.startswith(f"NotServableError: deployment `{DEPLOYMENT.name}`: vLLM ")
        assert "ValueError: No available memory for the cache blocks" in error
        assert "\n" not in error
        assert "Traceback" in serving.log.read_text()
        left = serving.finish()
        assert (left["pids_left"], left["segments_left"]) == ([], [])


@pytest.mark.parametrize(
    "signal_number", [pytest.param(signal.SIGTERM, marks=pytest.mark.chaos), signal.SIGKILL]
)
def test_the_engine_ends_with_an_allocation_that_ends_during_the_start(
    demo_model: DemoModel, tmp_path: Path, signal_number: signal.Signals
) -> None:
    with EngineProcess(DEPLOYMENT, demo_model.models, tmp_path, socket="unix") as serving:
        deadline = time.monotonic() + 300
        while "Initializing a V1 LLM engine" not in serving.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)  # the reaper learns of new processes twice per second
        children = psutil.Process(serving.process.pid).children(recursive=True)
        assert len(children) >= 2
        serving.send_signal(signal_number)
        _, left = psutil.wait_procs(children, timeout=60)
        assert left == []


def test_the_installed_vllm_checks_the_arguments_before_anything_starts(
    demo_model: DemoModel, tmp_path: Path
) -> None:
    misspelt = replace(DEPLOYMENT, engine_args={"max_num_batched_tokns": 512})
    with EngineProcess(misspelt, demo_model.models, tmp_path) as serving:
        error = serving.read_message()["error"]
        assert error.startswith("ConfigError: ")
        assert "Did you mean `max_num_batched_tokens`" in error
        assert serving.finish()["segments"] == []
