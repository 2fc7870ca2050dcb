"""The whole workflow on a real engine: llama.cpp, which starts in under a second."""

from __future__ import annotations

import json
import os
import re
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

from helpers.deployments import EMULATED_ENTRY
from servegrid.node import processes
from servegrid.records import columns, parquet
from servegrid.study.config import parse_study

pytestmark = [pytest.mark.crowded, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
DEPLOYMENT = "tiny_q4_1_llamacpp_cpu"
MEASURED = "results/tables/cells.parquet"
"""A target that needs all cells, and not the figures and the page."""
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
    """A folder with a study, in which Snakemake runs as users run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "study.yaml"
        self.study = json.loads(json.dumps(STUDY))
        self.output = folder / "output.txt"
        self.processes: list[subprocess.Popen[bytes]] = []

    def command(self, *arguments: str) -> list[str]:
        self.config.write_text(yaml.safe_dump(self.study))
        return [
            *(sys.executable, "-m", "snakemake", *arguments),
            *("--snakefile", str(ROOT / "Snakefile"), "--directory", str(self.folder)),
            *("--profile", str(ROOT / "profiles" / "local"), "--configfile", str(self.config)),
        ]

    def run(self, *arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            self.command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        output = done.stdout + done.stderr
        assert done.returncode == status, output
        return output

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
        """The measured trials, each with the time when its record was written."""
        found = (self.folder / "results" / "cells").glob("*/*/*/requests.parquet")
        return {
            str(each.parent.relative_to(self.folder)): each.stat().st_mtime_ns for each in found
        }

    def repeated(self, kept: dict[str, int]) -> set[str]:
        """The cells in `kept` that have been measured again."""
        now = self.cells()
        return {trial for trial in kept if now[trial] != kept[trial]}

    def engine_starts(self) -> int:
        return len({record["environment"]["started"] for record in self.records()})

    def records(self) -> list[dict[str, Any]]:
        return [parquet.read_record(self.folder / c / "requests.parquet") for c in self.cells()]

    def wait_for_cells(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.cells()) < count:
            assert time.monotonic() < deadline, f"{len(self.cells())} cells after 120 s"
            time.sleep(0.02)

    def survivors(self) -> list[psutil.Process]:
        """Processes that run in this folder or have it in their command line."""
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
    """The cell that was written last; its job may still run."""
    return max(cells, key=lambda trial: cells[trial])


def abandoned_shared_memory() -> set[str]:
    """Shared memory that no process has mapped, because other tests may run at the same time."""
    mapped = processes.shared_memory_files(psutil.process_iter())
    return {file.name for file in processes.SHARED_MEMORY.iterdir() if file not in mapped}


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
    # Engines of other tests also start and end: a segment of theirs is abandoned for a moment.
    deadline = time.monotonic() + 60
    while left := abandoned_shared_memory() - shared_memory:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


@pytest.mark.slow
def test_only_missing_new_and_changed_cells_are_measured_again(workspace: Workspace) -> None:
    output = workspace.run()
    first = workspace.cells()
    assert len(first) == 4
    assert workspace.engine_starts() == 1
    table = pq.read_table(workspace.folder / "results/tables/cells.parquet").to_pandas()
    assert list(table.columns) == [column.name for column in columns.CELLS]
    assert set(table["verdict"]) == {"ok"}
    check_short_output(output, workspace, valid=int(table["valid"].sum()))
    check_job_logs(workspace)
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
    workspace.run(MEASURED)
    third = workspace.cells()
    assert {trial for trial in third if third[trial] != second.get(trial)} == {
        f"results/cells/{DEPLOYMENT}/burst-c4-i{length}-o5/trial-1" for length in (31, 40)
    }

    workspace.study["workload"]["prompts"] = "identical"
    workspace.run(MEASURED)
    fourth = workspace.cells()
    assert {trial for trial in fourth if fourth[trial] == third[trial]} == set()

    # Neither another limit of the site nor a comment in the study changes a cell.
    output = workspace.run(
        MEASURED, "--set-resources", "measure:runtime=30", "measure:startup_s=77"
    )
    assert "Nothing to be done" in output
    workspace.config.write_text(workspace.config.read_text() + "\n# a comment\n")
    assert "Nothing to be done" in workspace.run(MEASURED)


def check_short_output(output: str, workspace: Workspace, valid: int) -> None:
    """A run without a terminal says in few lines what it does and what came out."""
    lines = output.splitlines()
    assert len(lines) < 30, output
    assert any("To do: 4 measurements on 1 deployment" in line for line in lines)
    assert any(line.endswith(f"{DEPLOYMENT}: done, 4 measurements") for line in lines)
    assert f"Valid cells: {valid} of 4." in output
    page = workspace.folder / "results" / "report" / "index.html"
    assert lines[-1] == f"Results on one page: {os.path.relpath(page, ROOT)}"
    assert not re.search("rule |jobid|Select jobs|Finished", output)


def check_job_logs(workspace: Workspace) -> None:
    """A job's log has its own output and Snakemake's, not the progress of the whole run."""
    logs = [*(workspace.folder / "results/logs/cells").rglob("*.log")]
    assert len(logs) == 4
    for log in logs:
        text = log.read_text()
        assert "requests.parquet: ok" in text
        assert "Execute 1 jobs" in text
        assert "measurement" not in text and "\x1b" not in text


def test_a_dry_run_counts_what_would_run(workspace: Workspace) -> None:
    output = workspace.run("--dry-run")
    assert re.search(rf"4 measurements to do:\n  4  {DEPLOYMENT}\n", output)
    assert re.search(r"other jobs to run: .*gather", output)
    assert "nothing was started" in output
    assert len(output.splitlines()) < 8
    assert workspace.cells() == {}


def test_the_jobs_for_tables_and_figures_do_not_grow_with_the_study(workspace: Workspace) -> None:
    """Each of them makes Snakemake search all records, so a plan would grow with the square."""
    (deployment,) = workspace.study["deployments"]
    workspace.study["deployments"] = [deployment | {"name": f"d{number}"} for number in range(30)]
    output = workspace.run("--dry-run", "--verbose")
    assert re.search(r"^measure +120$", output, re.MULTILINE)
    assert re.search(r"^total +129$", output, re.MULTILINE)


def test_an_unknown_cell_is_refused_by_its_name(workspace: Workspace) -> None:
    output = workspace.run("--dry-run", "results/cells/typo/x/trial-1/requests.parquet", status=1)
    assert "The study has no trial 'typo/x/trial-1'." in output


def test_a_deleted_record_is_missed_though_the_tables_are_there(workspace: Workspace) -> None:
    trials = parse_study(workspace.study).all_trials
    for trial in trials:
        folder = workspace.folder / "results/cells" / trial.id
        folder.mkdir(parents=True)
        for name in ("requests.parquet", "telemetry.parquet"):
            (folder / name).touch()
    (workspace.folder / "results/tables").mkdir()
    for name in ("cells.parquet", "cells.csv", "drift_checks.csv"):
        (workspace.folder / "results/tables" / name).touch()
    output = workspace.run("--dry-run")
    assert "to do" not in output
    assert not re.search(r"other jobs to run: .*gather", output)

    (workspace.folder / "results/cells" / trials[0].id / "telemetry.parquet").unlink()
    output = workspace.run("--dry-run")
    assert "1 measurement to do" in output
    assert re.search(r"other jobs to run: .*gather", output)


def test_verbose_shows_snakemakes_own_output(workspace: Workspace) -> None:
    output = workspace.run("--dry-run", "--verbose")
    assert "rule measure:" in output
    assert "Job stats:" in output
    assert "measurements to do" not in output


@pytest.mark.slow
def test_a_failed_cell_is_shown_with_its_log(workspace: Workspace) -> None:
    workspace.study["workload"] |= {"concurrency": [1], "input_len": [31]}
    (trial,) = parse_study(workspace.study).trials
    blocked = workspace.folder / "results" / "cells" / trial.id / "telemetry.parquet"
    (blocked / "in the way").mkdir(parents=True)
    output = workspace.run(status=1)
    assert f"Rule measure failed for {trial.id}: " in output
    assert f"Log, last lines: results/logs/cells/{trial.id}.log" in output
    assert "telemetry.parquet" in output.partition("Log, last lines:")[2]
    assert "Not finished: 0 of 1 measurement done" in output
    assert output.splitlines()[-1] == "To resume, run the same command again."


@pytest.mark.slow
def test_a_cell_of_another_specification_is_refused_by_name(workspace: Workspace) -> None:
    workspace.study["workload"] = {"concurrency": [1], "input_len": [31], "output_len": 5}
    workspace.run(MEASURED)
    (trial,) = parse_study(workspace.study).trials
    stale = workspace.folder / "results/cells" / trial.id / "requests.parquet"
    table = pq.read_table(stale)
    record = parquet.read_record(stale) | {"spec_digest": "0" * 16}
    schema = parquet.arrow_schema(columns.REQUESTS, record)
    parquet.write_table(table.replace_schema_metadata(schema.metadata), stale)
    output = workspace.run(MEASURED, status=1)
    assert trial.id in output
    assert "Traceback" not in output


@pytest.mark.chaos
@pytest.mark.slow
def test_a_killed_allocation_is_continued_by_the_same_command(workspace: Workspace) -> None:
    workspace.study["workload"] |= {"concurrency": [1, 2, 3, 4], "output_len": 20}
    process = workspace.start(MEASURED)
    workspace.wait_for_cells(2)
    kept = workspace.cells()
    allocation = next(
        each for each in workspace.survivors() if "submitit.core._submit" in each.cmdline()
    )
    allocation.kill()
    assert process.wait(200) == 0, workspace.output.read_text()
    assert len(workspace.cells()) == 8
    assert workspace.repeated(kept) <= {latest(kept)}
    assert workspace.engine_starts() == 2


@pytest.mark.slow
@pytest.mark.chaos
def test_a_run_whose_main_process_was_killed_is_continued(workspace: Workspace) -> None:
    workspace.study["workload"] |= {"concurrency": [1, 2, 3, 4], "output_len": 20}
    process = workspace.start(MEASURED)
    workspace.wait_for_cells(2)
    process.kill()
    process.wait()
    kept = workspace.cells()
    workspace.run("--unlock")
    workspace.run(MEASURED)
    assert len(workspace.cells()) == 8
    assert workspace.repeated(kept) <= {latest(kept)}
    assert workspace.engine_starts() == 1


@pytest.mark.slow
@pytest.mark.chaos
def test_an_interrupt_leaves_no_process_and_no_partial_file(
    workspace: Workspace,
) -> None:
    workspace.study["workload"] |= {"concurrency": [1, 2, 3, 4], "output_len": 20}
    process = workspace.start(MEASURED)
    workspace.wait_for_cells(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    output = workspace.output.read_text()
    assert "Interrupted. Stopping engines and allocations" in output
    assert output.splitlines()[-1] == "To resume, run the same command again."
    assert "Traceback" not in output
    workspace.wait_until_gone()
    assert all(record["verdict"] == "ok" for record in workspace.records())
    workspace.run(MEASURED)
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
    change, expected = BAD_INPUT[case]
    change(workspace.study)
    output = workspace.run(status=1)
    assert expected in output
    assert "Traceback" not in output
    assert not [*(workspace.folder / ".snakemake" / "submitit").glob("*/*/allocation.json")]


FAULTY: dict[str, Any] = {
    "study": "faulty",
    "workload": {
        "concurrency": [1, 2, 4],
        "input_len": [31, 63],
        "prompts": "identical",
        "order": "light_to_heavy",
        "idle_timeout_s": 1,
    },
    "deployments": [
        EMULATED_ENTRY
        | {
            "name": name,
            "max_model_len": 4096 if name != "short" else 131,
            "engine_args": {
                "timing": "inria-2024",
                "time_scale": 0.005,
                "faults": [{"kind": name, **when}] if name != "short" else [],
            },
        }
        for name, when in {
            "oom_at_start": {},
            "oom": {"concurrency": 2, "input_len": 63},
            "die": {"concurrency": 4},
            "http_500": {"concurrency": 2},
            "stall": {"concurrency": 4, "input_len": 63},
            "short": {},
        }.items()
    ],
}
"""Each fault of the emulated engine, in a deployment of this name."""

DOMINATED = {
    "oom_at_start": {},
    "oom": {"burst-c4-i63-o100": "burst-c2-i63-o100/trial-1: oom"},
    "die": {"burst-c4-i63-o100": "burst-c4-i31-o100/trial-1: server_died"},
    "http_500": {
        "burst-c2-i63-o100": "burst-c2-i31-o100/trial-1: http_error",
        "burst-c4-i31-o100": "burst-c2-i31-o100/trial-1: http_error",
        "burst-c4-i63-o100": "burst-c2-i31-o100/trial-1: http_error",
    },
    "stall": {},
    "short": {},
}


@pytest.mark.chaos
def test_each_fault_gives_its_verdict_and_the_rest_goes_on(workspace: Workspace) -> None:
    workspace.study = FAULTY
    # `die` and `oom` each need a second engine, `die` a third one for its second try.
    output = workspace.run(MEASURED, "--submitit-kinds", str(kinds_of(workspace)))
    table = pq.read_table(workspace.folder / MEASURED).to_pandas()
    assert len(table) == 36
    verdicts: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        cell = f"burst-c{row['concurrency']}-i{row['input_len']}-o100"
        verdicts.setdefault(row["deployment"], {})[cell] = row["verdict"]
        if row["verdict"] == "not_run":
            cause = DOMINATED[row["deployment"]][cell]
            assert row["verdict_detail"] == f"dominated by {cause}"
    cells = {f"burst-c{users}-i{length}-o100" for users in (1, 2, 4) for length in (31, 63)}
    expected: dict[str, dict[str, str]] = {
        name: dict.fromkeys(cells, "ok") | dict.fromkeys(pruned, "not_run")
        for name, pruned in DOMINATED.items()
    }
    expected["oom_at_start"] = dict.fromkeys(cells, "oom_at_start")
    expected["oom"]["burst-c2-i63-o100"] = "oom"
    expected["die"]["burst-c4-i31-o100"] = "server_died"
    expected["http_500"]["burst-c2-i31-o100"] = "http_error"
    expected["stall"]["burst-c4-i63-o100"] = "timeout"
    expected["short"] |= {cell: "unsupported" for cell in cells if "-i63-" in cell}
    assert verdicts == expected
    starts = {
        name: {each["environment"]["started"] for each in workspace.records() if of(each, name)}
        for name in expected
    }
    # An engine that ran out of memory said so; one that died for an unknown reason is tried again.
    assert {name: len(found - {None}) for name, found in starts.items()} == {
        "oom_at_start": 1, "oom": 2, "die": 3, "http_500": 1, "stall": 1, "short": 1
    }  # fmt: skip
    assert "6 oom_at_start: raise gpu_count" in output
    finished = workspace.cells()
    assert "Nothing to be done" in workspace.run(MEASURED)
    assert workspace.cells() == finished


def of(record: dict[str, Any], deployment: str) -> bool:
    name: str = record["spec"]["deployment"]["name"]
    return name == deployment


def kinds_of(workspace: Workspace) -> Path:
    """A file of kinds with a node for the faulty deployments on this machine."""
    file = workspace.folder / "kinds.yaml"
    file.write_text(yaml.safe_dump({"v100-16gb": {}}), encoding="utf-8")
    return file
