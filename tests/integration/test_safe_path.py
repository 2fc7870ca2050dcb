"""Nothing in a study's working directory is imported, whatever its name is.

The files of a stranger's bundle, or of another member of a group, can be there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.deployments import EMULATED_ENTRY
from helpers.processes import console_script

pytestmark = [pytest.mark.slow, pytest.mark.crowded]

ROOT = Path(__file__).parents[2]
MODULES = (
    *("servegrid", "snakemake", "submitit", "snakemake_executor_plugin_submitit"),
    *("psutil", "numpy", "pandas", "pyarrow", "yaml", "uvicorn", "tokenizers", "matplotlib"),
    *("pickle", "json", "argparse", "subprocess", "socket", "selectors", "ssl", "sitecustomize"),
)
STUDY = {
    "study": "small",
    "workload": {"concurrency": [1, 2], "input_len": 31, "output_len": 10},
    "deployments": [EMULATED_ENTRY],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with modules that say when they are imported."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r} + '\\n')\n"
        )
    (folder / "study.json").write_text(json.dumps(STUDY))
    return folder


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def imported(folder: Path) -> list[str]:
    found = folder.parent / "imported"
    return found.read_text().split() if found.exists() else []


def test_the_trap_works(folder: Path) -> None:
    run(folder, sys.executable, "-c", "import psutil")
    assert imported(folder) == ["psutil"]


def test_a_study_is_measured_bundled_and_verified(folder: Path) -> None:
    snakemake = (
        *(console_script("snakemake"), "--snakefile", str(ROOT / "Snakefile")),
        *("--profile", str(ROOT / "profiles/local"), "--configfile", "study.json"),
    )
    run(folder, *snakemake)
    run(folder, snakemake[0], "bundle", *snakemake[1:])
    (bundle,) = (folder / "results/bundles").iterdir()
    output = run(folder, console_script("servegrid"), "verify", str(bundle))
    assert [line.split()[0] for line in output.splitlines()] == ["PASS"] * 6
    again = ("--replicate", "1", "--profile", str(ROOT / "profiles/local"))
    run(folder, console_script("servegrid"), "verify", str(bundle), *again)
    assert imported(folder) == []
