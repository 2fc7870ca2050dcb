"""A sweep of rates on an emulated engine whose rate at saturation is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from helpers.deployments import EMULATED_ENTRY
from servegrid.analysis.tables import load_table

ROOT = Path(__file__).parents[2]
# A slow machine serves less than the timing says, so it needs a quiet one.
pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(580)]
STUDY: dict[str, Any] = {
    "study": "rates",
    "workload": {
        "protocol": "poisson",
        "request_rate": "sweep",
        "input_len": 31,
        "output_len": 10,
        "duration_s": 3,
        "drift_checks": False,
    },
    "slo": {
        "chat": {"tokens_per_s_per_user": 0.1, "e2el_s": 0.4},
        "batch": {"tokens_per_s_per_user": 0.1, "e2el_s": 60},
    },
    "deployments": [EMULATED_ENTRY | {"name": "d", "max_num_seqs": 8}],
}


def write_timing(file: Path) -> None:
    """With n requests in flight, each takes n / 20 s, so 20 requests/s are served at any n."""
    keys = {key: EMULATED_ENTRY[key] for key in ("model", "quantization", "gpu", "gpu_count")}
    rows = [
        keys
        | {"concurrency": n, "input_len": length, "output_len": 100}
        | {"seconds_per_100_tokens": n / 20 * 10}
        for n in (1, 400)
        for length in (1, 100)
    ]
    pd.DataFrame(rows).to_csv(file, index=False)


def test_a_sweep_measures_below_at_and_above_saturation_in_one_allocation(tmp_path: Path) -> None:
    write_timing(tmp_path / "timing.csv")
    study = json.loads(json.dumps(STUDY))
    study["deployments"][0]["engine_args"] = {"timing": str(tmp_path / "timing.csv")}
    config = tmp_path / "study.json"
    config.write_text(json.dumps(study))
    command = [
        *(sys.executable, "-m", "snakemake", "results/tables/slo.parquet"),
        *("results/report/index.html",),
        *("--snakefile", str(ROOT / "Snakefile"), "--profile", str(ROOT / "profiles/local")),
        *("--directory", str(tmp_path), "--configfile", str(config)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    cells = load_table(tmp_path / "results/tables/cells.parquet")
    assert cells["allocation"].nunique() == 1
    swept = cells[cells["rate_fraction"].notna()]
    assert len(swept) == 8
    rates = (swept["request_rate"] / swept["rate_fraction"]).round(6).unique()
    assert len(rates) == 1
    assert rates[0] == pytest.approx(20.0, rel=0.15)
    slo = load_table(tmp_path / "results/tables/slo.parquet")
    assert set(slo["slo_class"]) == {"chat", "batch"}
    chat = slo[slo["slo_class"] == "chat"].set_index("request_rate").sort_index()
    attainment = chat["slo_attainment"].dropna()
    assert attainment.iloc[-1] < attainment.iloc[0]
    (found,) = load_table(tmp_path / "results/tables/saturation.parquet").to_dict("records")
    assert found["rate_followed"] >= 0.249 * rates[0]  # the table is rounded
    assert found["rate_not_followed"] <= 1.3 * rates[0]
    page = (tmp_path / "results/report/index.html").read_text(encoding="utf-8")
    assert "SLO attainment and goodput" in page
    # Nothing is measured again, even if the record with the rate is newer, as after a copy.
    for record in (tmp_path / "results/cells/d").glob("closed_loop-*/*/*.parquet"):
        record.touch()
    again = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=200)
    assert again.returncode == 0
    assert "measurement" not in again.stdout + again.stderr
