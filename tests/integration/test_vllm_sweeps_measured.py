"""The real vLLM on the CPU: replicas, a sweep of settings, and a sweep of request rates."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.demo_model import DemoModel
from helpers.deployments import DEMO_ENTRY, DEMO_VLLM
from helpers.serving import EngineProcess, http_client
from servegrid.analysis.tables import load_table
from servegrid.client import measure
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Workload
from servegrid.telemetry.server import counter_reader

ROOT = Path(__file__).parents[2]
ENTRY = DEMO_ENTRY | {"max_model_len": 256}

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(1800)]


def test_two_replicas_share_the_requests_and_end_together(
    demo_model: DemoModel, tmp_path: Path
) -> None:
    deployment = replace(DEMO_VLLM, engine_args={**DEMO_VLLM.engine_args, "data_parallel_size": 2})
    assert deployment.replicas == 2
    workload = Workload("burst", 8, 31, 20, 16, warmup_waves=0)
    with EngineProcess(deployment, demo_model.models, tmp_path) as serving:
        up = serving.wait_until_up()
        endpoint = Endpoint(**up["endpoint"])
        measured = measure(
            endpoint, workload, demo_model.folder, "a trial", counter_reader(endpoint)
        )
        with http_client(endpoint) as client:
            text = client.get("/metrics").text
        served = {
            engine: float(count)
            for engine, count in re.findall(
                r'^vllm:request_success_total\{engine="(\d)",finished_reason="length".*\} (\S+)$',
                text,
                re.MULTILINE,
            )
        }
        assert serving.healthy()
        os.kill(max(up["pids"]), signal.SIGKILL)  # a worker of one replica
        deadline = time.monotonic() + 30
        while serving.healthy():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        serving.finish()
    assert up["facts"]["data_parallel_size"] == 2
    assert measured.errors == [None] * 16
    assert [row["completion_tokens"] for row in measured.requests.to_pylist()] == [20] * 16
    assert served.keys() == {"0", "1"}
    assert sum(served.values()) == 16 + 1  # the first one shows which prompts the server takes
    # Requests go to the replica with the fewest: neither gets less than a quarter of them.
    assert min(served.values()) >= 4
    assert measured.counters_before and measured.counters_after
    name = "vllm:generation_tokens_total"
    assert measured.counters_after[name] - measured.counters_before[name] == 16 * 20


def measured_study(folder: Path, study: dict[str, Any], *targets: str) -> str:
    """Run a study; returns the page."""
    config = folder / "study.json"
    config.write_text(json.dumps(study), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "snakemake", "results/report/index.html", *targets),
        *("--snakefile", str(ROOT / "Snakefile"), "--profile", str(ROOT / "profiles/local")),
        *("--directory", str(folder), "--configfile", str(config)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return (folder / "results/report/index.html").read_text(encoding="utf-8")


def test_a_sweep_of_three_settings_is_ranked_with_intervals(tmp_path: Path) -> None:
    """One request at a time is much slower than four: decoding reads the weights once for all."""
    study = {
        "study": "settings",
        "workload": {
            "protocol": "burst",
            "concurrency": [1, 4],  # one user says what few users get, four the difference
            "requests_per_user": 4,
            "input_len": 31,
            "output_len": 20,
            "bring_ups": 3,
            "drift_checks": False,
        },
        "slo": {"tokens_per_s_per_user": 1},
        "deployments": [ENTRY | {"sweep": {"max_num_seqs": [1, 2, 4]}}],
    }
    page = measured_study(tmp_path, study, "results/tables/capacity.parquet")
    cells = load_table(tmp_path / "results/tables/cells.parquet")
    names = [f"d_max_num_seqs-{value}" for value in (1, 2, 4)]
    assert set(cells["deployment"]) == set(names)
    assert len(cells) == 3 * 3 * 2
    waited = cells[(cells["deployment"] == names[0]) & (cells["concurrency"] > 1)]
    assert set(waited["verdict"]) == {"queued"}
    section = page.split('id="settings-title"', 1)[1]
    rows = [
        [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row)]
        for row in re.findall(r"<tr>.*?</tr>", section.split("</table>")[0], re.DOTALL)
    ]
    found = {row[1]: row[3] for row in rows if row}
    print(found)
    assert found.keys() == {"1 → 2", "1 → 4", "2 → 4"}
    ratio, low, high = map(float, re.findall(r"\d+\.\d+", found["1 → 4"]))
    assert low < ratio < high and ratio > 1
    plan = load_table(tmp_path / "results/tables/capacity.parquet").set_index("deployment")
    print(plan[["users_carried_low", "users_carried", "users_carried_high"]])
    users = plan["users_carried"]
    assert users[names[0]] < users[names[2]]
    assert plan.loc[names[2], "users_carried_low"] <= users[names[2]]


def test_a_sweep_of_rates_finds_the_saturation_of_vllm(tmp_path: Path) -> None:
    """The engine itself is the truth: a closed loop that fills it serves no more than that rate."""
    study = {
        "study": "rates",
        "workload": {
            "protocol": "poisson",
            "request_rate": "sweep",
            "input_len": 31,
            "output_len": 8,
            "duration_s": 30,
            "drift_checks": False,
        },
        "slo": {"e2el_s": 2},
        "deployments": [ENTRY | {"max_num_seqs": 4}],
    }
    page = measured_study(tmp_path, study, "results/tables/slo.parquet")
    cells = load_table(tmp_path / "results/tables/cells.parquet")
    swept = cells[cells["rate_fraction"].notna()]
    assert len(swept) == 8
    rate = float((swept["request_rate"] / swept["rate_fraction"]).iloc[0])
    (found,) = load_table(tmp_path / "results/tables/saturation.parquet").to_dict("records")
    print(f"closed loop: {rate:.2f} requests/s; {found}")
    assert 0.5 * rate <= found["rate_followed"] < found["rate_not_followed"] <= 1.31 * rate
    slo = load_table(tmp_path / "results/tables/slo.parquet").set_index("request_rate").sort_index()
    print(slo[["slo_attainment", "goodput_requests_per_s"]])
    assert slo["slo_attainment"].iloc[0] > 0.9 > slo["slo_attainment"].iloc[-1]
    assert "SLO attainment and goodput" in page
