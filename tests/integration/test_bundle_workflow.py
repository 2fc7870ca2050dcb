"""The workflow bundles an emulated study, which is verified and continued elsewhere.

Nothing in the working directories is imported, whatever its name is: the files of a stranger's
bundle, or of another member of a group, can be there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from helpers.deployments import EMULATED_ENTRY
from helpers.processes import console_script

pytestmark = pytest.mark.crowded

ROOT = Path(__file__).parents[2]
STUDY: dict[str, Any] = {
    "study": "small",
    "workload": {"concurrency": [1, 2], "input_len": [31], "output_len": 10, "trials": 2},
    "deployments": [EMULATED_ENTRY],
}


MODULES = (
    *("servegrid", "snakemake", "submitit", "snakemake_executor_plugin_submitit"),
    *("psutil", "numpy", "pandas", "pyarrow", "yaml", "uvicorn", "tokenizers", "matplotlib"),
    *("pickle", "json", "argparse", "subprocess", "socket", "selectors", "ssl", "sitecustomize"),
)


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """The file in which the modules that `set_trap` wrote say that they were imported."""
    return tmp_path / "imported"


def set_trap(folder: Path, imported: Path) -> None:
    """Write modules with names of real ones into `folder`."""
    folder.mkdir()
    for name in MODULES:
        text = f"open({str(imported)!r}, 'a').write({name!r} + '\\n')\n"
        (folder / f"{name}.py").write_text(text)


def test_the_trap_works(tmp_path: Path, imported: Path) -> None:
    set_trap(tmp_path / "site", imported)
    command = [sys.executable, "-c", "import psutil"]
    subprocess.run(command, cwd=tmp_path / "site", check=True)
    assert imported.read_text(encoding="utf-8").split() == ["psutil"]


def run(folder: Path, script: str, *arguments: str, home: Path | None = None) -> str:
    """Run a command of this environment in `folder`, with `home` as the home folder."""
    env = os.environ | ({"HOME": str(home)} if home else {})
    done = subprocess.run(
        [console_script(script), *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def snakemake(folder: Path, config: Path, *targets: str) -> str:
    places = ["--snakefile", str(ROOT / "Snakefile"), "--profile", str(ROOT / "profiles/local")]
    return run(
        folder, "snakemake", *targets, *places, "--directory", str(folder),
        "--configfile", str(config),
    )  # fmt: skip


def modification_times(folder: Path) -> dict[str, int]:
    found = (folder / "results" / "cells").rglob("*.parquet")
    return {each.relative_to(folder).as_posix(): each.stat().st_mtime_ns for each in found}


def bundle_study(site: Path, imported: Path) -> Path:
    """Measure the study in a folder with a trap. Returns the bundle.

    The capacity plan is for the users of a trace, which is gone afterwards.
    """
    set_trap(site, imported)
    config, trace = site / "study.json", site / "trace.csv"
    users_from = {"kind": "trace", "path": trace.name}
    config.write_text(json.dumps({**STUDY, "capacity": {"users_from": users_from}}))
    rows = "".join(f"{number},31,9\n" for number in range(401))
    trace.write_text(f"Timestamp,Request tokens,Response tokens\n{rows}", encoding="utf-8")
    snakemake(site, config)
    plan = site / "results" / "tables" / "capacity.md"
    assert "Busiest 5 minutes: 1 requests/s (300 requests)" in plan.read_text(encoding="utf-8")
    snakemake(site, config, "bundle")
    trace.unlink()
    (bundle,) = (site / "results" / "bundles").iterdir()
    return bundle


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_is_bundled_and_verified_and_continued_elsewhere(
    tmp_path: Path, imported: Path
) -> None:
    bundle = bundle_study(tmp_path / "site", imported)

    elsewhere, home = tmp_path / "elsewhere", tmp_path / "home"
    set_trap(elsewhere, imported)
    before = set(elsewhere.iterdir())
    home.mkdir()
    verify = ("servegrid", "verify", str(bundle))
    output = run(elsewhere, *verify, home=home)
    assert [line.split()[0] for line in output.splitlines()] == ["PASS"] * 6
    assert "4 of 4 trials" in output
    assert set(elsewhere.iterdir()) == before

    run(elsewhere, "servegrid", "unpack", str(bundle), "study", home=home)
    unpacked = elsewhere / "study"
    sums = ["sha256sum", "--check", "--strict", "--quiet", "manifest-sha256.txt"]
    assert subprocess.run(sums, cwd=unpacked).returncode == 0
    assert (unpacked / "source" / "profiles" / "local" / "config.yaml").exists()
    kept = modification_times(unpacked)
    assert len(kept) == 8
    # Snakemake has no metadata there: without dates, a changed SLO or changed code did nothing.
    (jobs,) = [
        line
        for line in snakemake(unpacked, unpacked / "config/study.json", "--dry-run").splitlines()
        if "other jobs to run: " in line
    ]
    assert jobs.startswith("8 other jobs to run: gather")
    more = json.loads((unpacked / "config" / "study.json").read_text())
    more["workload"]["trials"] = 3
    (unpacked / "config" / "more.json").write_text(json.dumps(more))
    snakemake(unpacked, unpacked / "config" / "more.json", "bundle")
    now = modification_times(unpacked)
    assert {name: now[name] for name in kept} == kept
    assert {name.split("/")[4] for name in now.keys() - kept.keys()} == {"trial-3"}
    assert "trial" in (unpacked / "results" / "tables" / "cells.csv").read_text()

    # The continued study is another, complete bundle: one that does not verify is not made.
    (larger,) = (unpacked / "results" / "bundles").iterdir()
    with tarfile.open(larger) as archive:
        packed = [name for name in archive.getnames() if name.endswith("requests.parquet")]
    assert len(packed) == 6
    assert not imported.exists()


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_cell_of_a_bundle_is_measured_again_elsewhere(tmp_path: Path, imported: Path) -> None:
    bundle = bundle_study(tmp_path / "site", imported)

    elsewhere = tmp_path / "elsewhere"
    set_trap(elsewhere, imported)
    before = set(elsewhere.iterdir())
    again = ("--replicate", "1", "--profile", str(ROOT / "profiles/local"))
    output = run(elsewhere, "servegrid", "verify", str(bundle), *again)
    (replicated,) = set(elsewhere.iterdir()) - before
    assert replicated.name == bundle.name.removesuffix(".tar.gz") + "-replicated"
    assert f"# {replicated.name} compared with the bundle" in output
    assert len(list(replicated.glob("results/cells/**/requests.parquet"))) == 2
    assert not imported.exists()


@pytest.mark.slow
def test_a_partial_study_can_be_bundled(tmp_path: Path) -> None:
    config = tmp_path / "study.json"
    config.write_text(json.dumps(STUDY))
    snakemake(tmp_path, config, f"{trial_folder(1)}/requests.parquet")
    assert "1 of 4 trials" in snakemake(tmp_path, config, "bundle_partial")
    (bundle,) = (tmp_path / "results" / "bundles").iterdir()
    assert bundle.name.startswith("small-partial-")
    output = run(tmp_path, "servegrid", "verify", str(bundle))
    assert "PASS  completeness  1 of 4 trials; the bundle says that it is partial" in output
    assert f"{trial_folder(2).removeprefix('results/cells/')}: not measured" in output


def trial_folder(trial: int) -> str:
    name = "mistral-7b_fp16_emulated_2xv100-16gb"
    return f"results/cells/{name}/burst-c1-i31-o10/trial-{trial}"
