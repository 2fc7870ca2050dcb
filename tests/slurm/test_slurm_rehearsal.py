"""Rehearses the article's study on a real Slurm with PlaFRIM's profile, with and without faults.

No finished cell is measured again and no cell is missing. By default three deployments have three
cells each; `--full` takes all seven, with their 392 cells and drift checks. Each scenario prints a
report (`-s` shows it).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from slurm.conftest import Workspace, plafrim_kinds

pytestmark = pytest.mark.crowded

ROOT = Path(__file__).parents[2]
MEASURED = "results/tables/cells.parquet"
"""A target that needs all cells, and not the figures and the page."""
LIMIT_S = 900.0
RESUMES = 4
ALL = 392 + 7 * 3
"""The article's cells, and three drift checks for each of its deployments."""
FEW = ["mistral-7b", "mixtral-8x22b", "llama-3-70b"]
"""Models on V100, on two A100 nodes, and with prompts of other lengths."""


class Rehearsal:
    """One run of the study, with its journals."""

    def __init__(
        self, work: Workspace, full: bool, concurrency: Sequence[int] = (1, 8, 32)
    ) -> None:
        self.work = work
        study = yaml.safe_load((ROOT / "config/rehearsal.yaml").read_text())
        if not full:
            study["include"] = [{"concurrency": [*concurrency], "input_len": [31, 21]}]
            study["deployments"] = [each for each in study["deployments"] if each["model"] in FEW]
        self.deployments = len(study["deployments"])
        (work.folder / "study.yaml").write_text(yaml.safe_dump(study))
        self.cells = ALL if full else len(concurrency) * self.deployments
        work.kinds(**plafrim_kinds())

    def start(
        self, *arguments: str, profile: str = "plafrim", target: str = "all"
    ) -> subprocess.Popen[bytes]:
        return self.work.launch(target, *self.arguments(profile), *arguments)

    @staticmethod
    def arguments(profile: str = "plafrim") -> list[str]:
        return [
            *("--snakefile", str(ROOT / "Snakefile"), "--configfile", "study.yaml", "--nocolor"),
            *("--profile", str(ROOT / "profiles" / profile), "--submitit-kinds", "kinds.yaml"),
        ]

    def end(self, run: subprocess.Popen[bytes]) -> None:
        run.wait(timeout=LIMIT_S)
        assert run.returncode == 0, self.work.log.read_text()[-6000:]

    def journal(self) -> list[dict[str, Any]]:
        events = []
        for path in self.work.folder.glob(".snakemake/submitit/*/*/journal.jsonl"):
            lines = path.read_text().splitlines()
            events += [json.loads(line) | {"spool": path.parent.name} for line in lines if line]
        return sorted(events, key=lambda event: event["time"])

    def count_finished(self) -> int:
        return sum(event["event"] == "job_finished" for event in self.journal())

    def wait_finished(self, cells: int) -> None:
        self.work.wait(lambda: self.count_finished() >= cells, limit_s=LIMIT_S)

    def report(self, scenario: str, seconds: float) -> Counter[str]:
        """Check that all cells exist and none was finished twice. Prints the figures."""
        events = self.journal()
        counts = Counter(event["event"] for event in events)
        finished = Counter(
            event["ticket"].partition("-")[2]
            for event in events
            if event["event"] == "job_finished" and event["status"] == 0
        )
        assert len(finished) == self.cells
        assert set(finished.values()) == {1}, "a finished cell was measured again"
        assert len(list(self.work.folder.glob("results/cells/**/requests.parquet"))) == self.cells
        repeated = counts["job_started"] - self.cells
        restarts = [int(each["slurm"]["Restarts"]) for each in self.records() if each["slurm"]]
        print(
            f"\n{scenario}: {self.cells} cells, {counts['service_started']} service starts, "
            f"{repeated} repeated cells, {len({event['spool'] for event in events})} allocations, "
            f"{sum(restarts)} requeues, {seconds:.0f} s"
        )
        return counts

    def records(self) -> list[dict[str, Any]]:
        """The records of ended allocations."""
        paths = self.work.folder.glob("results/logs/allocations/*.json")
        return [json.loads(path.read_text()) for path in paths]

    def assert_nothing_to_do(self, profile: str = "plafrim", target: str = MEASURED) -> None:
        run = self.start("--dry-run", profile=profile, target=target)
        self.end(run)
        assert "Nothing to be done" in self.work.log.read_text()


@pytest.fixture
def rehearsal(work: Workspace, request: pytest.FixtureRequest) -> Rehearsal:
    return Rehearsal(work, request.config.getoption("--full"))


def timed(action: Callable[[], None]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(LIMIT_S + 60)
def test_without_faults(rehearsal: Rehearsal) -> None:
    seconds = timed(lambda: rehearsal.end(rehearsal.start()))
    counts = rehearsal.report("without faults", seconds)
    assert (counts["service_started"], counts["job_started"]) == (
        rehearsal.deployments,
        rehearsal.cells,
    )
    output = rehearsal.work.log.read_text()
    assert f"Total: {rehearsal.cells} of {rehearsal.cells} jobs done" in output
    assert f"{rehearsal.deployments} service starts, 0 job restarts" in output
    assert len(rehearsal.records()) == rehearsal.deployments
    for record in rehearsal.records():
        name = record["allocation"]["name"]
        wanted = "v100" if "v100" in name else "a100"
        assert record["slurm"]["Features"] == f"sirocco&{wanted}"
        assert record["slurm"]["Partition"] == "routage"
        assert record["slurm"]["NumNodes"] == ("2" if "4xa100" in name else "1")
    submitted = [each["allocation"]["submitted"] for each in rehearsal.records()]
    print(f"submission of the allocations: {max(submitted) - min(submitted):.1f} s")
    cells = pd.read_parquet(rehearsal.work.folder / "results/tables/cells.parquet")
    assert set(cells["engine"]) == {"emulated"}
    assert set(cells["time_scale"]) == {0.005}
    page = rehearsal.work.folder / "results/tables/mistral-7b_fp16_emulated_2xv100-16gb.md"
    assert "Emulated, times × 0.005: these results do not come from hardware." in page.read_text()
    assert len(list(page.parent.glob("*_emulated_*.md"))) == rehearsal.deployments
    rehearsal.assert_nothing_to_do(target="all")
    # A profile changes no result: another one has nothing to do, either.
    rehearsal.assert_nothing_to_do(profile="local", target="all")


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(LIMIT_S + 60)
def test_a_node_is_lost(rehearsal: Rehearsal) -> None:
    def run() -> None:
        process = rehearsal.start(target=MEASURED)
        rehearsal.wait_finished(rehearsal.cells // 4)
        busy = next(node for _, state, node in rehearsal.work.queue() if state == "RUNNING")
        node = busy.partition("[")[0] if "[" not in busy else "sirocco21"
        rehearsal.work.cluster.lose_node(node)
        time.sleep(5)
        rehearsal.work.cluster.resume_node(node)
        rehearsal.end(process)

    seconds = timed(run)
    counts = rehearsal.report("a lost node", seconds)
    assert counts["service_started"] == rehearsal.deployments + 1
    assert counts["job_started"] <= rehearsal.cells + 1
    rehearsal.assert_nothing_to_do()


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(LIMIT_S + 60)
def test_two_nodes_are_preempted(rehearsal: Rehearsal) -> None:
    work = rehearsal.work
    kinds = plafrim_kinds()
    work.kinds(**{name: kind | {"slurm_partition": "preempt"} for name, kind in kinds.items()})

    def run() -> None:
        process = rehearsal.start(target=MEASURED)
        rehearsal.wait_finished(rehearsal.cells // 4)
        for node in ("sirocco14", "sirocco22"):
            work.cluster.call(
                *("sbatch", "--partition=routage", f"--nodelist={node}", "--exclusive", "--mem=0"),
                *("--output=/dev/null", "--time=1", "--wrap=sleep 5"),
            )
        rehearsal.end(process)

    seconds = timed(run)
    counts = rehearsal.report("preemption of two nodes", seconds)
    assert 1 <= counts["service_started"] - rehearsal.deployments <= 3
    assert counts["job_started"] <= rehearsal.cells + 3
    rehearsal.assert_nothing_to_do()


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(LIMIT_S + 60)
def test_the_time_limit_is_too_short(rehearsal: Rehearsal) -> None:
    full = rehearsal.cells == ALL
    limit = ("--set-resources", f"measure:runtime={2 if full else 1}")

    def run() -> None:
        # A deployment stops after two allocations without a finished cell: resume, as a user would.
        for _ in range(RESUMES):
            process = rehearsal.start(*limit, target=MEASURED)
            if process.wait(timeout=LIMIT_S) == 0:
                return
        rehearsal.end(process)

    seconds = timed(run)
    counts = rehearsal.report("2 minutes time limit" if full else "1 minute time limit", seconds)
    assert counts["service_started"] >= rehearsal.deployments
    # At most one repeated cell for each allocation that ended early.
    assert counts["job_started"] <= rehearsal.cells + counts["service_started"] - (
        rehearsal.deployments
    )
    rehearsal.assert_nothing_to_do()


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(LIMIT_S + 60)
def test_the_main_process_is_killed_and_restarted(rehearsal: Rehearsal) -> None:
    def run() -> None:
        process = rehearsal.start(target=MEASURED)
        rehearsal.wait_finished(rehearsal.cells // 4)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        unlock = [sys.executable, "-m", "snakemake_executor_plugin_submitit", "unlock"]
        subprocess.run(unlock, check=True, cwd=rehearsal.work.folder)
        rehearsal.end(rehearsal.start(target=MEASURED))

    seconds = timed(run)
    counts = rehearsal.report("main process killed", seconds)
    # Deployments that waited for a node start again; the others continue.
    assert counts["service_started"] == rehearsal.deployments
    assert counts["job_started"] == rehearsal.cells
    rehearsal.assert_nothing_to_do()
