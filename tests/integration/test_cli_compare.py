"""`servegrid compare` finds a slowdown of an emulated deployment, and no other difference."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.deployments import EMULATED_ENTRY
from servegrid.analysis.comparison import compare
from servegrid.bundle.cells import load_cells

ROOT = Path(__file__).parents[2]
NAMES = ("one", "other")
ARGUMENTS = {"timing": "inria-2024", "time_scale": 0.1}
STUDY: dict[str, Any] = {
    "study": "compared",
    "workload": {
        "concurrency": [1, 8],
        "input_len": 31,
        "output_len": 100,
        "bring_ups": 3,
        "drift_checks": False,
    },
    "deployments": [EMULATED_ENTRY | {"name": name, "engine_args": ARGUMENTS} for name in NAMES],
}


def measure_study(study: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    config = folder / "study.json"
    config.write_text(json.dumps(study))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", "results/tables/cells.parquet"),
            *("--snakefile", str(ROOT / "Snakefile"), "--profile", str(ROOT / "profiles/local")),
            *("--directory", str(folder), "--configfile", str(config)),
            *("--submitit-max-allocations", "2"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.slow
@pytest.mark.chaos
def test_only_the_deployment_that_is_a_tenth_slower_is_reported(tmp_path: Path) -> None:
    slower = copy.deepcopy(STUDY)
    slower["deployments"][1]["engine_args"] = ARGUMENTS | {"slowdown": 1.1}
    first, second = measure_study(STUDY, tmp_path / "a"), measure_study(slower, tmp_path / "b")
    cells = load_cells(first)
    # Each bring-up of a deployment is an allocation of its own.
    assert cells.groupby("deployment")["allocation"].nunique().tolist() == [3, 3]
    assert cells.groupby("allocation")["bring_up"].nunique().tolist() == [1] * 6
    found = compare(cells, load_cells(second))
    assert [each.name for each in found.deployments] == [*NAMES]
    verdicts = [each.verdict for each in found.deployments]
    assert verdicts == ["no evidence", "slower"], found
    assert found.deployments[1].ratio == pytest.approx(1 / 1.1, rel=0.03)

    gate = [sys.executable, "-m", "servegrid.cli.main", "compare", first, second, "--fail-on"]
    assert subprocess.run([*gate, "slower:5%"], capture_output=True).returncode == 1
    assert subprocess.run([*gate, "slower:20%"], capture_output=True).returncode == 0
