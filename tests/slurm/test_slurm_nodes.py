"""An allocation of several nodes on a real Slurm: its service runs on each of them, and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from slurm.conftest import KIND, Workspace

pytestmark = [pytest.mark.slow, pytest.mark.crowded, pytest.mark.timeout(900)]

TWO = KIND | {"slurm_constraint": "a100", "gpus_of_node": 2, "interface": "127.0.0.0/8"}
NOTICED_S = 20.0


@pytest.fixture
def pair(work: Workspace) -> Workspace:
    """Jobs that need two nodes. The second one waits for the file `go`."""
    work.kinds(toy=TWO)
    work.plan(out={"a": 3}, gpus=4)
    work.set_acts(a1="wait")
    return work


def start(work: Workspace) -> subprocess.Popen[bytes]:
    return work.start("--submitit-follower", "toy_service:follow")


def service(work: Workspace, event: str) -> dict[str, Any]:
    """The last such event."""
    return work.notes("service", event)[-1]


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def finish(work: Workspace, run: subprocess.Popen[bytes]) -> str:
    """All jobs are done, and only the one that ran was started again."""
    (work.folder / "go").touch()
    output = work.end(run)
    assert work.outputs() == {"a0", "a1", "a2"}
    assert sorted(work.started()) == ["a0", "a1", "a1", "a2"]
    return output


def test_each_node_runs_a_part_of_the_service(pair: Workspace) -> None:
    run = start(pair)
    pair.wait_started("a1")
    [(_, _, listed)] = pair.queue()
    up = service(pair, "up")
    assert len(set(up["hosts"])) == 2
    assert up["answers"] == [[1, [0, "hello", up["hosts"][1]]]]
    # Both nodes are this machine: their clock is the same.
    [(offset_ns, uncertainty_ns)] = up["clocks"]
    assert abs(offset_ns) <= uncertainty_ns < 1e9
    assert listed.startswith("sirocco")
    secrets = list(pair.folder.glob(".snakemake/submitit/*/*/nodes/*"))
    assert secrets == []  # the key is needed until all nodes have come
    (pair.folder / "go").touch()
    pair.end(run)
    assert pair.outputs() == {"a0", "a1", "a2"}
    assert len(pair.notes("service", "joined")) == len(pair.notes("service", "left")) == 1
    [record] = pair.records()
    assert (record["slurm"]["NumNodes"], record["slurm"]["ExitCode"]) == ("2", "0:0")


@pytest.mark.parametrize("victim", ["follower", "helper of the follower", "leader"])
def test_the_end_of_a_process_ends_all_nodes_and_another_allocation_continues(
    pair: Workspace, victim: str
) -> None:
    run = start(pair)
    pair.wait_started("a1")
    up, joined = service(pair, "up"), service(pair, "joined")
    events = {"follower": joined["pid"], "leader": up["pid"]}
    os.kill(events.get(victim, joined["helper"]), signal.SIGKILL)
    began = time.monotonic()
    if victim == "helper of the follower":
        # The follower's service says so. Nothing tells a job: the next one finds out.
        pair.wait(lambda: not exists(joined["pid"]), limit_s=NOTICED_S)
        (pair.folder / "go").touch()
        output = pair.end(run)
        assert "ended because its service is no longer healthy; 2 of 3 jobs done" in output
        assert sorted(pair.started()) == ["a0", "a1", "a2"]
    else:
        pair.wait(lambda: not (exists(up["pid"]) or exists(joined["pid"])), limit_s=NOTICED_S)
        output = finish(pair, run)
    print(f"{victim}: both nodes have ended after {time.monotonic() - began:.1f} s at most")
    if victim == "follower":
        assert "lost one of its nodes; 1 of 3 jobs done" in output
    assert not exists(joined["helper"]) or victim == "follower"  # nobody ended that one's child
    assert pair.service_starts() == 2


def test_a_requeue_starts_the_service_again_on_all_nodes(pair: Workspace) -> None:
    run = start(pair)
    pair.wait_started("a1")
    [(job, _, _)] = pair.queue()
    pair.cluster.call("scontrol", "requeue", job)
    pair.wait(lambda: pair.started().count("a1") == 2, limit_s=90)
    assert [each[0] for each in pair.queue()] == [job]
    finish(pair, run)
    assert len(pair.notes("service", "joined")) == pair.service_starts() == 2


def test_the_loss_of_the_other_node_is_survived(pair: Workspace) -> None:
    run = start(pair)
    pair.wait_started("a1")
    pair.cluster.lose_node(service(pair, "up")["hosts"][1])
    pair.wait(lambda: pair.started().count("a1") == 2, limit_s=90)
    finish(pair, run)


def test_a_preemption_ends_all_nodes_and_measures_only_what_is_missing(pair: Workspace) -> None:
    pair.kinds(toy=TWO | {"slurm_partition": "preempt"})
    run = start(pair)
    pair.wait_started("a1")
    first, began = (service(pair, "up"), service(pair, "joined")), time.monotonic()
    pair.cluster.call(
        *("sbatch", "--partition=routage", f"--nodelist={first[0]['hosts'][1]}", "--exclusive"),
        *("--mem=0", "--output=/dev/null", "--time=1", "--wrap=sleep 5"),
    )
    pids = [each[key] for each in first for key in ("pid", "helper")]
    pair.wait(lambda: not any(map(exists, pids)), limit_s=NOTICED_S)
    print(f"preemption: nothing is left on both nodes after {time.monotonic() - began:.1f} s")
    pair.wait(lambda: pair.started().count("a1") == 2, limit_s=120)
    finish(pair, run)


@pytest.mark.chaos
def test_the_time_limit_ends_all_nodes_and_measures_only_what_is_missing(pair: Workspace) -> None:
    """Slurm warns both nodes of the limit of one minute; the waiting cell is what is missing."""
    run = pair.start("--submitit-follower", "toy_service:follow", runtime=1)
    pair.wait_started("a1")
    first = (service(pair, "up"), service(pair, "joined"))
    pids = [each[key] for each in first for key in ("pid", "helper")]
    pair.wait(lambda: not any(map(exists, pids)), limit_s=60 + NOTICED_S)
    print(
        f"time limit: both nodes ended {time.monotonic() - first[0]['time']:.1f} s after the start"
    )
    pair.wait(lambda: pair.started().count("a1") == 2, limit_s=90)
    finish(pair, run)
    assert len(pair.notes("service", "left")) == pair.service_starts() == 2


@pytest.mark.parametrize("how", ["scancel", "ctrl-c"])
def test_a_cancelled_allocation_leaves_nothing_on_any_node(pair: Workspace, how: str) -> None:
    run = start(pair)
    pair.wait_started("a1")
    up, joined = service(pair, "up"), service(pair, "joined")
    if how == "scancel":
        pair.cluster.call("scancel", pair.queue()[0][0])
    else:
        pair.interrupt(run)
    pids = (up["pid"], up["helper"], joined["pid"], joined["helper"])
    pair.wait(lambda: not any(map(exists, pids)), limit_s=NOTICED_S)
    run.wait(timeout=90)
    assert run.returncode != 0
    assert len(pair.notes("service", "left")) == len(pair.notes("service", "down")) == 1
    if how == "scancel":  # a person wants this: no other allocation
        assert "was stopped by SIGTERM" in pair.log.read_text()
        assert pair.service_starts() == 1


def test_a_node_whose_part_does_not_start_gives_its_reason(pair: Workspace) -> None:
    (pair.folder / "refuse-node-1").touch()
    output = pair.end(start(pair), status=1)
    assert "its service did not start" in output
    assert "RuntimeError: node 1 (sirocco" in output
    assert "RuntimeError: no disk here" in output


def test_nodes_without_a_network_are_refused_before_submission(pair: Workspace) -> None:
    pair.kinds(toy={key: value for key, value in TWO.items() if key != "interface"})
    output = pair.end(start(pair), status=1)
    assert "kinds.yaml: toy: An allocation needs 2 nodes" in output
    assert "Set `interface` of the kind" in output
    assert pair.queue() == []


def test_an_unknown_network_is_refused_with_those_that_there_are(pair: Workspace) -> None:
    pair.kinds(toy=TWO | {"interface": "ib7"})
    output = pair.end(start(pair), status=1)
    assert "has no interface `ib7` with an IPv4 address. It has: " in output
    assert "lo (127.0.0.1)" in output
