"""What the machinery costs around the measuring, and what a bundle of it costs: `make bench`.

Rehearsals on this machine, so nothing here is a measurement of an engine. Machines are noisy:
compare the ratios of one run, not the seconds of two.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import yaml

from servegrid.reference import data
from snakemake_executor_plugin_submitit.account import Account
from snakemake_executor_plugin_submitit.spool import JournalReader

ROOT = Path(__file__).parents[1]
REHEARSAL: dict[str, Any] = yaml.safe_load((ROOT / "config/rehearsal.yaml").read_text())
WAVES = 2
"""A cell sends its load twice: to warm up, and to measure."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out the whole rehearsal")
    options = parser.parse_args()
    start = median(seconds_of("-m", "snakemake", "--version") for _ in range(3))
    one = REHEARSAL | {"deployments": REHEARSAL["deployments"][:1]}
    with tempfile.TemporaryDirectory() as name:
        print("one deployment alone, 56 cells and 3 sentinels:")
        report(*rehearsed(one, 1, Path(name)), start)
    if options.quick:
        return
    with tempfile.TemporaryDirectory() as name:
        print("\nall seven at once, 392 cells and 21 sentinels:")
        report(*rehearsed(REHEARSAL, 7, Path(name)), start)
        bundled(Path(name))


def rehearsed(study: dict[str, Any], allocations: int, folder: Path) -> tuple[float, list[Account]]:
    """Seconds that the workflow took until all cells were there, and the allocations' accounts."""
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    several = ("--submitit-allocations", str(allocations), "--submitit-linger", "0")
    took = seconds_of(*workflow(folder, "all"), "--until", "measure", *several)
    accounts = []
    for journal in sorted(folder.glob(".snakemake/submitit/*/*/journal.jsonl")):
        account = Account(journal.parent.parent.name)
        for event in JournalReader(journal).new():
            account.note(event)
        accounts.append(account)
    return took, accounts


def bundled(folder: Path) -> None:
    """Reports what it takes to bundle what was measured, and to verify it."""
    analysed = seconds_of(*workflow(folder, "all"))
    packed = seconds_of(*workflow(folder, "bundle"))
    (bundle,) = folder.glob("results/bundles/*")
    verified = seconds_of("-m", "servegrid.cli.main", "verify", str(bundle))
    with tarfile.open(bundle) as archive:
        sizes = [member.size for member in archive if member.isfile()]
    for what, value in {
        "all tables, figures and the page": f"{analysed:.0f} s",
        "bundle, verified when made": f"{packed:.0f} s, {packed / analysed:.2f} × that; "
        f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, packed {bundle.stat().st_size / 1e6:.1f}",
        "verify": f"{verified:.0f} s, {verified / analysed:.2f} × that",
    }.items():
        print(f"  {what:<38} {value}")


def workflow(folder: Path, target: str) -> list[str]:
    return [
        *("-m", "snakemake", target, "--snakefile", str(ROOT / "Snakefile"), "--quiet", "all"),
        *("--profile", str(ROOT / "profiles/local"), "--directory", str(folder)),
        *("--configfile", str(folder / "study.yaml")),
    ]


def report(took: float, accounts: list[Account], start: float) -> None:
    gaps = [gap for account in accounts for gap in account.gaps]
    cells = sum(len(account.keys) for account in accounts)
    allocated = sum(account.allocated for account in accounts)
    at_work = sum(account.at_work for account in accounts)
    real = as_published(accounts)
    lost = allocated - at_work
    scale = REHEARSAL["deployments"][0]["engine_args"]["time_scale"]
    for what, value in {
        "whole run": f"{took:.0f} s for {cells} of them",
        "gap between two cells' loads": f"{median(gaps):.2f} s median, "
        f"{quantiles(gaps, n=10)[-1]:.2f} s p90; {median(gaps) / start:.2f} × the time that "
        f"`snakemake --version` takes here ({start:.2f} s)",
        "share of allocations spent measuring": f"{at_work / allocated:.0%} at {scale:g} × time",
        "the same at the published times": f"{real / (real + lost):.1%} "
        f"({real / 3600:.1f} h of loads, {lost:.0f} s of everything else; weights not loaded)",
    }.items():
        print(f"  {what:<38} {value}")


def as_published(accounts: list[Account]) -> float:
    """Seconds that the loads of these deployments took in the article, warm-up included."""
    published = data.published("inria-2024")
    total = 0.0
    for row in published.to_dict("records"):
        name = f"{row['model']}_{row['quantization']}_emulated_{row['gpu_count']}x{row['gpu']}"
        if any(account.name.startswith(name) for account in accounts):
            seconds = row["seconds_per_100_tokens"]
            total += 0.0 if seconds != seconds else WAVES * seconds
    return total


def seconds_of(*arguments: str) -> float:
    began = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
