"""Loads that come from several processes: as one load, and without leaving any of them behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest

from helpers.scripted import Script, serving
from servegrid.client import measure, workers
from servegrid.errors import LoadError
from servegrid.study.grid import Workload

CORES = os.sched_getaffinity(0)
BURST = Workload("burst", 7, 9, 5, 14, warmup_waves=1, timeout_s=60, idle_timeout_s=20)
STEADY = replace(BURST, protocol="closed_loop", requests=30)
POISSON = Workload("poisson", None, 9, 5, 30, request_rate=60.0, idle_timeout_s=20)


@pytest.mark.parametrize("workload", [BURST, STEADY, POISSON])
def test_the_load_of_several_processes_is_one_load(workload: Workload) -> None:
    with serving(Script(ttft_s=0.02, itl_s=0.005)) as server:
        measurement = measure(server.endpoint, workload, None, "cell", places=[CORES] * 3)
        sent = [each["headers"]["x-request-id"] for each in server.log().requests]
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


def test_parts_begin_together_on_their_cores() -> None:
    def part(start: workers.Start) -> tuple[int, int, set[int]]:
        begun = start()
        return begun, time.monotonic_ns(), os.sched_getaffinity(0)

    core = {min(CORES)}
    first, second = workers.run([part, part], [core, CORES])
    assert first[0] == second[0]
    assert min(first[1], second[1]) >= first[0]
    assert (first[2], second[2]) == (core, CORES)


def failing(start: workers.Start) -> Any:
    raise LoadError("no connection")


def failing_later(start: workers.Start) -> Any:
    start()
    raise LoadError("no connection")


def killed(start: workers.Start) -> Any:
    start()
    os.kill(os.getpid(), signal.SIGKILL)


def waiting(start: workers.Start) -> Any:
    start()
    time.sleep(600)


@pytest.mark.parametrize(
    ("part", "told"),
    [(failing, "no connection"), (failing_later, "no connection"), (killed, "ended from outside")],
)
def test_one_that_fails_is_told_and_the_others_are_ended(
    part: Callable[[workers.Start], Any], told: str
) -> None:
    before = psutil.Process().children()
    with pytest.raises(LoadError, match=told):
        workers.run([part, waiting])
    assert psutil.Process().children() == before


def test_they_end_with_the_process_that_began_them() -> None:
    def main(start: workers.Start) -> Any:
        def part(start: workers.Start) -> Any:
            os.write(tell, f"{os.getpid()}\n".encode())
            time.sleep(600)

        start()
        workers.run([part, part])

    hear, tell = os.pipe()
    with os.fdopen(hear) as lines:
        child = os.fork()
        if child == 0:
            try:
                workers.run([main])
            finally:
                os._exit(1)
        os.close(tell)
        parts = [int(lines.readline()) for _ in range(2)]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        deadline = time.monotonic() + 20
        while any(map(psutil.pid_exists, parts)):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_how_many_processes_a_load_takes() -> None:
    assert workers.size(concurrency=512, cores=64) == 1
    assert workers.size(concurrency=513, cores=64) == 2
    assert workers.size(concurrency=2048, cores=8) == 2
    assert workers.size(concurrency=2048, cores=2) == 1
