"""A search on a real Slurm with the article's timing, and on real engines."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from servegrid.analysis.search import Figures, FrontierEntry, Search, load_measured
from servegrid.analysis.slo import Slo
from servegrid.reference import data
from servegrid.study.config import load_study, parse_study
from servegrid.study.grid import Trial
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


def headrooms(folder: Path, config: dict[str, Any], slo: Slo) -> dict[str, Figures]:
    return load_measured(parse_study(config).trials, folder / "results" / "cells", slo)


def run_locally(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    command = [
        *(sys.executable, "-m", "snakemake", MEASURED),
        *("--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)),
        *("--profile", str(ROOT / "profiles/local"), "--configfile", str(folder / "study.yaml")),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.chaos
@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
def test_a_search_on_a_real_engine_agrees_with_the_grid(tmp_path: Path, engine: str) -> None:
    """The demo's model on the CPU. The SLO is in the widest gap between the rates of a first grid.

    The second grid keeps the cells of the search, so that noise does not decide.
    """
    config = yaml.safe_load((ROOT / "config/demo.yaml").read_text())
    config["deployments"] = [each for each in config["deployments"] if each["engine"] == engine]
    config["workload"]["output_len"] = 16
    run_locally(tmp_path / "first", config)
    one = Slo(tokens_per_s_per_user=1.0)  # then the headroom of a cell is its tokens/s per user
    rates = headrooms(tmp_path / "first", config, one)
    ordered = sorted(each.headroom for each in rates.values() if each.headroom is not None)
    slower, faster = max(itertools.pairwise(ordered), key=lambda pair: pair[1] / pair[0])
    slo = Slo(tokens_per_s_per_user=math.sqrt(slower * faster))
    print(f"\n{engine}: {slower:.3g} < {slo.tokens_per_s_per_user:.3g} < {faster:.3g} tokens/s")
    config["slo"] = {"tokens_per_s_per_user": slo.tokens_per_s_per_user}
    config["workload"]["grid"] = "frontier"
    run_locally(tmp_path / "search", config)
    trials = parse_study(config).trials
    found = headrooms(tmp_path / "search", config, slo)
    assert len({Path(trial).parent for trial in found}) < 8
    config["workload"]["grid"] = "full"
    run_locally(tmp_path / "search", config)
    measured = headrooms(tmp_path / "search", config, slo)
    assert len(measured) == 8
    assert all(found.get(trial, figures) == figures for trial, figures in measured.items())
    grid = {entry.input_len: entry for entry in search_of(trials, slo, found | measured)}
    for entry in search_of(trials, slo, found):
        assert entry.is_complete
        expected = grid[entry.input_len]
        print(f"\n{engine}, {entry.input_len} tokens: {entry.largest}, in the grid {expected}")
        assert entry.is_open or entry.largest == expected.largest


def search_of(
    trials: Sequence[Trial], slo: Slo, measured: Mapping[str, Figures]
) -> list[FrontierEntry]:
    """The frontier of what is measured."""
    return Search(tuple(trials), slo, measured).frontier()
