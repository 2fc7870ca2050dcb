"""An allocation of two nodes: two processes, as Slurm starts them, on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snakemake_executor_plugin_submitit.spool import Spool, Task

TOY = Path(__file__).parent / "executor"
PROGRAM = """
import json, sys
from snakemake_executor_plugin_submitit import allocation

class NoJobs:  # the process for jobs imports Snakemake, and these tests run no job
    def __init__(self, *_): pass
    def close(self): pass

allocation.Runner = NoJobs
allocation.Allocation(**json.loads(sys.argv[1]))()
"""
NOTICED_S = 20.0
"""Within this time, the other node must have ended."""

pytestmark = pytest.mark.crowded


class Pair:
    """Both processes of an allocation. Its service has a helper process on each node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spool = Spool.create(folder / "spool")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> Pair:
        settings = {
            "name": "a",
            "folder": str(self.spool.root),
            "service": "toy_service:serve",
            "follower": "toy_service:follow",
            "params": {"group": "a"},
            "resources": {},
            "idle_timeout": 600,
            "time_limit": 3600,
            "signal_delay": 60,
            "modules": str(TOY),
            "interface": "127.0.0.0/8",
        }
        for rank in range(2):
            slurm = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_JOB_ID": "0"}
            with (self.folder / f"log-{rank}").open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-P", "-c", PROGRAM, json.dumps(settings)],
                        cwd=self.folder,
                        env=os.environ | slurm | {"SLURMD_NODENAME": f"node{rank}"},
                        stdout=log,
                        stderr=log,
                    )
                )
        return self

    def wait_until_up(self) -> None:
        self.wait(lambda: self.events("service_started"))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [dict(event.data) for event in self.spool.journal().read_new() if event.kind == kind]

    def notes(self, event: str) -> list[dict[str, Any]]:
        path = self.folder / "service.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [note for note in map(json.loads, lines) if note["event"] == event]

    def log(self, rank: int) -> str:
        return (self.folder / f"log-{rank}").read_text()

    def wait(self, test: Callable[[], Any], limit_s: float = 200) -> None:
        deadline = time.monotonic() + limit_s
        while not test():
            assert time.monotonic() < deadline, (self.log(0), self.log(1))
            time.sleep(0.05)

    def ends(self) -> list[int]:
        """The exit statuses of both nodes; nothing of the service is left on either."""
        began = time.monotonic()
        statuses = [process.wait(100) for process in self.processes]
        print(f"both nodes have ended after {time.monotonic() - began:.1f} s")
        return statuses

    def helpers_left(self) -> list[int]:
        helpers = [note["helper"] for note in self.notes("up") + self.notes("joined")]
        assert len(helpers) == 2
        return [pid for pid in helpers if Path(f"/proc/{pid}").exists()]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for pid in self.helpers_left() if self.notes("up") and self.notes("joined") else []:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    try:
        yield pair
    finally:
        pair.close()


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
