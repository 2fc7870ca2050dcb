"""Records that say that nothing was measured, and whose trials must be measured now.

A dry run counts these trials, and removes no record: another run may just use them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.deployments import EMULATED_ENTRY
from servegrid.records import parquet

pytestmark = [pytest.mark.crowded, pytest.mark.timeout(580)]

ROOT = Path(__file__).parents[2]
TABLE = "results/tables/cells.csv"
WORKLOAD = {"concurrency": [1, 2], "input_len": [31, 40], "output_len": 100}
UNSUPPORTED = {"workload": WORKLOAD, "deployments": [EMULATED_ENTRY | {"max_model_len": 135}]}
"""Prompts of 40 tokens are too long."""
SUPPORTED = {"workload": WORKLOAD, "deployments": [EMULATED_ENTRY | {"max_model_len": 140}]}
SEARCHED = {
    "workload": WORKLOAD | {"concurrency": [1, 2, 4, 8, 16], "trials": 1, "grid": "frontier"},
    "deployments": [EMULATED_ENTRY],
}
FULL = SEARCHED | {"workload": SEARCHED["workload"] | {"grid": "full", "drift_checks": False}}


def snakemake(
    folder: Path, study: dict[str, Any], *arguments: str, target: str = TABLE, status: int = 0
) -> str:
    config = folder / "study.json"
    config.write_text(json.dumps({"study": "small", **study}), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "snakemake", target, *arguments),
        *("--snakefile", str(ROOT / "Snakefile"), "--profile", str(ROOT / "profiles/local")),
        *("--directory", str(folder), "--configfile", str(config)),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    output = done.stdout + done.stderr
    assert done.returncode == status, output
    return output


def records(folder: Path) -> dict[Path, int]:
    found = (folder / "results/cells").rglob("*.parquet")
    return {file: file.stat().st_mtime_ns for file in found}


def verdicts(folder: Path) -> list[str]:
    found = (folder / "results/cells").rglob("requests.parquet")
    return sorted(parquet.read_record(file)["verdict"] for file in found)


def take_lock(folder: Path) -> None:
    """The lock of a run that writes the table, as Snakemake writes it."""
    locks = folder / ".snakemake/locks"
    locks.mkdir(parents=True, exist_ok=True)
    (locks / "0.output.lock").write_text(f"{folder / TABLE}\n{TABLE}\n", encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "now", "verdict", "count"),
    [(UNSUPPORTED, SUPPORTED, "unsupported", 4), (SEARCHED, FULL, "not_run", None)],
)
def test_only_a_run_that_has_the_lock_removes_outdated_records(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], verdict: str, count: int | None
) -> None:
    """With another `max_model_len`, all cells are measured again; without a search, the others."""
    snakemake(tmp_path, before)
    outdated = verdicts(tmp_path).count(verdict)
    assert outdated > 0
    kept = records(tmp_path)

    output = snakemake(tmp_path, now, "--dry-run")
    assert f"{count or outdated} measurements to do:" in output
    assert records(tmp_path) == kept

    take_lock(tmp_path)
    assert "LockException" in snakemake(tmp_path, now, status=1)
    assert records(tmp_path) == kept
    snakemake(tmp_path, now, "--unlock")
    assert records(tmp_path) == kept

    assert "Nothing to be done" in snakemake(tmp_path, before)
    snakemake(tmp_path, now)
    assert verdict not in verdicts(tmp_path)
    assert "Nothing to be done" in snakemake(tmp_path, now, "--dry-run")


@pytest.mark.slow
def test_a_run_of_one_cell_replaces_no_measurement_of_another(tmp_path: Path) -> None:
    """Only a run of the whole study replaces what was measured with other settings."""
    snakemake(tmp_path, SUPPORTED)
    (deployment,) = (tmp_path / "results/cells").iterdir()
    cell = f"results/cells/{deployment.name}/burst-c1-i31-o100/trial-1/requests.parquet"
    snakemake(tmp_path, UNSUPPORTED, target=cell)
    assert verdicts(tmp_path) == ["ok"] * 4
    snakemake(tmp_path, UNSUPPORTED)
    assert verdicts(tmp_path) == ["ok"] * 2 + ["unsupported"] * 2
