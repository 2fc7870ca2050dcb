"""Measures time and memory while a study grows to 50,000 cells: `make bench SCALE=1`.

The records are artificial and small. The steps are those of a user who has measured everything:
plan, all tables, figures and the page, bundle, verify. A second table is about the main process
while an executor runs many short jobs on 200 allocations. Times are CPU seconds, because other work
on the machine changes them less. `growth` is the time or memory per cell, divided by that of the
smallest study: 1.0 is linear.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import string
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

import gather as records
from servegrid.study.config import load_study

ROOT = Path(__file__).parents[1]
TOY = ROOT / "tests/integration/executor"
CELLS_PER_DEPLOYMENT = 250
ALLOCATIONS, AT_A_TIME = 200, 4
REQUESTS, TOKENS = 4, 8
SIZES = (1_000, 10_000, 50_000)
JOBS = (1_000, 5_000)


def study_config(cells: int) -> dict[str, Any]:
    """A study of one deployment per 250 cells."""
    return {
        "study": "scale",
        "workload": {
            "protocol": "burst",
            "concurrency": [REQUESTS + number for number in range(25)],
            "input_len": [100 * (number + 1) for number in range(10)],
            "output_len": TOKENS,
            "drift_checks": False,
        },
        "deployments": [
            records.DEPLOYMENT | {"name": f"deployment-{number}"}
            for number in range(cells // CELLS_PER_DEPLOYMENT)
        ],
    }


def write_records(folder: Path) -> None:
    """Write a record of every trial of the study."""
    rng = np.random.default_rng(0)
    telemetry = records.make_telemetry(samples=4)
    for trial in load_study(folder / "study.yaml").all_trials:
        requests = records.make_requests(rng, REQUESTS, TOKENS)
        records.write_trial(trial, folder / "results/cells", requests, telemetry)


def measure(*arguments: str) -> tuple[float, float]:
    """Run a Python command. Returns its CPU seconds, and the MiB of its largest process."""
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=output, cwd=ROOT
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            sys.exit(output.read().decode()[-5000:])
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure_study(cells: int) -> dict[str, tuple[float, float]]:
    """CPU seconds and MiB of each step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "study.yaml").write_text(yaml.safe_dump(study_config(cells)), encoding="utf-8")
        write_records(folder)

        def snakemake(*arguments: str) -> tuple[float, float]:
            return measure(
                *("-m", "snakemake", *arguments, "--snakefile", str(ROOT / "Snakefile")),
                *("--directory", name, "--profile", str(ROOT / "profiles/local")),
                *("--configfile", f"{name}/study.yaml"),
            )

        def verify() -> tuple[float, float]:
            (archive,) = folder.glob("results/bundles/*")
            return measure("-m", "servegrid.cli.main", "verify", str(archive))

        steps = {
            "plan (snakemake -n)": lambda: snakemake("all", "--dry-run"),
            "tables, figures and page": lambda: snakemake("all"),
            "nothing to do": lambda: snakemake("all"),
            "bundle": lambda: snakemake("bundle"),
            "verify": verify,
        }
        results = {}
        for step, run in steps.items():
            results[step] = run()
            # At once, because a large study takes an hour.
            print(f"{cells:,} cells, {step}: {_cost(results[step])}", flush=True)
        return results


def measure_executor(jobs: int) -> tuple[float, float, float]:
    """CPU seconds and MiB of Snakemake's main process, and by how many MiB it grew in the second
    half of the jobs.
    """
    names = ("".join(letters) for letters in product(string.ascii_lowercase, repeat=2))
    groups = dict.fromkeys(islice(names, ALLOCATIONS), jobs // ALLOCATIONS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "acts").mkdir()
        (folder / "plan.json").write_text(json.dumps({"out": groups}), encoding="utf-8")
        (folder / "kinds.yaml").write_text("toy: {}\n", encoding="utf-8")
        with (folder / "output.log").open("wb") as output:
            main = psutil.Popen(
                [
                    *(sys.executable, "-m", "snakemake", "--snakefile", str(TOY / "Snakefile")),
                    *("--executor", "submitit", "--submitit-cluster", "local"),
                    *("--submitit-service", "toy_service:serve", "--submitit-kinds", "kinds.yaml"),
                    *("--submitit-max-allocations", str(AT_A_TIME)),
                    *("--submitit-idle-timeout", "0", "--jobs", "100000", "--quiet", "all"),
                ],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(TOY)},
                stdout=output,
                stderr=output,
            )
            seconds = mib = half = 0.0
            while main.poll() is None:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    mib = main.memory_info().rss / 2**20 or mib
                    times = main.cpu_times()
                    seconds = times.user + times.system
                if not half and len(list((folder / "out").glob("*"))) >= jobs / 2:
                    half = mib
                time.sleep(0.2)
        if main.returncode:
            sys.exit((folder / "output.log").read_text(encoding="utf-8")[-5000:])
        return seconds, mib, mib - half


def _cost(value: tuple[float, float]) -> str:
    seconds, mib = value
    return f"{seconds:.1f} s {mib:,.0f} MiB"


def report(title: str, sizes: tuple[int, ...], rows: dict[str, list[tuple[float, float]]]) -> None:
    print(f"\n{title}")
    heads = "".join(f"{f'{size:,}':>20}" for size in sizes)
    print(f"  {'':<28}{heads}{'growth':>16}")
    for step, values in rows.items():
        cells = "".join(f"{_cost(value):>20}" for value in values)
        scale = sizes[-1] / sizes[0]
        growth = [last / first / scale for first, last in zip(values[0], values[-1], strict=True)]
        print(f"  {step:<28}{cells}{f'{growth[0]:.2f} s {growth[1]:.2f} MiB':>16}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--jobs", type=int, nargs="+", default=list(JOBS))
    options = parser.parse_args()
    studies: list[dict[str, tuple[float, float]]] = []
    for cells in options.cells:
        studies.append(measure_study(cells))
        report(
            f"studies by their number of cells, {CELLS_PER_DEPLOYMENT} per deployment",
            tuple(options.cells[: len(studies)]),
            {step: [study[step] for study in studies] for step in studies[0]},
        )
    runs = [measure_executor(jobs) for jobs in options.jobs]
    report(
        f"{ALLOCATIONS} allocations, at most {AT_A_TIME} at a time, by their number of jobs",
        tuple(options.jobs),
        {"main process": [(seconds, mib) for seconds, mib, _ in runs]},
    )
    grown = ", ".join(f"{mib:.1f}" for _, _, mib in runs)
    print(f"  MiB by which the main process grew in the second half of the jobs: {grown}")


if __name__ == "__main__":
    main()
