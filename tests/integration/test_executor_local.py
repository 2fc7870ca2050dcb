"""The executor with real `snakemake` and allocations that are processes on this machine."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.processes import HANG_S, wait_for_end

pytestmark = pytest.mark.crowded

TOY = Path(__file__).parent / "executor"


def toy_path() -> str:
    """The toy workflow's modules, before those that this process was told of."""
    return os.pathsep.join(filter(None, (str(TOY), os.environ.get("PYTHONPATH"))))


class Workspace:
    """A folder in which the toy workflow runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "acts").mkdir()
        self.processes: list[subprocess.Popen[bytes]] = []

    def plan(self, **plan: Any) -> None:
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def set_acts(self, **acts: str) -> None:
        for cell, act in acts.items():
            (self.folder / "acts" / cell).write_text(act)

    def start(
        self, *arguments: str, idle_timeout: int = 20, python: Path | str = sys.executable
    ) -> subprocess.Popen[bytes]:
        command = [
            *(str(python), "-m", "snakemake", "--snakefile", str(TOY / "Snakefile")),
            *("--executor", "submitit", "--submitit-cluster", "local"),
            *("--submitit-service", "toy_service:serve"),
            *("--submitit-idle-timeout", str(idle_timeout)),
            *("--jobs", "100", "--keep-going", "--nocolor", *arguments),
        ]
        with self.output.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": toy_path()},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    @property
    def output(self) -> Path:
        return self.folder / "output.log"

    def end(self, process: subprocess.Popen[bytes], status: int) -> str:
        output = wait_for_end(process, self.output)
        assert process.returncode == status, output
        return output

    def run(self, *arguments: str, status: int = 0, idle_timeout: int = 20) -> str:
        return self.end(self.start(*arguments, idle_timeout=idle_timeout), status)

    def outputs(self) -> dict[str, int]:
        found = [*self.folder.glob("out/*"), *self.folder.glob("alone/*")]
        return {path.name: path.stat().st_mtime_ns for path in found}

    def notes(self, file: str, event: str) -> list[dict[str, Any]]:
        path = self.folder / f"{file}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [note for note in map(json.loads, lines) if note["event"] == event]

    def service_starts(self) -> list[str]:
        return [note["name"] for note in self.notes("service", "enter")]

    def started(self) -> list[str]:
        return [note["cell"] for note in self.notes("cells", "begin")]

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + HANG_S
        while not condition():
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)

    def survivors(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Workspace]:
    work = Workspace(tmp_path)
    yield work
    left = [process.cmdline() for process in work.survivors()]
    for process in work.survivors():
        process.kill()
    for child in work.processes:
        child.wait()
    assert left == []


@pytest.mark.slow
def test_only_missing_jobs_run(work: Workspace) -> None:
    odd = "../ü $x/"
    work.plan(out={"a": 3, "b": 2}, alone={"x": 1}, prefix=odd)
    output = work.run(idle_timeout=0)
    first = work.outputs()
    assert sorted(first) == ["a0", "a1", "a2", "b0", "b1", "x0"]
    assert sorted(work.service_starts()) == [f"{odd}a", f"{odd}b"]
    assert output.count(f"Allocation {odd}a: submitted") == 1
    assert f"Allocation {odd}a: ended; 3 of 3 jobs done." in output

    assert "Nothing to be done" in work.run()
    (work.folder / "out" / "a1").unlink()
    work.run()
    assert {cell for cell, at in work.outputs().items() if first[cell] != at} == {"a1"}
    assert len(work.service_starts()) == 3

    begins, ends = work.notes("cells", "begin"), work.notes("cells", "end")
    assert len({note["pid"] for note in begins}) == 7
    assert all(note["is_the_job"] for note in begins)  # ADR 6: no further process
    assert not any(note["service_imported"] for note in begins)
    assert all(note["usr2_blocked"] for note in begins)
    for note in begins:
        expected = None if note["cell"] == "x0" else odd + note["cell"][0]
        assert note["allocation"] == expected
    for name in "ab":
        spans = [(note["begin"], note["end"]) for note in ends if note["cell"][0] == name]
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    service = work.notes("service", "enter")[0]
    group = service["name"][-1]
    assert service["params"] == {"version": 1, "group": group, "start_s": 0}
    assert service["resources"]["allocation"] == service["name"]
    assert "measuring a0" in (work.folder / "logs" / "a0.log").read_text()


@pytest.mark.slow
def test_a_failing_job_does_not_affect_others(work: Workspace) -> None:
    work.plan(out={"a": 4}, alone={"x": 1})
    work.set_acts(a1="fail", x0="fail")
    output = work.run("--retries", "1", "--submitit-max-allocations", "2", "--jobs", "3", status=1)
    assert sorted(work.outputs()) == ["a0", "a2", "a3"]
    assert work.service_starts() == ["a"]
    assert work.started().count("a1") == 2
    assert (work.folder / "logs" / "a1.log").read_text().count("measuring a1") == 1
    log = next(word for word in output.split() if word.endswith(".log") and "/logs/0" in word)
    assert "measuring x0" in Path(log).read_text(encoding="utf-8")

    kept = work.outputs()
    work.set_acts(a1="0", x0="0")
    work.run()
    assert kept.items() <= work.outputs().items()
    assert sorted(work.started()[-2:]) == ["a1", "x0"]


def test_a_lost_allocation_is_continued(work: Workspace) -> None:
    work.plan(out={"a": 5})
    work.set_acts(a2="30")
    process = work.start()
    work.wait(lambda: "a2" in work.started())
    work.set_acts(a2="0")
    os.kill(work.notes("service", "up")[0]["pid"], signal.SIGKILL)
    output = work.end(process, 0)
    assert (
        "Allocation a: was killed; 2 of 5 jobs done. Another allocation runs 3 remaining jobs."
        in output
    )
    assert len(work.outputs()) == 5
    # The job that ran comes last: it may have been the cause.
    assert work.started() == ["a0", "a1", "a2", "a3", "a4", "a2"]
    assert work.service_starts() == ["a", "a"]


@pytest.mark.slow
def test_a_job_that_kills_its_allocation_fails_alone(work: Workspace) -> None:
    work.plan(out={"a": 3})
    work.set_acts(a1="crash")
    output = work.run(status=1)
    assert sorted(work.outputs()) == ["a0", "a2"]
    assert work.started() == ["a0", "a1", "a2", "a1", "a1"]
    assert "Allocation a: was killed; 0 of 1 job done" in output
    assert output.count("Jobs not done: 1 of measure.") == 1


@pytest.mark.slow
def test_an_unhealthy_service_gets_no_more_jobs(work: Workspace) -> None:
    work.plan(out={"a": 4})
    work.set_acts(a1="sicken")
    output = work.run(status=1)
    assert sorted(work.outputs()) == ["a0", "a2", "a3"]
    assert (
        "no longer healthy; 2 of 4 jobs done. Another allocation runs 2 remaining jobs." in output
    )
    assert [note["name"] for note in work.notes("service", "down")] == ["a", "a"]


@pytest.mark.slow
def test_a_service_that_does_not_start_is_one_error(work: Workspace) -> None:
    work.plan(out={"a": 3, "b": 2})
    (work.folder / "refuse-a").write_text("tiny")
    output = work.run(status=1)
    assert sorted(work.outputs()) == ["b0", "b1"]
    assert sorted(work.service_starts()) == ["a", "b"]
    assert "Allocation a: its service did not start; 0 of 3 jobs done." in output
    head, _, summary = output.partition("Allocations:")
    assert head.count("RuntimeError: no such model: tiny") == 1
    assert summary.count("Not done in a: RuntimeError: no such model: tiny") == 1
    assert output.count("Jobs not done: 3 of measure.") == 1
    assert "Error in rule" not in output
    assert "Traceback" not in output
    (log,) = {line.split()[-1] for line in output.splitlines() if line.strip().startswith("Log: ")}
    assert "Traceback" in Path(log).read_text(encoding="utf-8")


@pytest.mark.slow
def test_retries_of_jobs_restart_their_service(work: Workspace) -> None:
    work.plan(out={"a": 2})
    (work.folder / "refuse-a").write_text("tiny")
    output = work.run("--retries", "1", status=1)
    assert work.service_starts() == ["a", "a"]
    head, _, summary = output.partition("Allocations:")
    assert head.count("RuntimeError: no such model: tiny") == 2
    assert summary.count("RuntimeError: no such model: tiny") == 1


@pytest.mark.slow
def test_after_the_time_limit_another_allocation_continues(work: Workspace) -> None:
    work.plan(out={"a": 3})
    work.set_acts(a1="wait")
    process = work.start()
    work.wait(lambda: "a1" in work.started())
    os.kill(work.notes("service", "up")[0]["pid"], signal.SIGUSR2)
    # Not before: else a1 may end before the allocation acts on the signal.
    work.wait(lambda: len(work.notes("service", "down")) == 1)
    (work.folder / "go").touch()
    output = work.end(process, 0)
    assert (
        "reached its time limit; 1 of 3 jobs done. Another allocation runs 2 remaining jobs."
        in output
    )
    assert work.started() == ["a0", "a1", "a2", "a1"]
    assert len(work.notes("service", "down")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_everything(work: Workspace, number: signal.Signals) -> None:
    work.plan(out={"a": 3}, alone={"x": 1})
    work.set_acts(a1="spawn")
    process = work.start()
    work.wait(lambda: "a1" in work.started())
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)  # as a batch system or systemd does
    output = work.end(process, 1)
    assert "Allocation a: cancelled." in output
    assert work.survivors() == []
    assert len(work.notes("service", "down")) == 1
    assert sorted(work.outputs()) == ["a0"]
    work.set_acts(a1="0")
    work.run()
    assert sorted(work.outputs()) == ["a0", "a1", "a2", "x0"]


@pytest.mark.slow
def test_a_terminated_allocation_stops_its_service_and_job(work: Workspace) -> None:
    work.plan(out={"a": 2})
    work.set_acts(a0="spawn")
    process = work.start()
    work.wait(lambda: "a0" in work.started())
    os.kill(work.notes("service", "up")[0]["pid"], signal.SIGTERM)
    output = work.end(process, 1)
    assert "Allocation a: was stopped by SIGTERM; 0 of 2 jobs done" in output
    assert len(work.notes("service", "down")) == 1
    assert work.outputs() == {}


def test_a_python_in_a_path_with_spaces_is_refused_before_anything_runs(work: Workspace) -> None:
    environment = work.folder / "my env"
    environment.symlink_to(sys.prefix)
    work.plan(out={"a": 1})
    process = work.start(python=environment / "bin" / "python")
    output = work.end(process, 1)
    assert "my env/bin/python: Snakemake cannot run scripts with this Python" in output
    assert "Create the environment in a folder whose path has only" in output
    assert work.started() == []


def test_a_container_runs_the_service_and_the_jobs(
    work: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A script in the place of apptainer notes its arguments and runs the command behind them."""
    programs = tmp_path_factory.mktemp("programs")
    log, image = programs / "log", programs / "engine.sif"
    image.touch()
    (programs / "apptainer").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >>{log}\nshift\n'
        'while [ "${1#--}" != "$1" ]; do shift; done\nshift\nIN_CONTAINER=yes exec "$@"\n',
        encoding="utf-8",
    )
    (programs / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    kinds = {"toy": {"container": {"image": str(image)}, "python": sys.executable}}
    (work.folder / "kinds.yaml").write_text(json.dumps(kinds), encoding="utf-8")
    work.plan(out={"a": 2})
    process = work.start("--submitit-kinds", "kinds.yaml")
    work.end(process, 0)
    assert sorted(work.outputs()) == ["a0", "a1"]
    arguments = log.read_text(encoding="utf-8").splitlines()
    assert arguments[0] == "exec"
    assert "--nv" not in arguments
    assert f"--bind={work.folder}" in arguments  # the results, the queue and the logs
    assert f"--bind={TOY}" in arguments  # the Snakefile and its modules
    assert arguments[arguments.index(str(image)) + 1] == sys.executable
    assert arguments.count("exec") == 1  # one start for the service and both jobs
    image.unlink()
    work.plan(out={"b": 1})
    output = work.end(work.start("--submitit-kinds", "kinds.yaml"), 1)
    assert "toy.container.image: " in output
    assert "engine.sif does not exist. Build it, or correct the path." in output


def kill_main_process(work: Workspace, process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert "LockException" in work.run(status=1)
    unlock = [sys.executable, "-m", "snakemake_executor_plugin_submitit", "unlock"]
    output = subprocess.run(
        unlock, cwd=work.folder, check=True, timeout=HANG_S, capture_output=True
    )
    assert (output.stdout, output.stderr) == (
        b"Removed the lock of a killed Snakemake process.\n",
        b"",
    )


@pytest.mark.slow
def test_a_new_run_continues_the_allocations_of_a_killed_one(work: Workspace) -> None:
    work.plan(out={"a": 4}, alone={"x": 1})
    work.set_acts(a1="wait", x0="wait")
    process = work.start("--submitit-max-allocations", "2")
    work.wait(lambda: {"a1", "x0"} <= set(work.started()))
    kill_main_process(work, process)
    process = work.start("--submitit-max-allocations", "2")
    work.wait(lambda: work.output.read_text().count("of an earlier run is still active") == 2)
    (work.folder / "go").touch()
    output = work.end(process, 0)
    assert "is still active and runs 3 jobs of this run." in output
    assert len(work.outputs()) == 5
    assert sorted(work.started()) == ["a0", "a1", "a2", "a3", "x0"]
    assert work.service_starts() == ["a"]
    assert "Nothing to be done" in work.run()


@pytest.mark.slow
def test_allocations_of_a_killed_run_finish_their_jobs(work: Workspace) -> None:
    work.plan(out={"a": 3})
    work.set_acts(a0="wait")
    process = work.start(idle_timeout=1)
    work.wait(lambda: "a0" in work.started())
    kill_main_process(work, process)
    (work.folder / "go").touch()
    work.wait(lambda: not work.survivors())
    kept = work.outputs()
    assert len(kept) == 3
    assert "Nothing to be done" in work.run()
    assert work.outputs() == kept


@pytest.mark.slow
def test_an_unneeded_allocation_of_a_killed_run_starts_no_more_jobs(work: Workspace) -> None:
    work.plan(out={"a": 5})
    work.set_acts(a1="wait")
    process = work.start(idle_timeout=1)
    work.wait(lambda: "a1" in work.started())
    kill_main_process(work, process)
    work.plan(out={"b": 1})
    process = work.start()
    work.wait(lambda: "Execute 1 jobs" in work.output.read_text())
    (work.folder / "go").touch()
    work.end(process, 0)
    assert sorted(work.outputs()) == ["a0", "a1", "b0"]
    assert work.started() == ["a0", "a1", "b0"]


@pytest.mark.slow
def test_a_job_that_runs_with_other_params_is_repeated(work: Workspace) -> None:
    work.plan(out={"a": 1})
    work.set_acts(a0="wait")
    process = work.start()
    work.wait(lambda: "a0" in work.started())
    kill_main_process(work, process)
    work.plan(out={"a": 1}, version=2)
    process = work.start()
    work.wait(lambda: "of an earlier run is still active" in work.output.read_text())
    (work.folder / "go").touch()
    work.end(process, 0)
    assert (work.folder / "out" / "a0").read_text() == "2\n"
    assert work.started() == ["a0", "a0"]
    assert work.service_starts() == ["a"]


@pytest.mark.slow
def test_the_kinds_file_is_relative_to_the_launch_folder(work: Workspace) -> None:
    inside = work.folder / "inside"
    (inside / "acts").mkdir(parents=True)
    (inside / "plan.json").write_text(json.dumps({"out": {"a": 1}}))
    (work.folder / "kinds.yaml").write_text("toy: {}\n")
    work.run("--directory", "inside", "--submitit-kinds", "kinds.yaml")
    assert (inside / "out" / "a0").exists()


@pytest.mark.slow
def test_logger_plugins_receive_the_states_of_allocations(work: Workspace) -> None:
    work.plan(out={"a": 2, "b": 1})
    work.set_acts(a0="3")
    (work.folder / "refuse-b").write_text("tiny")
    work.run("--logger", "recorder", status=1)
    lines = (work.folder / "allocations.jsonl").read_text().splitlines()
    data = [json.loads(line) for line in lines]
    keys = ["name", "state", "node", "reason", "done", "total", "eta_s"]
    assert all(list(each) == keys for each in data)
    states = {
        name: list(dict.fromkeys(each["state"] for each in data if each["name"] == name))
        for name in "ab"
    }
    assert states["a"][0] == "pending"
    assert states["a"][-2:] == ["running", "ended"]
    assert states["b"][-1] == "failed"
    last = {each["name"]: each for each in data}
    assert (last["a"]["done"], last["a"]["total"]) == (2, 2)
    assert last["b"]["reason"] == "its service did not start"


REFUSED = {
    "cluster": (["--submitit-cluster", "slrum"], "`slrum` is unknown. Use one of: slurm, local"),
    "allocations": (["--submitit-max-allocations", "0"], "0 is less than 1"),
    "precommand": (["--precommand", "true"], "Write the command under `setup`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_setting_is_refused_before_anything_starts(work: Workspace, case: str) -> None:
    arguments, message = REFUSED[case]
    work.plan(out={"a": 1})
    output = work.run(*arguments, status=1)
    assert message in output
    assert "Traceback" not in output
    assert work.started() == []


def test_an_unknown_kind_is_refused_by_name(work: Workspace) -> None:
    work.plan(out={"a": 2}, kind="a101")
    (work.folder / "kinds.yaml").write_text("a100: {gpus_per_node: 2}\n")
    output = work.run("--submitit-kinds", "kinds.yaml", status=1)
    assert "kind `a101` is not in" in output
    assert "Use one of: a100." in output
    assert work.started() == work.service_starts() == []
