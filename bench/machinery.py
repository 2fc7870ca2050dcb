"""Measures the overhead of the workflow around the measurements, and of a bundle: `make bench`.

It runs the rehearsal on this machine, so no engine is measured. Machines are noisy: compare the
ratios within one run, not the seconds of two runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import time
from operator import truediv
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import yaml

import scale
from servegrid.reference import data
from servegrid.study.text import pluralize
from snakemake_executor_plugin_submitit.spool import JournalReader
from snakemake_executor_plugin_submitit.usage import UsageStats

ROOT = Path(__file__).parents[1]
REHEARSAL: dict[str, Any] = yaml.safe_load(
    (ROOT / "config/rehearsal.yaml").read_text(encoding="utf-8")
)
WAVES = 2
"""A cell sends its workload twice: as warm-up, and for the measurement."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="skip the full rehearsal")
    parser.add_argument("--plan", action="store_true", help="only the dry runs")
    options = parser.parse_args()
    plan()
    if options.plan:
        return
    start = median(run_timed("-m", "snakemake", "--version") for _ in range(3))
    one = REHEARSAL | {"deployments": REHEARSAL["deployments"][:1]}
    with tempfile.TemporaryDirectory() as name:
        print("one deployment, 56 cells and 3 drift checks:")
        report(*rehearse(one, 1, Path(name)), start)
    if options.quick:
        return
    with tempfile.TemporaryDirectory() as name:
        print("\nseven deployments at once, 392 cells and 21 drift checks:")
        report(*rehearse(REHEARSAL, 7, Path(name)), start)
        bundle(Path(name))


PLANNED = {400: 5, 10_000: 5, 50_000: 1}
"""How often a study is planned, by its number of cells: the ratios are medians."""
BARE = """
rule all:
    default_target: True
    input:
        expand(
            "cells/{{number}}/{{part}}.parquet",
            number=range({cells}),
            part=["requests", "telemetry"],
        ),


rule measure:
    output:
        requests="cells/{{number}}/requests.parquet",
        telemetry="cells/{{number}}/telemetry.parquet",
    log:
        "logs/{{number}}.log",
    {action}
"""
ACTIONS = {
    "a rule with the same outputs, log and script": 'script: "measure.py"',
    "a rule with the same outputs and log": 'shell: "touch {{output}}"',
}


STUDY = "the study"


def study_of(cells: int) -> dict[str, Any]:
    """A study with 200 cells per deployment."""
    config = scale.study_config(cells * scale.CELLS_PER_DEPLOYMENT // 200)
    config["workload"]["concurrency"] = config["workload"]["concurrency"][:20]
    return config


def plan() -> None:
    """Print the CPU time of a dry run, and its ratio to bare rules with as many outputs.

    The study has more jobs than the bare rules: 7 for its tables, its figures and its page, and 2
    per deployment.
    """
    print("dry run (snakemake -n), CPU time, by the number of cells; as ratios to bare rules:")
    for cells, runs in PLANNED.items():
        with tempfile.TemporaryDirectory() as name:
            commands = write_planned(cells, Path(name))
            seconds = [
                {label: scale.measure(*command)[0] for label, command in commands.items()}
                for _ in range(runs)
            ]
        ours = [each[STUDY] for each in seconds]
        print(f"  {cells:>6,} cells: {median(ours):.1f} s, median of {pluralize(runs, 'run')}")
        for label in ACTIONS:
            bare = [each[label] for each in seconds]
            ratio = median(map(truediv, ours, bare))
            print(f"    {ratio:.2f} × {label} ({median(bare):.1f} s)")


def write_planned(cells: int, folder: Path) -> dict[str, list[str]]:
    """The dry runs of a study with so many cells, and of bare rules with as many outputs."""
    (folder / "study.yaml").write_text(yaml.safe_dump(study_of(cells)), encoding="utf-8")
    (folder / "measure.py").touch()
    start = ["-m", "snakemake", "all", "--dry-run", "--profile", str(ROOT / "profiles/local")]
    start += ["--directory", str(folder), "--snakefile"]
    study = [str(ROOT / "Snakefile"), "--configfile", str(folder / "study.yaml")]
    commands = {STUDY: start + study}
    for number, (label, action) in enumerate(ACTIONS.items()):
        file = folder / f"bare-{number}.smk"
        file.write_text(BARE.format(cells=cells, action=action.format()), encoding="utf-8")
        commands[label] = [*start, str(file)]
    return commands


def rehearse(
    study: dict[str, Any], allocations: int, folder: Path
) -> tuple[float, list[UsageStats]]:
    """Run the workflow until all cells are measured. Returns its seconds, and the usage."""
    (folder / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    several = ("--submitit-max-allocations", str(allocations), "--submitit-idle-timeout", "0")
    took = run_timed(*workflow(folder, "all"), "--until", "measure", *several)
    usages = []
    for journal in sorted(folder.glob(".snakemake/submitit/*/*/journal.jsonl")):
        usage = UsageStats(journal.parent.parent.name)
        for event in JournalReader(journal).read_new():
            usage.add(event)
        usages.append(usage)
    return took, usages


def bundle(folder: Path) -> None:
    """Print how long it takes to bundle the results, and to verify the bundle."""
    analysed = run_timed(*workflow(folder, "all"))
    packed = run_timed(*workflow(folder, "bundle"))
    (archive_path,) = folder.glob("results/bundles/*")
    verified = run_timed("-m", "servegrid.cli.main", "verify", str(archive_path))
    with tarfile.open(archive_path) as archive:
        sizes = [member.size for member in archive if member.isfile()]
    compressed = archive_path.stat().st_size
    for label, value in {
        "all tables, figures and the page": f"{analysed:.0f} s",
        "bundle, with its verification": f"{packed:.0f} s, {packed / analysed:.2f} × that; "
        f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, compressed {compressed / 1e6:.1f}",
        "verify": f"{verified:.0f} s, {verified / analysed:.2f} × that",
    }.items():
        print(f"  {label:<40} {value}")


def workflow(folder: Path, target: str) -> list[str]:
    return [
        *("-m", "snakemake", target, "--snakefile", str(ROOT / "Snakefile"), "--quiet", "all"),
        *("--profile", str(ROOT / "profiles/local"), "--directory", str(folder)),
        *("--configfile", str(folder / "study.yaml")),
    ]


def report(took: float, usages: list[UsageStats], start: float) -> None:
    gaps = [gap for usage in usages for gap in usage.gaps_s]
    cells = sum(len(usage.started) for usage in usages)
    allocated = sum(usage.allocated_s for usage in usages)
    work_s = sum(usage.work_s for usage in usages)
    real = published_seconds(usages)
    lost = allocated - work_s
    scale = REHEARSAL["deployments"][0]["engine_args"]["time_scale"]
    for label, value in {
        "full run": f"{took:.0f} s for {cells} measurements",
        "gap between the workloads of two cells": f"{median(gaps):.2f} s median, "
        f"{quantiles(gaps, n=10)[-1]:.2f} s p90; {median(gaps) / start:.2f} × the time of "
        f"`snakemake --version` ({start:.2f} s)",
        "share of allocated time in measurements": f"{work_s / allocated:.0%} at {scale:g} × time",
        "the same share at the published times": f"{real / (real + lost):.1%} "
        f"({real / 3600:.1f} h of workloads, {lost:.0f} s of other work, no weights loaded)",
    }.items():
        print(f"  {label:<40} {value}")


def published_seconds(usages: list[UsageStats]) -> float:
    """Seconds that these deployments' workloads took in the article, including the warm-up."""
    published = data.published_cells("inria-2024")
    total = 0.0
    for row in published.to_dict("records"):
        name = f"{row['model']}_{row['quantization']}_emulated_{row['gpu_count']}x{row['gpu']}"
        if any(usage.name.startswith(name) for usage in usages):
            seconds = row["seconds_per_100_tokens"]
            total += 0.0 if seconds != seconds else WAVES * seconds
    return total


def run_timed(*arguments: str) -> float:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, encoding="utf-8", cwd=ROOT
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
