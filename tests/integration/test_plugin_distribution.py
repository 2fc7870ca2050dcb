"""The plugin's wheel alone, in an environment without servegrid, runs the plugin's example."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.wheels import ROOT, build_wheel, new_environment

pytestmark = [pytest.mark.slow, pytest.mark.crowded]


def test_the_example_runs_without_servegrid(tmp_path: Path) -> None:
    wheel = build_wheel(ROOT / "plugin", tmp_path / "wheels")
    python = new_environment(tmp_path / "environment", wheel)
    work = tmp_path / "work"
    shutil.copytree(ROOT / "plugin" / "example", work)
    env = os.environ | {"PYTHONPATH": str(work), "HOME": str(tmp_path)}
    assert subprocess.run([python, "-c", "import servegrid"], env=env, cwd=work).returncode == 1
    done = subprocess.run(
        [
            *(python, "-m", "snakemake", "--executor", "submitit", "--jobs", "10"),
            *("--submitit-cluster", "local", "--submitit-service", "service:serve"),
        ],
        env=env,
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # One service counted for all three jobs, in their order.
    assert [(work / f"count-{job}.txt").read_text() for job in (1, 2, 3)] == ["1", "2", "3"]
    assert "up 1 time in 1 allocation" in done.stderr
