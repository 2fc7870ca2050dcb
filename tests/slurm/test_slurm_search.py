"""A search on a real Slurm: three deployments of the article, with its timing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

from servegrid.analysis.search import Search, load_measured
from servegrid.analysis.slo import Slo
from servegrid.reference import data
from servegrid.study.config import load_study
from slurm.conftest import Workspace, plafrim_kinds
from slurm.test_slurm_rehearsal import FEW, LIMIT_S, MEASURED, ROOT, Rehearsal

TIME_SCALE = 0.3
"""With a smaller one, the noise of a busy machine is a large part of each time."""
LENGTHS = [31, 296, 822, 21, 240, 703]
"""Three prompt lengths of each deployment; llama-3-70b has others."""


def published_frontier(model: str, gpu_count: int) -> dict[int, float]:
    """The largest concurrency with 5 tokens/s per user, by prompt length."""
    cells = data.published_cells("inria-2024")
    meets = cells["seconds_per_100_tokens"] <= 20
    mine = (cells["model"] == model) & (cells["gpu_count"] == gpu_count)
    found = cells[meets & mine].groupby("input_len")["concurrency"].max()
    return {int(str(length)): float(value) for length, value in found.items()}


@pytest.mark.chaos
@pytest.mark.timeout(LIMIT_S + 60)
def test_a_search_finds_the_articles_frontier_on_slurm(work: Workspace) -> None:
    study = yaml.safe_load((ROOT / "config/rehearsal.yaml").read_text())
    study["workload"] |= {"grid": "frontier", "trials": 1}
    study["include"] = [{"input_len": LENGTHS}]
    study["deployments"] = [each for each in study["deployments"] if each["model"] in FEW]
    for each in study["deployments"]:
        each["engine_args"] = each["engine_args"] | {"time_scale": TIME_SCALE}
    file = work.folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    work.kinds(**plafrim_kinds())
    run = work.launch(MEASURED, *Rehearsal.arguments())
    run.wait(timeout=LIMIT_S)
    assert run.returncode == 0, work.log.read_text()[-6000:]
    expanded, cells = load_study(file), work.folder / "results" / "cells"
    table = pd.read_parquet(work.folder / MEASURED)
    for deployment in expanded.deployments:
        trials = tuple(t for t in expanded.trials if t.deployment.name == deployment.name)
        measured = load_measured(trials, cells, Slo())
        assert len({Path(trial).parent for trial in measured}) <= 10
        rows = table[table["deployment"] == deployment.name]
        assert Counter(rows["verdict"])["not_run"] == len(trials) - len(measured)
        for entry in Search(trials, Slo(), measured).frontier():
            assert entry.is_complete
            expected = published_frontier(deployment.model, deployment.gpu_count)
            assert entry.is_open or entry.largest == expected.get(entry.input_len)
