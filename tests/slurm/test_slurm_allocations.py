"""Allocations on a real Slurm with toy cells: lost, preempted, refused and delayed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time

import pytest

from helpers.cluster import SCHEDULER_PARAMETERS, Options
from slurm.conftest import GPU, KIND, Workspace, with_options

pytestmark = pytest.mark.crowded

PREEMPTIBLE = KIND | {"slurm_partition": "preempt", "slurm_constraint": "a100"}
V100 = KIND | {"slurm_constraint": "sirocco&v100"}


def names(prefix: str, count: int) -> set[str]:
    return {f"{prefix}{number}" for number in range(count)}


@with_options(Options(), Options(accounting=True))
def test_every_allocation_has_a_node_and_slurm_s_record_is_kept(work: Workspace) -> None:
    work.plan(out={"a": 3, "b": 3})
    output = work.run()
    assert work.outputs() == names("a", 3) | names("b", 3)
    assert work.service_starts() == 2
    assert "Total: 6 of 6 jobs done" in output
    assert "2 service starts, 0 job restarts" in output
    records = work.records()
    assert {each["allocation"]["name"] for each in records} == {"a", "b"}
    for each in records:
        assert each["slurm"]["JobId"] == each["allocation"]["job_id"]
        assert each["slurm"]["NodeList"].startswith("sirocco")
        assert each["slurm"]["Restarts"] == "0"
        assert each["slurm"]["ExitCode"] == "0:0"
        assert (each["jobs_assigned"], each["jobs_finished"]) == (3, 3)
    assert work.queue() == []


def test_after_the_loss_of_a_node_only_the_running_cell_is_repeated(work: Workspace) -> None:
    work.plan(out={"a": 4})
    work.set_acts(a2="wait")
    run = work.start()
    work.wait_started("a2")
    [(job, _, node)] = work.queue()
    work.cluster.lose_node(node)
    # Slurm requeues it on another node.
    work.wait(lambda: work.started().count("a2") == 2)
    [(again, _, other)] = work.queue()
    assert (again, other != node) == (job, True)
    (work.folder / "go").touch()
    output = work.end(run)
    assert work.outputs() == names("a", 4)
    assert sorted(work.started()) == ["a0", "a1", "a2", "a2", "a3"]
    assert "1 job restart" in output
    assert work.records()[0]["slurm"]["Restarts"] == "1"


def test_a_job_that_slurm_holds_after_a_failed_launch_is_submitted_again(work: Workspace) -> None:
    work.kinds(toy=V100)
    work.plan(out={"a": 2})
    work.cluster.spoil_node("sirocco14")
    output = work.run()
    assert work.outputs() == names("a", 2)
    assert "is held by Slurm after a failed launch; 0 of 2 jobs done" in output
    assert work.queue() == []
    held, done = sorted(work.records(), key=lambda each: each["jobs_finished"])
    assert (held["state"], done["jobs_finished"]) == ("LAUNCH_FAILED", 2)


@with_options(
    Options(
        parameters={
            "SchedulerParameters": f"{SCHEDULER_PARAMETERS},nohold_on_prolog_fail,"
            "max_batch_requeue=1"
        }
    )
)
def test_a_job_whose_launch_fails_again_and_again_is_done_at_last(work: Workspace) -> None:
    """Slurm 22.05 tries without end; from 23.02 on, it holds the job for a reason of its own."""
    nodes = ("sirocco14", "sirocco15")
    has_limit = work.cluster.call("sinfo", "-V").split()[1] >= "23.02"
    work.kinds(toy=V100)
    work.plan(out={"a": 2})
    for node in nodes:
        work.cluster.spoil_node(node)
    process = work.start()

    def reason() -> str:
        for node in nodes:  # Slurm drains a node whose prolog fails
            work.cluster.call("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return work.cluster.call("squeue", "-h", "-o", "%r").lower().replace("_", " ")

    if has_limit:
        work.wait(lambda: "launch failure limit exceeded requeued held" in reason(), limit_s=120)
    else:
        work.wait(lambda: "begintime" in reason())  # it has been requeued
    for node in nodes:
        (work.cluster.folder / f"spoilt-{node}").unlink()
    work.wait(lambda: reason() is not None and process.poll() is not None, limit_s=120)
    output = work.end(process)
    assert work.outputs() == names("a", 2)
    assert ("is held by Slurm after a failed launch; 0 of 2 jobs done" in output) is has_limit


def preempted(work: Workspace) -> subprocess.Popen[bytes]:
    """A run in the preemptible partition that loses its node during a cell."""
    work.kinds(toy=PREEMPTIBLE)
    work.plan(out={"a": 4})
    work.set_acts(a1="wait")
    run = work.start()
    work.wait_started("a1")
    [(_, _, node)] = work.queue()
    work.cluster.call(
        *("sbatch", "--partition=routage", f"--nodelist={node}", "--exclusive", "--mem=0"),
        *("--output=/dev/null", "--time=1", "--wrap=sleep 4"),
    )
    return run


@with_options(
    Options(),
    Options(grace_s=30, preempt_sends_user_signal=True),
    Options(preempt_mode="CANCEL"),
    Options(preempt_mode="CANCEL", grace_s=30, preempt_sends_user_signal=True),
)
def test_after_a_preemption_at_most_the_running_cell_is_repeated(work: Workspace) -> None:
    run = preempted(work)
    work.wait(lambda: work.started().count("a1") == 2, limit_s=150)
    (work.folder / "go").touch()
    work.end(run)
    assert work.outputs() == names("a", 4)
    assert sorted(work.started()) == ["a0", "a1", "a1", "a2", "a3"]
    assert work.service_starts() == 2


@pytest.mark.slow
def test_after_the_time_limit_more_allocations_continue(work: Workspace) -> None:
    # Nine cells of 8 s do not fit into a minute. Slurm warns up to a minute before its end, and an
    # allocation without a finished cell would end the run.
    work.plan(out={"a": 9})
    work.set_acts(**dict.fromkeys(names("a", 9), "8"))
    output = work.run(runtime=1)
    assert work.outputs() == names("a", 9)
    assert work.service_starts() >= 2
    assert "reached its time limit" in output
    # Each allocation that ended early has repeated one cell.
    assert len(work.started()) <= 9 + work.service_starts() - 1


def test_slurm_is_asked_for_the_time_of_the_missing_cells(work: Workspace) -> None:
    expected = dict.fromkeys(names("a", 4), 60)
    work.plan(out={"a": 4}, expected_s=expected, expected_start_s=30)
    work.run()
    # 30 + 4 × 60 + 60 (warning) + 90 (it comes early) = 420 s
    assert [each["slurm"]["TimeLimit"] for each in work.records()] == ["00:07:00"]
    for cell in ("a1", "a2"):
        (work.folder / "out" / cell).unlink()
    output = work.run()
    # 30 + 2 × 60 + 150 = 300 s
    assert {each["slurm"]["TimeLimit"] for each in work.records()} == {"00:07:00", "00:05:00"}
    assert "time limit" not in output


def test_an_allocation_that_needs_more_than_the_limit_is_split(work: Workspace) -> None:
    """No cell is cut off by the time limit, and none is repeated."""
    work.kinds(toy=GPU | {"timeout_min": 4, "signal_delay_s": 5})
    # Of 240 s, 5 are for the warning, and 60 because it may come early. 175 s are left.
    expected = {"a0": 10, "a1": 10, "a2": 165}
    work.plan(out={"a": 3}, expected_s=expected, expected_start_s=1)
    # Now less than 165 s are left for the third cell, which in truth would fit.
    work.set_acts(a0="12")
    output = work.run()
    assert work.outputs() == names("a", 3)
    assert work.started() == ["a0", "a1", "a2"]
    assert "with 2 jobs, as many as fit into 4 min; left: 1 job" in output
    assert "reached its time limit" not in output
    records = work.records()
    # 1 + 165 + 65 = 231 s
    assert [each["slurm"]["TimeLimit"] for each in records] == ["00:04:00"] * 2
    assert sorted(each["jobs_finished"] for each in records) == [1, 2]
    assert work.service_starts() == 2


@pytest.mark.slow
def test_a_time_limit_during_the_start_of_the_service_is_reported(work: Workspace) -> None:
    work.plan(out={"a": 2}, start_s=300)
    output = work.run(runtime=1, status=1)
    assert "0 of 2 jobs done" in output
    assert "time limit" in output or "TIMEOUT" in output
    assert work.started() == []
    assert work.queue() == []


def test_a_cancelled_allocation_is_not_continued_in_the_same_run(work: Workspace) -> None:
    work.plan(out={"a": 3, "b": 2})
    work.set_acts(a1="wait", b1="wait")
    run = work.start()
    work.wait_started("a1")
    work.wait_started("b1")
    job = next(each["allocation"] for each in work.notes("cells", "begin") if each["cell"] == "a1")
    assert job == "a"
    jobs = {
        line.split("|")[0]: line.split("|")[1]
        for line in work.cluster.call("squeue", "-h", "-o", "%i|%j").splitlines()
    }
    work.cluster.call("scancel", next(each for each, name in jobs.items() if name[0] == "a"))
    work.wait(lambda: "was stopped by" in work.log.read_text())
    (work.folder / "go").touch()
    output = work.end(run, status=1)
    assert work.outputs() == {"a0", "b0", "b1"}
    assert "Not done in a: Allocation a: was stopped by SIGTERM; 1 of 3 jobs done" in output
    assert "To resume, run the same command again: " in output
    work.run()
    assert work.outputs() == names("a", 3) | names("b", 2)
    assert work.started().count("a0") == work.started().count("b1") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_nothing_in_the_queue(
    work: Workspace, number: signal.Signals
) -> None:
    work.plan(out={"a": 2, "b": 2})
    work.set_acts(a0="wait", b0="wait")
    run = work.start()
    work.wait_started("a0")
    work.wait_started("b0")
    if number == signal.SIGINT:
        work.interrupt(run)
    else:
        run.send_signal(number)
    began = time.monotonic()
    run.wait(timeout=60)
    assert run.returncode != 0
    work.wait(lambda: work.queue() == [], limit_s=15)
    assert time.monotonic() - began < 40
    assert len(work.notes("service", "down")) == 2
    (work.folder / "go").touch()
    work.run()
    assert work.outputs() == names("a", 2) | names("b", 2)


def test_a_killed_main_process_finds_its_allocation_again(work: Workspace) -> None:
    work.plan(out={"a": 4})
    work.set_acts(a1="wait")
    run = work.start()
    work.wait_started("a1")
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    again = work.start("--nolock")
    work.wait(lambda: "of an earlier run is still active" in work.log.read_text())
    (work.folder / "go").touch()
    output = work.end(again)
    assert work.outputs() == names("a", 4)
    assert sorted(work.started()) == ["a0", "a1", "a2", "a3"]
    assert work.service_starts() == 1
    assert "of an earlier run" in output


def test_a_killed_allocation_is_continued(work: Workspace) -> None:
    work.plan(out={"a": 4})
    work.set_acts(a1="wait")
    run = work.start()
    work.wait_started("a1")
    os.kill(work.notes("service", "up")[0]["pid"], signal.SIGKILL)
    work.wait(lambda: work.started().count("a2") == 1, limit_s=120)
    (work.folder / "go").touch()
    work.end(run)
    assert work.outputs() == names("a", 4)
    assert work.service_starts() == 2


def fake(work: Workspace, name: str, text: str) -> None:
    """Put another program in front of Slurm's."""
    folder = work.folder / "bin"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    work.env["PATH"] = f"{folder}:{work.cluster.env['PATH']}"


@pytest.mark.parametrize(
    "squeue",
    ["exit 1", "exit 0", "sleep 300", "echo '1|FAILED|None|other'; echo nonsense"],
    ids=["fails", "forgets", "hangs", "lies"],
)
def test_a_wrong_answer_of_squeue_ends_no_allocation(work: Workspace, squeue: str) -> None:
    fake(work, "squeue", f'[ -e {work.folder}/sane ] && exec squeue.real "$@"\n{squeue}')
    fake(work, "squeue.real", f'exec {work.cluster.folder}/bin/squeue "$@"')
    fake(work, "sacct", "sleep 300")  # it must not be asked
    work.plan(out={"a": 8})
    work.set_acts(**dict.fromkeys(names("a", 8), "6"))
    run = work.start()
    work.wait(lambda: len(work.started()) >= 7, limit_s=120)
    (work.folder / "sane").touch()
    work.end(run)
    assert work.outputs() == names("a", 8)
    assert sorted(work.started()) == sorted(names("a", 8))
    assert work.service_starts() == 1


def test_a_restart_of_the_controller_repeats_nothing(work: Workspace) -> None:
    work.plan(out={"a": 3})
    work.set_acts(a1="wait")
    run = work.start()
    work.wait_started("a1")
    work.cluster.lose_controller()
    time.sleep(5)
    work.cluster.return_controller()
    (work.folder / "go").touch()
    work.end(run)
    assert sorted(work.started()) == ["a0", "a1", "a2"]
    assert work.service_starts() == 1


def test_a_submission_without_an_answer_is_repeated(work: Workspace) -> None:
    work.plan(out={"a": 2})
    work.cluster.lose_controller()
    run = work.start()
    work.wait(lambda: "slurm does not answer" in work.log.read_text(), limit_s=120)
    work.cluster.return_controller()
    work.end(run)
    assert work.outputs() == names("a", 2)


def test_a_refused_submission_does_not_affect_other_jobs(work: Workspace) -> None:
    work.kinds(toy=GPU | {"slurm_partition": "nowhere"})
    work.plan(out={"a": 2}, alone={"b": 1})
    output = work.run(status=1)
    assert "slurm refused the allocation a" in output
    assert "invalid partition specified: nowhere" in output
    assert output.count("slurm refused the allocation a") == 2  # as the error, and in the summary
    assert (work.folder / "alone" / "b0").exists()


def test_a_pending_allocation_is_reported_with_slurm_s_reason(work: Workspace) -> None:
    work.kinds(toy=V100)
    for node in ("sirocco14", "sirocco15"):
        work.cluster.lose_node(node)
    work.plan(out={"a": 2})
    run = work.start()
    work.wait(lambda: "pending (" in work.log.read_text(), limit_s=90)
    assert work.started() == []
    work.cluster.resume_node("sirocco15")
    output = work.end(run)
    assert work.outputs() == names("a", 2)
    assert " for " in output and "0 of 2 jobs done" in output


def test_more_gpus_than_a_node_has_take_several_nodes(work: Workspace) -> None:
    work.kinds(toy=KIND | {"slurm_constraint": "a100", "gpus_of_node": 2})
    work.plan(out={"a": 2}, gpus=4)
    work.run()
    [record] = work.records()
    assert record["slurm"]["NumNodes"] == "2"
    assert len(work.notes("service", "up")) == 1  # on the first node
