"""What runs inside one submitit job: a service, and the jobs queued for it, one after another."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from snakemake_executor_plugin_submitit import spool as events
from snakemake_executor_plugin_submitit.liveness import start_ticks
from snakemake_executor_plugin_submitit.runner import Runner
from snakemake_executor_plugin_submitit.spool import Spool, Task

IDLE, CLOSED, WALLTIME, PREEMPTED = "idle", "closed", "walltime", "preempted"
UNHEALTHY, BRING_UP, FAILURE = "unhealthy", "bring-up", "failure"
"""Why an allocation has ended, as its journal says it."""

REPORT_VARIABLE = "SUBMITIT_TASK_REPORT"
"""Names a file into which a job may write two times (seconds since the epoch): between them it
did what it exists for. The rest of the allocation's time was spent on getting there."""

POLL_S = 0.2
AFTERSHOCK_S = 1.0
"""How long after a failed job the signal that ended it may still be on its way here as well."""
WALLTIME_MARGIN_S = 90.0
"""Slurm warns up to a minute earlier than asked; a warning before that is a preemption."""


class Service(Protocol):
    """What a service yields once it is up."""

    @property
    def env(self) -> Mapping[str, str]:
        """Environment variables for the jobs, on top of the allocation's own."""

    def healthy(self) -> bool:
        """Whether the next job makes sense. Asked before each job and after a failed one.

        After False the allocation ends and leaves its remaining jobs to another one.
        """


ServiceFactory = Callable[
    [str, Mapping[str, Any], Mapping[str, Any]], AbstractContextManager[Service]
]
"""`service(name, params, resources)`: the allocation's name, and the params and resources of its
first job as plain JSON data. It is entered once in each allocation, in the main thread of the
allocation's process, and left whenever that ends: after the last job, on a time limit, on SIGTERM.
An exception on entering is a bring-up that failed."""


@dataclass(frozen=True)
class _NoService:
    """For jobs that need none."""

    env: Mapping[str, str]

    def healthy(self) -> bool:
        return True


class _Stop(BaseException):
    """Raised in the main thread by the signal that ends the allocation."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number


@dataclass(frozen=True)
class Allocation:
    """The function that submitit calls on the node.

    All its state is in the spool, so that it goes on when Slurm starts it again. `service` is
    `module:function`, a ServiceFactory, or None. Times are seconds; after `idle_timeout` without a
    job it ends. `warned` is how long before the time limit `limit` SIGUSR2 comes. `preload` names
    modules that all jobs need.
    """

    name: str
    folder: str
    service: str | None
    params: Mapping[str, Any]
    resources: Mapping[str, Any]
    idle_timeout: float
    limit: float
    warned: float
    preload: tuple[str, ...] = ()

    def __call__(self) -> None:
        began = time.monotonic()
        spool = Spool(Path(self.folder))
        if not spool.restore():
            return
        if "SLURM_JOB_ID" not in os.environ:
            os.setsid()  # the terminal's Ctrl-C is for the main process
        pid, host = os.getpid(), os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        spool.record(events.STARTED, pid=pid, start_ticks=start_ticks(pid), host=host)
        _raise_on_signals()
        try:
            reason, detail = self._serve(spool)
            spool.record(events.ENDED, reason=reason, detail=detail)
        except _Stop as stop:
            self._stopped(spool, stop.number, time.monotonic() - began)
            raise SystemExit(f"Stopped by {stop.number.name}.") from None
        if reason in (BRING_UP, FAILURE):
            raise SystemExit(1)

    def _serve(self, spool: Spool) -> tuple[str, str]:
        """Why the allocation has ended, and the details for people."""
        with contextlib.closing(Runner(self.preload)) as runner, contextlib.ExitStack() as up:
            began = time.monotonic()
            try:
                service = up.enter_context(self._service())
            except _Stop:
                raise
            except BaseException as error:
                traceback.print_exc()
                return BRING_UP, _last_lines(error)
            spool.record(events.UP, seconds=time.monotonic() - began)
            try:
                # The runner closes first: a service may not go down under a job that still runs.
                with up, contextlib.closing(runner):
                    return self._work(spool, runner, service)
            except Exception as error:
                traceback.print_exc()
                return FAILURE, _last_lines(error)

    def _service(self) -> AbstractContextManager[Service]:
        if self.service is None:
            return contextlib.nullcontext(_NoService({}))
        module, _, function = self.service.partition(":")
        factory: ServiceFactory = getattr(importlib.import_module(module), function)
        return factory(self.name, self.params, self.resources)

    def _work(self, spool: Spool, runner: Runner, service: Service) -> tuple[str, str]:
        idle_since = time.monotonic()
        while True:
            # Closed is looked at before the queue: what was put before closing is still taken.
            closed = spool.closed
            if spool.waiting():
                if not service.healthy():
                    return UNHEALTHY, ""
                taken = spool.take()
                failed = taken is not None and self._run(spool, runner, service, *taken) != 0
                if failed and not service.healthy():
                    return UNHEALTHY, ""
                idle_since = time.monotonic()
            elif closed:
                return CLOSED, ""
            elif time.monotonic() - idle_since > self.idle_timeout:
                return IDLE, ""
            else:
                time.sleep(POLL_S)

    def _run(self, spool: Spool, runner: Runner, service: Service, ticket: str, task: Task) -> int:
        spool.record(events.BEGAN, ticket=ticket)
        caught = spool.log_of(ticket)
        report = caught.with_suffix(".report")
        status = runner.run(task, {**service.env, REPORT_VARIABLE: str(report)}, caught)
        if status:
            time.sleep(AFTERSHOCK_S)
        if task.log:
            _move_behind(caught, Path(task.log))
        spool.finish(ticket, status, _at_work(report))
        return status

    def _stopped(self, spool: Spool, number: signal.Signals, elapsed: float) -> None:
        """Say so; after the warning of a preemption, ask Slurm for another start."""
        if number != signal.SIGUSR2:
            spool.record(events.STOPPED, reason=number.name)
            return
        job = os.environ.get("SLURM_JOB_ID")
        if job is None or self.limit - elapsed <= self.warned + WALLTIME_MARGIN_S:
            spool.record(events.ENDED, reason=WALLTIME, detail="")
            return
        spool.record(events.STOPPED, reason="preemption")
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            spool.record(events.ENDED, reason=PREEMPTED, detail="")


def _raise_on_signals() -> None:
    """Make SIGTERM, SIGINT and SIGUSR2 raise _Stop in this, the main thread; only the first one.

    Slurm sends SIGUSR2 to every process of an allocation, and those that don't expect it die of
    it. So it is blocked here, which children inherit, and a thread waits for it. (Threads that
    numerical libraries have started before may get it as well: hence the handler.)
    """
    warned = threading.Event()
    stopped = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        if not stopped.is_set():
            stopped.set()
            raise _Stop(signal.SIGUSR2 if warned.is_set() else signal.Signals(number))

    def wait_for_warning() -> None:
        signal.sigwait({signal.SIGUSR2})
        warned.set()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    # submission.submit has blocked them for the time before this has its own session.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP})
    threading.Thread(target=wait_for_warning, daemon=True).start()


def _at_work(report: Path) -> list[float] | None:
    try:
        began, ended = map(float, report.read_text().split())
        report.unlink()
    except (OSError, ValueError):
        return None
    return [began, ended]


def _move_behind(caught: Path, log: Path) -> None:
    """Add what was caught to the rule's log, which Snakemake empties when the job begins."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(caught.read_bytes())
    caught.unlink()


def _last_lines(error: BaseException) -> str:
    """The exception as people want to read it first, without the way that led there."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return "\n".join(lines[-8:])
