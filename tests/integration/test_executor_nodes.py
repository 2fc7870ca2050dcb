"""An allocation of two nodes: who ends whom, and what is left."""

from __future__ import annotations

import os
import signal
import time

import pytest

from helpers.node_pair import Pair
from snakemake_executor_plugin_submitit.spool import Task

NOTICED_S = 20.0
"""Within this time, the other node must have ended."""

pytestmark = pytest.mark.crowded


def test_both_nodes_run_their_part_until_no_job_is_left(pair: Pair) -> None:
    pair.start().wait_until_up()
    (up,) = pair.notes("up")
    assert up["hosts"] == ["node0", "node1"]
    assert up["answers"] == [[1, [0, "hello", "node1"]]]
    assert list((pair.spool.root / "nodes").iterdir()) == []  # the key is gone
    pair.spool.close()
    assert pair.ends() == [0, 0]
    assert [each["reason"] for each in pair.events("ended")] == ["closed"]
    assert (len(pair.notes("left")), len(pair.notes("down"))) == (1, 1)
    assert pair.helpers_left() == []


def test_a_killed_node_ends_the_other_one(pair: Pair) -> None:
    pair.start().wait_until_up()
    pair.processes[1].kill()
    began = time.monotonic()
    pair.wait(lambda: pair.notes("down"), NOTICED_S)
    assert pair.ends()[0] == 1
    print(f"seen, and ended on the first node, after {time.monotonic() - began:.1f} s")
    (ended,) = pair.events("ended")
    assert (ended["reason"], "node 1 (node1) is gone" in ended["detail"]) == ("node_lost", True)


def test_a_killed_first_node_ends_the_other_one(pair: Pair) -> None:
    pair.start().wait_until_up()
    pair.processes[0].kill()
    began = time.monotonic()
    pair.wait(lambda: pair.notes("left"), NOTICED_S)
    assert pair.ends()[1] == 1
    print(f"seen, and ended on the other node, after {time.monotonic() - began:.1f} s")
    assert "the first node (node0) is gone" in pair.log(1)
    assert pair.events("ended") == []  # Slurm, or the main process, decides


def test_a_failed_part_of_the_service_makes_it_unhealthy(pair: Pair) -> None:
    pair.start().wait_until_up()
    os.kill(pair.notes("joined")[0]["helper"], signal.SIGKILL)
    assert pair.processes[1].wait(NOTICED_S) == 0
    pair.spool.put(Task("key", ("--version",), str(pair.folder), None))
    assert pair.ends() == [0, 0]
    assert [each["reason"] for each in pair.events("ended")] == ["unhealthy"]
    assert "node 1 (node1): its service is no longer healthy" in pair.log(0)
    assert pair.spool.has_tasks()  # it has not started


def test_a_part_that_does_not_start_is_a_failed_start(pair: Pair) -> None:
    (pair.folder / "refuse-node-1").touch()
    pair.start()
    assert pair.ends()[1] == 1
    assert "RuntimeError: no disk here" in pair.log(1)
    (ended,) = pair.events("ended")
    assert ended["reason"] == "start_failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_the_first_node_decides_what_a_signal_to_all_means(
    pair: Pair, number: signal.Signals
) -> None:
    pair.start().wait_until_up()
    for process in reversed(pair.processes):
        process.send_signal(number)
    assert pair.ends()[0] == 1
    assert pair.helpers_left() == []
    stopped = [each["reason"] for each in pair.events("stopped")]
    if number == signal.SIGTERM:
        assert (stopped, pair.events("ended")) == (["SIGTERM"], [])
    else:  # there is no Slurm that could requeue the job 0
        assert stopped == ["preemption"]
        assert [each["reason"] for each in pair.events("ended")] == ["preempted"]


def test_a_node_that_is_stopped_alone_leaves_after_a_while(pair: Pair) -> None:
    pair.start().wait_until_up()
    pair.processes[1].terminate()
    assert pair.ends() == [1, 1]
    assert pair.helpers_left() == []
    assert [each["reason"] for each in pair.events("ended")] == ["node_lost"]


def test_a_node_does_not_wait_for_an_allocation_that_has_ended(pair: Pair) -> None:
    pair.spool.record("ended", reason="idle", detail="")
    began = time.monotonic()
    pair.start()
    assert pair.ends() == [0, 1]
    assert "the allocation has ended" in pair.log(1)
    assert time.monotonic() - began < 110
