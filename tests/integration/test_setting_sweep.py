"""A sweep of three values of one setting on the real vLLM, ranked by the capacity plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.browsing import browser, open_page
from servegrid.analysis.tables import load_table

ROOT = Path(__file__).parents[2]
VALUES, BRING_UPS = (1, 2, 4), 3
STUDY: dict[str, Any] = {
    "study": "settings",
    "workload": {
        "concurrency": [1, 2, 4],
        "input_len": 31,
        "output_len": 32,
        "requests_per_user": 3,
        "bring_ups": BRING_UPS,
    },
    # A slow machine must not decide whether a cell meets the SLO.
    "slo": {"tokens_per_s_per_user": 0.5},
    "deployments": [
        {
            "model": "smollm2-135m-instruct",
            "checkpoint": "demo:smollm2-135m-instruct",
            "quantization": "fp32",
            "engine": "vllm",
            "gpu": "cpu",
            "max_model_len": 512,
            "engine_args": {"dtype": "float32"},
            "sweep": {"max_num_seqs": list(VALUES)},
        }
    ],
}
START = "smollm2-135m-instruct_fp32_vllm_cpu_max_num_seqs-"

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(3600)]


@pytest.mark.usefixtures("demo_model")
def test_a_sweep_on_vllm_is_ranked_with_intervals(tmp_path: Path) -> None:
    config = tmp_path / "study.json"
    config.write_text(json.dumps(STUDY))
    command = [
        *(sys.executable, "-m", "snakemake"),
        *("--snakefile", str(ROOT / "Snakefile"), "--profile", str(ROOT / "profiles/local")),
        *("--directory", str(tmp_path), "--configfile", str(config)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]

    cells = load_table(tmp_path / "results/tables/cells.parquet")
    assert cells["allocation"].nunique() == BRING_UPS * len(VALUES)
    four = cells[cells["concurrency"] == 4].groupby("deployment")["output_tokens_per_s"].median()
    print(f"\noutput tokens/s of four users: {four.round(1).to_dict()}")
    assert four[f"{START}4"] > 1.2 * four[f"{START}1"]
    # With one request at a time, the others wait.
    waited = cells[(cells["deployment"] == f"{START}1") & (cells["concurrency"] == 4)]
    assert [list(each) for each in waited["invalid_rules"]] == [["server_queueing"]] * BRING_UPS

    plan = load_table(tmp_path / "results/tables/capacity.parquet")
    assert plan["deployment"].tolist() == [f"{START}{value}" for value in reversed(VALUES)]
    print(plan[["deployment", "users_carried_low", "users_carried", "users_carried_high"]])
    assert (plan["users_carried_low"] <= plan["users_carried"]).all()
    assert (plan["users_carried"] <= plan["users_carried_high"]).all()

    with browser() as chromium:
        page = tmp_path / "results/report/index.html"
        with open_page(chromium, page) as found:
            found.wait_for_charts()
            assert found.messages == []
            found.page.screenshot(path=tmp_path / "page.png", full_page=True)
            rows = found.page.locator("#plan tbody tr").all_inner_texts()
            worth = found.page.locator("#settings tbody tr").all_inner_texts()
    assert len(rows) == len(VALUES)
    for value, row in zip(reversed(VALUES), rows, strict=True):
        assert f"(max_num_seqs-{value})" in row and " to " in row
    assert [row.split("\t")[2] for row in worth] == ["1 → 2", "1 → 4", "2 → 4"]
    assert all("[" in row for row in worth)
