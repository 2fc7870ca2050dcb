"""Allocations request the time that their jobs are expected to take, and no more than allowed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from snakemake_interface_common.exceptions import WorkflowError

from snakemake_executor_plugin_submitit import liveness, manager
from snakemake_executor_plugin_submitit.allocation import Allocation
from snakemake_executor_plugin_submitit.jobs import job_seconds
from snakemake_executor_plugin_submitit.liveness import Submission
from snakemake_executor_plugin_submitit.manager import AllocationManager
from snakemake_executor_plugin_submitit.slurm import Answer
from snakemake_executor_plugin_submitit.spool import ENDED, SERVICE_STARTED, STARTED, Spool, Task
from snakemake_executor_plugin_submitit.submission import Parameters
from snakemake_executor_plugin_submitit.tracking import AllocationSpec, QueuedJob
from snakemake_executor_plugin_submitit.walltime import Span, choose_span


def spec(minutes: float = 10, start_s: float = 30, later_s: float | None = 0.0) -> AllocationSpec:
    """Without jobs, 10 minutes leave 600 - 60 - 90 = 450 s: Slurm warns a minute before the end."""
    parameters = Parameters({"timeout_min": minutes})
    return AllocationSpec("a", "m:serve", {}, {}, parameters, start_s=start_s, later_s=later_s)


def limit(span: Span) -> tuple[int, float, float | None, bool]:
    return span.jobs, span.parameters.time_limit_s / 60, span.usable_s, span.is_shortened


def test_the_time_limit_is_that_of_start_jobs_and_reserve_in_whole_minutes() -> None:
    # 30 + 2 × 60 + 150 = 300 s, and a second more is a minute more.
    assert limit(choose_span(spec(), [60, 60])) == (2, 5, 150, True)
    assert limit(choose_span(spec(start_s=31), [60, 60])) == (2, 6, 210, True)


def test_jobs_that_come_later_count() -> None:
    # 30 + 60 + 120 + 150 = 360 s
    assert limit(choose_span(spec(later_s=120), [60])) == (1, 6, 210, True)
    # With them, it is more than allowed: those that are here fit.
    assert limit(choose_span(spec(later_s=3600), [60])) == (1, 10, 450, False)
    assert limit(choose_span(spec(later_s=None), [60])) == (1, 10, 450, False)


def test_more_than_the_time_limit_allows_is_split() -> None:
    # 30 + 7 × 60 = 450 s fit, the eighth job does not.
    assert limit(choose_span(spec(), [60.0] * 9)) == (7, 10, 450, False)


def test_a_job_that_never_fits_is_submitted_alone() -> None:
    assert limit(choose_span(spec(), [3600, 60])) == (1, 10, 450, False)


def test_a_job_of_unknown_time_gets_the_whole_time_limit() -> None:
    assert limit(choose_span(spec(), [60, None, 3600])) == (3, 10, None, False)


def test_a_shortened_time_limit_keeps_the_time_of_the_warning() -> None:
    parameters = Parameters({"timeout_min": 600, "signal_delay_s": 300, "cpus_per_task": 1})
    shorter = parameters.lasting(30)  # 30 + 300 + 90 = 420 s
    assert (shorter.for_slurm()["time"], shorter.for_slurm()["signal_delay_s"]) == (7, 300)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "60"])
def test_seconds_that_are_none_are_refused(value: object) -> None:
    class Job:
        name = "measure"
        resources = {"expected_s": value}  # noqa: RUF012

    with pytest.raises(WorkflowError, match=r"measure: resources\.expected_s: .* is not a number"):
        job_seconds(Job(), "expected_s")  # type: ignore[arg-type]
    assert job_seconds(Job(), "expected_start_s") is None  # type: ignore[arg-type]


class SlurmRun:
    """A manager on a fake Slurm, with one allocation at a time."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.squeue = ""
        self.now = 1000.0
        self.limits: list[float] = []
        self.functions: list[Allocation] = []
        self.texts: list[str] = []
        monkeypatch.setattr(liveness, "ask_squeue", lambda _: Answer(self.squeue, ""))
        monkeypatch.setattr(manager, "submit", self._submit)
        monkeypatch.setattr(time, "time", lambda: self.now)
        self.manager = self.start()

    def start(self, cluster: str = "slurm") -> AllocationManager[str]:
        self.manager = AllocationManager(
            self.folder,
            cluster,
            max_allocations=None,
            idle_timeout=1,
            report=lambda text, progress=None: self.texts.append(text),
        )
        return self.manager

    def _submit(
        self, name: str, cluster: str, job: str, _: Path, parameters: Parameters, function: Any
    ) -> tuple[Submission, Any]:
        self.limits.append(parameters.time_limit_s / 60)
        self.functions.append(function)
        self.squeue = f"7|RUNNING||{job}\n"
        return Submission(name, cluster, "here", "7", job, self.now, "a.log"), object()

    def put(
        self,
        *keys: str,
        expected_s: float | None = 60,
        get: Callable[[], AllocationSpec] = spec,
        orders: dict[str, int] | None = None,
    ) -> None:
        jobs = [
            QueuedJob(key, Task(key, (), "/", None, (orders or {}).get(key, 0)), get, expected_s)
            for key in keys
        ]
        self.manager.put([("a", job) for job in jobs])

    @property
    def spool(self) -> Spool:
        return Spool(Path(self.functions[-1].folder))

    def queued(self) -> list[str]:
        """The keys of the queued jobs of the present allocation, in their order."""
        tickets = sorted(path.name for path in (self.spool.root / "todo").iterdir())
        return [ticket.rpartition("-")[2] for ticket in tickets]

    def up(self) -> None:
        self.spool.record(STARTED, host="n1", pid=1, start_ticks=1)
        self.spool.record(SERVICE_STARTED, seconds=1.0)

    def finish(self, *keys: str, each_s: float) -> None:
        for key in keys:
            taken = self.spool.take()
            assert taken is not None
            assert taken[1].key == key
            self.now += each_s
            self.spool.finish(taken[0], 0)

    def end(self, reason: str) -> None:
        self.spool.record(ENDED, reason=reason, detail="")
        self.squeue = ""
        self.manager.poll()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmRun:
    return SlurmRun(tmp_path, monkeypatch)


EIGHT = tuple("abcdefgh")


def test_the_rest_of_a_split_gets_another_allocation(run: SlurmRun) -> None:
    run.put(*EIGHT, "i")
    assert run.queued() == list("abcdefg")
    assert run.texts == [
        "Allocation a: submitted as job 7 with 7 jobs, as many as fit into 10 min; left: 2 jobs; "
        "log: a.log"
    ]
    run.up()
    run.finish(*"abcdefg", each_s=60)  # as expected
    assert len(run.manager.poll()) == 7
    assert run.spool.closed  # it does not wait for more jobs
    run.end("closed")
    assert run.queued() == ["h", "i"]
    assert run.limits == [10, 5]  # 30 + 2 × 60 + 150 s
    assert run.functions[-1].time_limit == 300
    assert run.functions[-1].signal_delay == 60


def test_a_split_follows_the_order_of_the_jobs(run: SlurmRun) -> None:
    run.put(*EIGHT, orders={key: 10 - number for number, key in enumerate(EIGHT)})
    assert run.queued() == list("hgfedcb")


def test_an_allocation_that_is_faster_than_expected_takes_more_jobs(run: SlurmRun) -> None:
    run.put(*EIGHT)
    run.up()
    run.finish("a", each_s=10)
    run.manager.poll()
    # 10 of 450 s are over, and 6 × 60 s are promised: 80 s are left for the eighth job.
    assert run.queued() == list("bcdefgh")
    assert run.limits == [10]


def test_a_service_that_starts_slowly_leaves_less_time(run: SlurmRun) -> None:
    run.put("a")  # 30 + 60 + 150 = 240 s: 90 s for start and jobs
    run.spool.record(STARTED, host="n1", pid=1, start_ticks=1)
    run.manager.poll()
    run.now += 45
    run.spool.record(SERVICE_STARTED, seconds=45.0)
    run.finish("a", each_s=1)
    run.manager.poll()
    run.put("b", expected_s=45)  # 90 - 46 = 44 s are left
    run.manager.poll()
    assert run.queued() == []
    run.end("closed")
    assert run.queued() == ["b"]


def test_one_job_that_comes_later_and_fits_runs_at_once(run: SlurmRun) -> None:
    run.put("a", get=lambda: spec(later_s=60))
    run.put("b")
    assert run.queued() == ["a", "b"]
    assert run.limits == [5]


@pytest.mark.parametrize("state", ["time_limit", "TIMEOUT"])
def test_after_a_prediction_that_was_too_short_the_whole_time_limit_is_requested(
    run: SlurmRun, state: str
) -> None:
    run.put("a", "b")
    run.up()
    if state == "TIMEOUT":  # Slurm has killed it
        run.manager.poll()
        run.manager._handle_end(run.manager._live.pop("a"), "TIMEOUT")
        run.manager.poll()
    else:
        run.end("time_limit")
    assert run.limits == [5, 10]
    assert run.queued() == ["a", "b"]


def test_a_whole_time_limit_without_a_finished_job_is_a_failure(run: SlurmRun) -> None:
    run.put("a", expected_s=None)
    run.up()
    run.spool.record(ENDED, reason="time_limit", detail="")
    [outcome] = run.manager.poll()
    assert outcome.failure is not None


def test_only_the_missing_jobs_of_a_preempted_allocation_count(run: SlurmRun) -> None:
    run.put("a", "b", "c")
    run.up()
    run.finish("a", each_s=60)
    run.end("preempted")
    assert run.limits == [6, 5]
    assert run.queued() == ["b", "c"]


def test_the_next_run_knows_what_fits_into_an_allocation_of_an_earlier_one(run: SlurmRun) -> None:
    run.put("a")
    run.up()
    run.start()
    run.put("a", "b")
    run.manager.poll()
    assert run.queued() == ["a"]


def test_a_machine_without_slurm_has_no_such_limit(run: SlurmRun) -> None:
    run.start("local")
    run.put(*EIGHT, "i")
    assert run.limits == [10]
    assert len(run.queued()) == 9


def test_the_time_of_a_start_that_is_still_to_come_is_kept_free(run: SlurmRun) -> None:
    run.put("a")  # 90 s for start and jobs, of which 30 + 60 are promised
    run.put("b", expected_s=30)
    assert run.queued() == ["a"]
