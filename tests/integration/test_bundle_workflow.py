"""A study on the emulated engine, bundled by the workflow, verified elsewhere, gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.crowded

ROOT = Path(__file__).parents[2]
STUDY: dict[str, Any] = {
    "study": "small",
    "workload": {"concurrency": [1, 2], "input_len": [31], "output_len": 10, "trials": 2},
    "deployments": [
        {
            "model": "mistral-7b",
            "checkpoint": "mistralai/Mistral-7B-Instruct-v0.2",
            "quantization": "fp16",
            "engine": "emulated",
            "gpu": "v100-16gb",
            "gpu_count": 2,
            "max_model_len": 4096,
            "engine_args": {"timing": "inria-2024", "time_scale": 0.001},
        }
    ],
}


def run(folder: Path, *command: str, home: Path | None = None, status: int = 0) -> str:
    """Run a command of this Python in `folder`, as a user would whose home is `home`."""
    env = os.environ | ({"HOME": str(home)} if home else {})
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    told = done.stdout + done.stderr
    assert done.returncode == status, told
    return told


def snakemake(folder: Path, config: Path, *targets: str) -> str:
    places = ["--snakefile", str(ROOT / "Snakefile"), "--profile", str(ROOT / "profiles/local")]
    return run(
        folder, "snakemake", *targets, *places, "--directory", str(folder),
        "--configfile", str(config),
    )  # fmt: skip


def times(folder: Path) -> dict[str, int]:
    found = (folder / "results" / "cells").rglob("*.parquet")
    return {each.relative_to(folder).as_posix(): each.stat().st_mtime_ns for each in found}


@pytest.mark.slow
def test_a_study_is_bundled_twice_alike_verified_elsewhere_and_gone_on_with(
    tmp_path: Path,
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    config = site / "study.json"
    config.write_text(json.dumps(STUDY))

    snakemake(site, config)
    snakemake(site, config, "bundle")
    (bundle,) = (site / "results" / "bundles").iterdir()
    first = hashlib.sha256(bundle.read_bytes()).hexdigest()
    bundle.unlink()
    snakemake(site, config, "bundle")
    assert hashlib.sha256(bundle.read_bytes()).hexdigest() == first

    elsewhere, home = tmp_path / "elsewhere", tmp_path / "home"
    elsewhere.mkdir()
    home.mkdir()
    verify = ("servegrid.cli.main", "verify", str(bundle))
    told = run(elsewhere, *verify, home=home)
    assert [line.split()[0] for line in told.splitlines()] == ["PASS"] * 6
    assert "4 of 4 trials" in told
    assert list(elsewhere.iterdir()) == []

    again = ("--replicate", "1", "--profile", str(ROOT / "profiles/local"))
    told = run(elsewhere, *verify, *again, home=home)
    (replicated,) = elsewhere.iterdir()
    assert replicated.name == bundle.name.removesuffix(".tar.gz") + "-replicated"
    assert f"# {replicated.name} against the bundle" in told
    assert len(list(replicated.glob("results/cells/**/requests.parquet"))) == 2
    shutil.rmtree(replicated)

    run(elsewhere, "servegrid.cli.main", "unpack", str(bundle), "study", home=home)
    opened = elsewhere / "study"
    sums = ["sha256sum", "--check", "--strict", "--quiet", "manifest-sha256.txt"]
    assert subprocess.run(sums, cwd=opened).returncode == 0
    assert (opened / "profiles" / "local" / "config.yaml").exists()
    kept = times(opened)
    assert len(kept) == 8
    more = json.loads((opened / "config" / "study.json").read_text())
    more["workload"]["trials"] = 3
    (opened / "config" / "more.json").write_text(json.dumps(more))
    snakemake(opened, opened / "config" / "more.json", "bundle")
    now = times(opened)
    assert {name: now[name] for name in kept} == kept
    assert {name.split("/")[4] for name in now.keys() - kept.keys()} == {"trial-3"}
    assert "trial" in (opened / "results" / "tables" / "cells.csv").read_text()

    # Gone on with, it is another bundle, whole again.
    (larger,) = (opened / "results" / "bundles").iterdir()
    told = run(elsewhere, "servegrid.cli.main", "verify", str(larger))
    assert "6 of 6 trials" in told


@pytest.mark.slow
def test_what_there_is_can_be_bundled_where_not_all_can_be_measured(tmp_path: Path) -> None:
    config = tmp_path / "study.json"
    config.write_text(json.dumps(STUDY))
    snakemake(tmp_path, config, f"{measured(1)}/requests.parquet")
    assert "1 of 4 trials" in snakemake(tmp_path, config, "bundle_partial")
    (bundle,) = (tmp_path / "results" / "bundles").iterdir()
    assert bundle.name.startswith("small-partial-")
    told = run(tmp_path, "servegrid.cli.main", "verify", str(bundle))
    assert "PASS  completeness  1 of 4 trials: partial, as it says" in told
    assert f"{measured(2).removeprefix('results/cells/')}: not measured" in told


def measured(trial: int) -> str:
    name = "mistral-7b_fp16_emulated_2xv100-16gb"
    return f"results/cells/{name}/burst-c1-i31-o10/trial-{trial}"
