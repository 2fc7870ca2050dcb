"""The same under locales that are not UTF-8, as on clusters where LANG is C or Latin-1."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from helpers.deployments import EMULATED_ENTRY

pytestmark = [pytest.mark.crowded, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STUDY: dict[str, Any] = {
    "study": "small",
    "workload": {"concurrency": [1, 2], "input_len": 31, "output_len": 5},
    "deployments": [EMULATED_ENTRY],
}
CORE = (
    *("test_study_examples.py", "test_study_source.py", "test_records_parquet.py"),
    *("test_exchange.py", "test_executor_spool.py", "test_executor_submission.py"),
)


@pytest.fixture(scope="session")
def latin1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Latin-1 locale, made for these tests."""
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/charmaps").is_dir():
        pytest.skip("localedef and its character maps are missing: apt install locales")
    folder, name = tmp_path_factory.mktemp("locales"), "en_US.ISO-8859-1"
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / name)]
    subprocess.run(command, check=True, capture_output=True)
    return {"LOCPATH": str(folder), "LC_ALL": name}


def run(
    command: list[str], settings: Mapping[str, str], folder: Path = ROOT
) -> subprocess.CompletedProcess[bytes]:
    """Run Python under a locale. PEP 538 and 540 would replace the locale C by UTF-8."""
    python = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | python | settings,
        capture_output=True,
        timeout=600,
    )


def workflow(folder: Path, *arguments: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    study = folder / "study.yaml"
    text = "# Ce fichier a été écrit en UTF-8 – ½\n" + yaml.safe_dump(STUDY)
    study.write_text(text, encoding="utf-8")
    return [
        *("-m", "snakemake", *arguments, "--snakefile", str(ROOT / "Snakefile")),
        *("--directory", str(folder), "--profile", str(ROOT / "profiles" / "local")),
        *("--configfile", str(study)),
    ]


def test_the_locale_of_these_tests_is_latin_1(latin1: dict[str, str]) -> None:
    done = run(["-c", "import locale; print(locale.getencoding())"], latin1)
    assert done.stdout.strip().lower() == b"iso-8859-1"


@pytest.mark.slow
def test_a_study_runs_under_latin_1(latin1: dict[str, str], tmp_path: Path) -> None:
    done = run(workflow(tmp_path / "study", "results/report/index.html"), latin1)
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, output
    assert "2 measurements done" in output
    assert "Traceback" not in output
    assert "Logging error" not in output
    results = tmp_path / "study" / "results"
    assert pq.read_table(results / "tables" / "cells.parquet").num_rows == 2
    page = (results / "report" / "index.html").read_bytes().decode("utf-8")
    assert "2 × V100" in page


@pytest.mark.slow
@pytest.mark.chaos
def test_the_locale_c_needs_nothing_else(tmp_path: Path) -> None:
    target = "results/tables/findings.md"
    done = run(workflow(tmp_path / "study", target), {"LC_ALL": "C"})
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "study" / target).read_bytes().decode("utf-8")


@pytest.mark.slow
@pytest.mark.chaos
def test_the_core_of_the_suite_passes_under_latin_1(latin1: dict[str, str]) -> None:
    files = [str(ROOT / "tests" / "unit" / name) for name in CORE]
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *files], latin1)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-5000:]


def test_standard_output_is_utf8_unless_it_is_a_terminal(latin1: dict[str, str]) -> None:
    command = ["-m", "servegrid.cli.main", "capacity", "--published", "inria-2024"]
    expected = run([*command, "--input-len", "119"], {"LC_ALL": "C.UTF-8"})
    for settings in (latin1, {"LC_ALL": "C"}):
        done = run([*command, "--input-len", "119"], settings)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == expected.stdout
    assert "×".encode() in expected.stdout


@pytest.mark.chaos
@pytest.mark.slow
def test_a_folder_that_not_all_programs_find_is_refused(
    latin1: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "étude"
    for settings in (latin1, {"LC_ALL": "C"}):
        done = run(workflow(folder), settings)
        assert done.returncode == 1
        output = done.stderr.decode()
        assert "étude: this path has characters other than ASCII" in output
        assert "Set PYTHONUTF8=1" in output
        assert "Logging error" not in output
    assert not (folder / "results").exists()
    # The remedy is true.
    done = run(workflow(folder, "results/tables/findings.md"), latin1 | {"PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr.decode()
