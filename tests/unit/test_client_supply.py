"""A load by time: requests are prepared ahead of the clock, within a bound."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import psutil
import pytest

from helpers.faulty_server import FaultScript, start_faulty_server
from servegrid.client import measure, prompts
from servegrid.client.inflight import PreparedRequest
from servegrid.client.prompts import iterate_prompts, make_text_prompts, make_token_prompts
from servegrid.client.supply import RequestSupply
from servegrid.errors import LoadError
from servegrid.study.grid import Workload

LOOP = Workload(
    *("closed_loop", 3, 9, 5, None),
    duration_s=0.6,
    warmup_waves=1,
    timeout_s=20,
    idle_timeout_s=10,
)


def numbered(size: int = 200, end: int | None = None) -> Iterator[PreparedRequest]:
    """Requests whose first bytes are their number."""
    for number in itertools.count() if end is None else range(end):
        data = f"{number} ".encode().ljust(size, b"x")
        yield PreparedRequest("POST", data, number if number % 2 else None, 7 * number)


def number_of(request: PreparedRequest) -> int:
    return int(request.data.split()[0])


def test_all_requests_come_in_order_and_unchanged() -> None:
    with RequestSupply(numbered(), 10) as supply:
        taken = [supply.popleft() for _ in range(20_000) if supply]
    assert taken == list(islice(numbered(), 20_000))


def test_a_supply_ends_with_its_requests() -> None:
    with RequestSupply(numbered(end=250), 10) as supply:
        taken = []
        while supply:
            taken.append(number_of(supply.popleft()))
    assert taken == list(range(250))


def test_a_supply_holds_a_bounded_number_of_requests_and_its_process_waits() -> None:
    """100,000 requests of 10 kB would be 1 GB."""
    before, others = psutil.Process().memory_info().rss, set(psutil.Process().children())
    with RequestSupply(numbered(size=10_000), 100) as supply:
        (process,) = set(psutil.Process().children()) - others
        time.sleep(0.3)
        for _ in range(50):
            assert supply
            supply.popleft()
        assert len(supply) < 200
        assert process.memory_info().rss < before + 100e6
        assert psutil.Process().memory_info().rss < before + 100e6
        deadline = time.monotonic() + 5
        used = -1.0
        while (cpu_s := sum(process.cpu_times()[:2])) != used:  # the pipe is full
            assert time.monotonic() < deadline
            used = cpu_s
            time.sleep(0.2)
    assert not process.is_running()


def test_the_process_holds_no_connection_of_the_client() -> None:
    reader, writer = os.pipe()
    with RequestSupply(numbered(), 1) as supply:
        assert supply and supply.popleft()
        os.close(writer)
        assert os.read(reader, 1) == b""  # else the process still had the other end
    os.close(reader)


def test_a_supply_that_runs_dry_waits_and_counts_it() -> None:
    def slow() -> Iterator[PreparedRequest]:
        for request in numbered(end=3):
            time.sleep(0.05)
            yield request

    with RequestSupply(slow(), 1) as supply:
        taken = []
        while supply:
            taken.append(number_of(supply.popleft()))
        assert taken == [0, 1, 2] and supply.waits >= 2


@pytest.mark.parametrize("form", ["ids", "text"])
def test_endless_prompts_are_those_of_a_list(form: str, word_tokenizer: Path) -> None:
    workload = replace(LOOP, input_len=20)
    make = make_token_prompts if form == "ids" else make_text_prompts
    endless = iterate_prompts(workload, form, word_tokenizer, "s")  # type: ignore[arg-type]
    assert list(islice(endless, 100)) == make(workload, 100, word_tokenizer, "s")


def test_a_load_by_time_prepares_no_more_than_its_bound() -> None:
    others = psutil.Process().children()
    with start_faulty_server(FaultScript(ttft_s=0.001, itl_s=0.0)) as server:
        measurement = measure(server.endpoint, LOOP, None, "cell")
    facts = measurement.facts
    rows = measurement.requests.to_pylist()
    assert {row["error"] for row in rows} == {None}
    assert 0 < facts["left"] <= 5000  # 1000 ahead, and what one read of the pipe brings
    ids = [int(row["request_id"].rpartition("/")[2]) for row in rows]
    assert sorted(ids) == list(range(len(rows)))
    assert psutil.Process().children() == others


@pytest.mark.parametrize("processes", [1, 2])
def test_a_load_that_outruns_the_stock_goes_on(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4 requests ahead, each user still sends one after another until the end."""
    monkeypatch.setattr(sys.modules["servegrid.client.measure"], "MIN_AHEAD", 4)
    cpu_sets = [sorted(os.sched_getaffinity(0))] * processes
    workload = replace(LOOP, concurrency=2, think_time_s=0.001, output_spread=0.4)
    with start_faulty_server(FaultScript(ttft_s=0.001)) as server:
        measurement = measure(server.endpoint, workload, None, "cell", cpu_sets=cpu_sets)
    rows = measurement.requests.to_pylist()
    assert len(rows) > 20
    assert {row["error"] for row in rows} == {None}  # each has the length that was asked for
    assert len({row["requested_tokens"] for row in rows}) > 1


def test_prompts_that_run_out_are_an_error_before_the_start_and_an_end_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompts, "ORDINARY_IDS", range(1000, 1060))

    def requests() -> Iterator[PreparedRequest]:
        for prompt in iterate_prompts(replace(LOOP, input_len=1), "ids", None, "s"):
            assert isinstance(prompt, list)
            yield PreparedRequest("POST", b"%d" % prompt[0])

    with RequestSupply(requests(), 10) as supply:
        taken = []
        while supply:
            taken.append(supply.popleft().data)
    assert len(set(taken)) == len(taken) == 60
    with pytest.raises(LoadError, match=r"more than 60 distinct prompts"):
        RequestSupply(requests(), 61)
