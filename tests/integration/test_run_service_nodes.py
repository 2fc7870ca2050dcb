"""servegrid's service on two nodes, with the emulated engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.node_pair import Pair
from servegrid.study.config import load_study

REHEARSAL = load_study(Path(__file__).parents[2] / "config" / "rehearsal.yaml")
FOUR_A100 = next(trial for trial in REHEARSAL.trials if trial.deployment.gpu_count == 4)
SERVICE = {
    "service": "servegrid.run.service:serve",
    "follower": "servegrid.run.service:follow",
    "resources": {"max_concurrency": 1},
    "modules": "",
}

pytestmark = pytest.mark.crowded


def rows(file: Path) -> list[dict[str, Any]]:
    complete = file.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def test_the_seventh_deployment_runs_on_two_nodes_with_the_samples_of_both(pair: Pair) -> None:
    # No GPU is visible, as on a site where Slurm does not manage them.
    pair.start(**SERVICE, params={"spec": FOUR_A100.spec_json}).wait_until_up()
    (file,) = (pair.folder / "tmp-0").glob("servegrid-*/allocation.json")
    environment = json.loads(file.read_text(encoding="utf-8"))["environment"]
    (other,) = environment["other_nodes"]
    # Both nodes are this machine: the same host, and the same clock.
    assert other["node"] == environment["node"]
    assert abs(other["clock_offset_ns"]) <= other["clock_uncertainty_ns"]
    assert (other["interface"], other["gpus"]) == ("lo", environment["gpus"])
    assert "packages" not in other
    samples = file.with_name("telemetry.jsonl")
    pair.wait(lambda: {row["device"] for row in rows(samples)} >= {"engine", "engine.1"})
    first, second = (
        [row for row in rows(samples) if row["device"] == name] for name in ("engine", "engine.1")
    )
    assert all(row["cpu_s"] > 0 for row in first + second)
    assert abs(first[-1]["time_ns"] - second[-1]["time_ns"]) < 60e9
    pair.spool.close()
    assert pair.ends() == [0, 0]
    assert [*pair.folder.glob("tmp-*/servegrid-*")] == []
