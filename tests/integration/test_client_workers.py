"""Several client processes send one workload together, and none of them remains."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest

from helpers.faulty_server import FaultScript, start_faulty_server
from servegrid.client import measure, workers
from servegrid.errors import LoadError
from servegrid.study.grid import Workload

CORES = os.sched_getaffinity(0)
BURST = Workload("burst", 7, 9, 5, 14, warmup_waves=1, timeout_s=60, idle_timeout_s=20)
CLOSED_LOOP = replace(BURST, protocol="closed_loop", requests=30)
POISSON = Workload("poisson", None, 9, 5, 30, request_rate=60.0, idle_timeout_s=20)


@pytest.mark.parametrize("workload", [BURST, CLOSED_LOOP, POISSON])
def test_several_processes_send_one_workload(workload: Workload) -> None:
    with start_faulty_server(FaultScript(ttft_s=0.02, itl_s=0.005)) as server:
        measurement = measure(server.endpoint, workload, None, "cell", cpu_sets=[CORES] * 3)
        sent = [request["headers"]["x-request-id"] for request in server.log().requests]
    rows = measurement.requests.to_pylist()
    assert workload.requests is not None
    assert [row["request_id"] for row in rows] == [f"cell/{n}" for n in range(workload.requests)]
    assert {row["error"] for row in rows} == {None}
    assert sorted(sent) == sorted(set(sent))
    assert measurement.facts["processes"] == 3
    assert 0 < measurement.facts["cpu_s_busiest"] < measurement.facts["cpu_s"]
    if workload.concurrency is not None:
        assert {row["user"] for row in rows} == set(range(workload.concurrency))
    if workload.protocol == "burst":
        for wave in (rows[:7], rows[7:]):
            assert len({row["scheduled_ns"] for row in wave}) == 1
        assert max(row["done_ns"] for row in rows[:7]) < rows[7]["scheduled_ns"]


def test_tasks_start_together_on_their_cpus() -> None:
    def task(wait_for_start: workers.WaitForStart) -> tuple[int, int, set[int]]:
        start_ns = wait_for_start()
        return start_ns, time.monotonic_ns(), os.sched_getaffinity(0)

    core = {min(CORES)}
    first, second = workers.run_parallel([task, task], [core, CORES])
    assert first[0] == second[0]
    assert min(first[1], second[1]) >= first[0]
    assert (first[2], second[2]) == (core, CORES)


def failing(wait_for_start: workers.WaitForStart) -> Any:
    raise LoadError("no connection")


def failing_later(wait_for_start: workers.WaitForStart) -> Any:
    wait_for_start()
    raise LoadError("no connection")


def killed(wait_for_start: workers.WaitForStart) -> Any:
    wait_for_start()
    os.kill(os.getpid(), signal.SIGKILL)


def waiting(wait_for_start: workers.WaitForStart) -> Any:
    wait_for_start()
    time.sleep(600)


@pytest.mark.parametrize(
    ("task", "message"),
    [(failing, "no connection"), (failing_later, "no connection"), (killed, "killed from outside")],
)
def test_the_error_of_a_failed_task_is_raised_and_the_other_tasks_are_killed(
    task: Callable[[workers.WaitForStart], Any], message: str
) -> None:
    before = psutil.Process().children()
    with pytest.raises(LoadError, match=message):
        workers.run_parallel([task, waiting])
    assert psutil.Process().children() == before


def test_workers_end_with_their_parent_process() -> None:
    def main(wait_for_start: workers.WaitForStart) -> Any:
        def task(wait_for_start: workers.WaitForStart) -> Any:
            os.write(writer, f"{os.getpid()}\n".encode())
            time.sleep(600)

        wait_for_start()
        workers.run_parallel([task, task])

    reader, writer = os.pipe()
    with os.fdopen(reader) as lines:
        child = os.fork()
        if child == 0:
            try:
                workers.run_parallel([main])
            finally:
                os._exit(1)
        os.close(writer)
        pids = [int(lines.readline()) for _ in range(2)]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        deadline = time.monotonic() + 20
        while any(map(psutil.pid_exists, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_number_of_processes_depends_on_concurrency_and_cores() -> None:
    assert workers.processes_allowed(concurrency=512, cores=64) == 1
    assert workers.processes_allowed(concurrency=513, cores=64) == 2
    assert workers.processes_allowed(concurrency=2048, cores=8) == 2
    assert workers.processes_allowed(concurrency=2048, cores=2) == 1
