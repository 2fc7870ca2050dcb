"""The whole workflow on a real engine: llama.cpp, which is up in under a second."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from servegrid.records import columns, parquet
from servegrid.study.config import study_of

ROOT = Path(__file__).parents[2]
DEPLOYMENT = "tiny_q4_1_llamacpp_cpu"
STUDY: dict[str, Any] = {
    "study": "small",
    "workload": {"concurrency": [1, 2], "input_len": [31, 40], "output_len": 5},
    "deployments": [
        {
            "model": "tiny",
            "checkpoint": "demo:smollm2-135m-instruct.gguf",
            "tokenizer": "demo:smollm2-135m-instruct",
            "quantization": "q4_1",
            "engine": "llamacpp",
            "gpu": "cpu",
            "max_model_len": 256,
            "max_num_seqs": 4,
        }
    ],
}


class Workspace:
    """A folder with a study, in which snakemake runs as its users run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "study.yaml"
        self.study = json.loads(json.dumps(STUDY))
        self.output = folder / "output.txt"
        self.processes: list[subprocess.Popen[bytes]] = []

    def command(self, *arguments: str) -> list[str]:
        self.config.write_text(yaml.safe_dump(self.study))
        return [
            *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
            *("--profile", str(ROOT / "profiles" / "local"), "--directory", str(self.folder)),
            *("--configfile", str(self.config), *arguments),
        ]

    def run(self, *arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            self.command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=240
        )
        told = done.stdout + done.stderr
        assert done.returncode == status, told
        return told

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.output.open("w") as output:
            process = subprocess.Popen(
                self.command(*arguments),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def cells(self) -> dict[str, int]:
        """Each trial that has been measured, with the time its record was written."""
        found = (self.folder / "results" / "cells").glob("*/*/*/requests.parquet")
        return {
            str(each.parent.relative_to(self.folder)): each.stat().st_mtime_ns for each in found
        }

    def repeated(self, kept: dict[str, int]) -> set[str]:
        """Which of the cells that were there have been measured again."""
        now = self.cells()
        return {trial for trial in kept if now[trial] != kept[trial]}

    def bring_ups(self) -> int:
        return len({record["environment"]["started"] for record in self.records()})

    def records(self) -> list[dict[str, Any]]:
        return [parquet.read_record(self.folder / c / "requests.parquet") for c in self.cells()]

    def wait_for_cells(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.cells()) < count:
            assert time.monotonic() < deadline, f"{len(self.cells())} cells after 120 s"
            time.sleep(0.02)

    def survivors(self) -> list[psutil.Process]:
        """Processes that still run in this folder or name it."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.folder) in " ".join(process.cmdline()) or process.cwd().startswith(
                    str(self.folder)
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_until_gone(self) -> None:
        deadline = time.monotonic() + 60
        while left := self.survivors():
            assert time.monotonic() < deadline, [process.cmdline() for process in left]
            time.sleep(0.1)


def latest(cells: dict[str, int]) -> str:
    """The cell that was written last: its job may not have ended yet."""
    return max(cells, key=lambda trial: cells[trial])


def abandoned_shared_memory() -> set[str]:
    """Segments that no process has mapped: other tests may run beside these."""
    mapped = ""
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            mapped += Path(f"/proc/{process.pid}/maps").read_text()
    return {name for name in os.listdir("/dev/shm") if f"/dev/shm/{name}" not in mapped}


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    shared_memory = abandoned_shared_memory()
    work = Workspace(tmp_path)
    yield work
    for process in work.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    work.wait_until_gone()
    assert abandoned_shared_memory() <= shared_memory


@pytest.mark.slow
def test_measure_then_rerun_only_what_is_missing_new_or_changed(workspace: Workspace) -> None:
    workspace.run()
    first = workspace.cells()
    assert len(first) == 4
    assert workspace.bring_ups() == 1
    table = pq.read_table(workspace.folder / "results/tables/cells.parquet").to_pandas()
    assert list(table.columns) == [column.name for column in columns.CELLS]
    assert set(table["verdict"]) == {"ok"}
    for trial in first:
        rows = pq.read_table(workspace.folder / trial / "requests.parquet").to_pandas()
        assert set(rows["completion_tokens"]) == {5}
        assert set(rows["prompt_tokens"]) == {31 if "-i31-" in trial else 40}
        assert [sum(each) for each in rows["chunk_tokens"]] == [5] * len(rows)

    assert "Nothing to be done" in workspace.run()

    lost = sorted(first)[0]
    (workspace.folder / lost / "requests.parquet").unlink()
    workspace.run()
    second = workspace.cells()
    assert {trial for trial in second if second[trial] != first[trial]} == {lost}

    workspace.study["workload"]["concurrency"] = [1, 2, 4]
    workspace.run()
    third = workspace.cells()
    assert {trial for trial in third if third[trial] != second.get(trial)} == {
        f"results/cells/{DEPLOYMENT}/burst-c4-i{length}-o5/trial-1" for length in (31, 40)
    }

    workspace.study["workload"]["prompts"] = "identical"
    workspace.run()
    fourth = workspace.cells()
    assert {trial for trial in fourth if fourth[trial] == third[trial]} == set()

    # The site and the words around a study are no reason to measure again.
    told = workspace.run("--set-resources", "measure:runtime=30", "measure:startup_s=77")
    assert "Nothing to be done" in told
    workspace.config.write_text(workspace.config.read_text() + "\n# a comment\n")
    assert "Nothing to be done" in workspace.run()


@pytest.mark.slow
def test_a_cell_that_is_not_of_this_study_is_refused_by_name(workspace: Workspace) -> None:
    workspace.study["workload"] = {"concurrency": [1], "input_len": [31], "output_len": 5}
    workspace.run()
    (trial,) = study_of(workspace.study).trials
    stale = workspace.folder / "results/cells" / trial.id / "requests.parquet"
    table = pq.read_table(stale)
    record = parquet.read_record(stale) | {"spec_digest": "0" * 16}
    parquet.write(
        table.replace_schema_metadata(parquet.schema_of(columns.REQUESTS, record).metadata), stale
    )
    told = workspace.run(status=1)
    assert trial.id in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_killed_allocation_is_continued_by_the_same_command(workspace: Workspace) -> None:
    workspace.study["workload"] |= {"concurrency": [1, 2, 3, 4], "output_len": 20}
    process = workspace.start()
    workspace.wait_for_cells(2)
    kept = workspace.cells()
    allocation = next(
        each for each in workspace.survivors() if "submitit.core._submit" in each.cmdline()
    )
    allocation.kill()
    assert process.wait(200) == 0, workspace.output.read_text()
    assert len(workspace.cells()) == 8
    assert workspace.repeated(kept) <= {latest(kept)}
    assert workspace.bring_ups() == 2


@pytest.mark.slow
def test_a_killed_main_process_is_taken_up_again(workspace: Workspace) -> None:
    workspace.study["workload"] |= {"concurrency": [1, 2, 3, 4], "output_len": 20}
    process = workspace.start()
    workspace.wait_for_cells(2)
    process.kill()
    process.wait()
    kept = workspace.cells()
    workspace.run("--unlock")
    workspace.run()
    assert len(workspace.cells()) == 8
    assert workspace.repeated(kept) <= {latest(kept)}
    assert workspace.bring_ups() == 1


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_running_and_nothing_half_written(
    workspace: Workspace,
) -> None:
    workspace.study["workload"] |= {"concurrency": [1, 2, 3, 4], "output_len": 20}
    process = workspace.start()
    workspace.wait_for_cells(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    workspace.wait_until_gone()
    assert all(record["verdict"] == "ok" for record in workspace.records())
    workspace.run()
    assert len(workspace.cells()) == 8


BAD_INPUT = {
    "unknown key": (lambda s: s["workload"].update(concurency=[1]), "unknown key `concurency`"),
    "missing model": (
        lambda s: s["deployments"][0].update(checkpoint="models/nowhere"),
        "models/nowhere",
    ),
    "too long": (lambda s: s["workload"].update(input_len=300), "max_model_len 256"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_before_anything_starts(workspace: Workspace, case: str) -> None:
    change, told = BAD_INPUT[case]
    change(workspace.study)
    output = workspace.run(status=1)
    assert told in output
    assert "Traceback" not in output
    assert not [*(workspace.folder / ".snakemake" / "submitit").glob("*/*/allocation.json")]
