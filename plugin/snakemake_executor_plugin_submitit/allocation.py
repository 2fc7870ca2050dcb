"""Runs inside one submitit job: starts a service, then runs the queued jobs one after another."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
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
from snakemake_executor_plugin_submitit.nodes import Nodes, NodesError, gather, join
from snakemake_executor_plugin_submitit.private import check_private
from snakemake_executor_plugin_submitit.runner import Runner
from snakemake_executor_plugin_submitit.spool import Spool, Task

IDLE, CLOSED, TIME_LIMIT, PREEMPTED = "idle", "closed", "time_limit", "preempted"
UNHEALTHY, START_FAILED, FAILED = "unhealthy", "start_failed", "failed"
NODE_LOST = "node_lost"
"""Why an allocation has ended, as its journal records it."""

REPORT_VARIABLE = "SUBMITIT_TASK_REPORT"
"""The name of a file into which a job can write two times (seconds since the epoch, separated by a
space): the start and the end of its actual work. The summary of a run then shows how much of the
allocated time was work."""

POLL_S = 0.2
SIGNAL_SETTLE_S = 1.0
"""How long a signal that killed a job can take to reach the allocation, too."""
FIRST_NODE_S = 5.0
"""Slurm signals all nodes at once. The others wait this long for what the first node decides."""
TIME_LIMIT_MARGIN_S = 90.0
"""Slurm warns up to a minute too early. An even earlier warning is a preemption."""
MAX_RESTARTS = 3
"""After this number of preemptions in a row without a finished job, an allocation ends for good.
Then the main process decides. Otherwise a time limit that somebody has lowered, which looks like a
preemption, would restart the service again and again."""


class Service(Protocol):
    """What a service's context manager yields after the start."""

    @property
    def env(self) -> Mapping[str, str]:
        """Environment variables for the jobs, in addition to the allocation's own."""

    def healthy(self) -> bool:
        """Whether the service can serve another job.

        Called before each job and after a failed one. If it returns False, the allocation ends,
        and another allocation gets the remaining jobs.
        """

    # A service may also have `choose(orders)`: which of the waiting jobs runs next, by the values
    # of their resource `order`; None for the lowest one.


ServiceFactory = Callable[..., AbstractContextManager[Service]]
"""`service(name, params, resources)`: the name of the allocation, and the params and resources of
its first job as JSON data. The context is entered once per allocation, in the main thread of the
allocation's process. It is left whenever the allocation ends: after the last job, at the time
limit, on SIGTERM. An exception on entering means that the service did not start.

On several nodes with a follower, there is a fourth argument: the `Nodes`. The other nodes enter
the follower, which has the same arguments."""


@dataclass(frozen=True)
class _NoService:
    """The service of jobs that need none."""

    env: Mapping[str, str]

    def healthy(self) -> bool:
        return True


@dataclass(frozen=True)
class _Everywhere:
    """A service on all its nodes: it works only as long as all its parts do."""

    first: Service
    nodes: Nodes | None

    @property
    def env(self) -> Mapping[str, str]:
        return self.first.env

    def healthy(self) -> bool:
        failure = self.nodes and self.nodes.failure
        if failure:
            print(failure, file=sys.stderr, flush=True)
        return not failure and self.first.healthy()

    def choose(self, spool: Spool) -> None:
        """Let the service choose the next job, if it can. An error leaves the order as it is."""
        choose = getattr(self.first, "choose", None)
        if choose is None:
            return
        try:
            order = choose(spool.orders())
        except Exception:
            traceback.print_exc()
            return
        if order is not None:
            spool.prefer(order)


class _Stop(BaseException):
    """Raised in the main thread by a signal that ends the allocation."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number


class _NodeLostError(BaseException):
    """Raised in the main thread if another node is gone; without a text if it wants us to end."""


@dataclass(frozen=True)
class Allocation:
    """The function that submitit calls on the node.

    All its state is in the spool, so it continues if Slurm starts it again. `service` is None or
    the `module:function` of a ServiceFactory. The allocation ends after `idle_timeout` seconds
    without a job. SIGUSR2 arrives `signal_delay` seconds before `time_limit` (seconds). The
    modules in `preload` are imported once for all jobs. `modules` is the folder of the Snakefile:
    `service` and `preload` are looked for there, after the installed modules. With a `follower`,
    each node runs this function: the first one the jobs, the others the follower. `interface` is
    the network between them.
    """

    name: str
    folder: str
    service: str | None
    params: Mapping[str, Any]
    resources: Mapping[str, Any]
    idle_timeout: float
    time_limit: float
    signal_delay: float
    preload: tuple[str, ...] = ()
    modules: str = ""
    follower: str | None = None
    interface: str = ""

    def __call__(self) -> None:
        started = time.monotonic()
        check_private(Path(self.folder))
        spool = Spool(Path(self.folder))
        rank = int(os.environ.get("SLURM_PROCID", 0)) if self.follower else 0
        if rank > 0:
            self._follow(spool, rank)
            return
        if not spool.restore():
            return
        if "SLURM_JOB_ID" not in os.environ:
            os.setsid()  # only the main process handles the terminal's Ctrl-C
        pid, host = os.getpid(), _host()
        spool.record(events.STARTED, pid=pid, start_ticks=start_ticks(pid), host=host)
        interrupt = _raise_on_signals()
        try:
            reason, detail = self._serve(spool, interrupt)
            spool.record(events.ENDED, reason=reason, detail=detail)
        except _NodeLostError as lost:
            spool.record(events.ENDED, reason=NODE_LOST, detail=str(lost))
            raise SystemExit(f"A node was lost: {lost}.") from None
        except _Stop as stop:
            self._handle_stop(spool, stop.number, time.monotonic() - started)
            raise SystemExit(f"Stopped by {stop.number.name}.") from None
        if reason in (START_FAILED, FAILED):
            raise SystemExit(1)

    def _serve(self, spool: Spool, interrupt: Callable[[str], None]) -> tuple[str, str]:
        """Why the allocation has ended, with details for people."""
        with (
            contextlib.closing(Runner(self.preload, self.modules)) as runner,
            contextlib.ExitStack() as stack,
        ):
            started = time.monotonic()
            try:
                nodes = self._gather(spool, stack, interrupt)
                service = stack.enter_context(self._create_service(self.service, nodes))
                if nodes is not None:
                    # The others end first: the service of this node need not wait for them.
                    stack.callback(nodes.end)
                    if nodes.failure:
                        raise NodesError(nodes.failure)
            except (_Stop, _NodeLostError):
                raise
            except BaseException as error:
                traceback.print_exc()
                return START_FAILED, _format_exception(error)
            spool.record(events.SERVICE_STARTED, seconds=time.monotonic() - started)
            try:
                # The runner closes first: a service must not stop while a job still runs.
                with stack, contextlib.closing(runner):
                    return self._run_tasks(spool, runner, _Everywhere(service, nodes))
            except Exception as error:
                traceback.print_exc()
                return FAILED, _format_exception(error)

    def _gather(
        self, spool: Spool, stack: contextlib.ExitStack, interrupt: Callable[[str], None]
    ) -> Nodes | None:
        if self.follower is None:
            return None
        count = int(os.environ["SLURM_NTASKS"])
        folder = spool.root / "nodes"
        return stack.enter_context(gather(count, _host(), self.interface, folder, interrupt))

    def _follow(self, spool: Spool, rank: int) -> None:
        """Run the follower until the first node ends it, or is gone."""
        interrupt = _raise_on_end()

        def has_ended() -> bool:
            return any(event.kind == events.ENDED for event in spool.journal().read_new())

        try:
            with join(
                rank, _host(), self.interface, spool.root / "nodes", interrupt, has_ended
            ) as nodes:
                try:
                    with self._create_service(self.follower, nodes) as service:
                        while service.healthy():
                            time.sleep(POLL_S)
                        nodes.report_failure("its service is no longer healthy")
                except Exception as error:
                    traceback.print_exc()
                    nodes.report_failure(_format_exception(error))
                    raise SystemExit(1) from None
        except NodesError as error:
            raise SystemExit(f"{error}.") from None
        except _NodeLostError as lost:
            print(f"{_host()}: {lost or 'the first node has ended the allocation'}.", flush=True)
            raise SystemExit(1 if str(lost) else 0) from None

    def _create_service(
        self, function: str | None, nodes: Nodes | None
    ) -> AbstractContextManager[Service]:
        if function is None:
            return contextlib.nullcontext(_NoService({}))
        if self.modules:
            sys.path.append(self.modules)
        module, _, name = function.partition(":")
        factory: ServiceFactory = getattr(importlib.import_module(module), name)
        more = () if nodes is None else (nodes,)
        return factory(self.name, self.params, self.resources, *more)

    def _run_tasks(self, spool: Spool, runner: Runner, service: _Everywhere) -> tuple[str, str]:
        idle_since = time.monotonic()
        while True:
            # Read before the queue: tasks that were queued before the spool closed still run.
            closed = spool.closed
            if spool.has_tasks():
                if not service.healthy():
                    return UNHEALTHY, ""
                service.choose(spool)
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
        spool.record(events.JOB_STARTED, ticket=ticket)
        output = spool.task_log(ticket)
        report = output.with_suffix(".report")
        status = runner.run(task, {**service.env, REPORT_VARIABLE: str(report)}, output)
        if status:
            time.sleep(SIGNAL_SETTLE_S)
        if task.log:
            _append_to_log(output, Path(task.log))
        spool.finish(ticket, status, _read_work_span(report))
        return status

    def _handle_stop(self, spool: Spool, number: signal.Signals, elapsed_s: float) -> None:
        """Record the stop. After the warning of a preemption, ask Slurm for a restart."""
        if number != signal.SIGUSR2:
            spool.record(events.STOPPED, reason=number.name)
            return
        job = os.environ.get("SLURM_JOB_ID")
        if job is None or self.time_limit - elapsed_s <= self.signal_delay + TIME_LIMIT_MARGIN_S:
            spool.record(events.ENDED, reason=TIME_LIMIT, detail="")
            return
        if spool.count_stops() >= MAX_RESTARTS:
            spool.record(events.ENDED, reason=PREEMPTED, detail="")
            return
        spool.record(events.STOPPED, reason="preemption")
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            spool.record(events.ENDED, reason=PREEMPTED, detail="")


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _raise_on_signals() -> Callable[[str], None]:
    """Make the first SIGTERM, SIGINT or SIGUSR2 raise _Stop in the main thread (this one).

    Returns a function that raises _NodeLostError there, with a text.

    Slurm sends SIGUSR2 to every process of an allocation, and a process without a handler dies.
    So SIGUSR2 is blocked here (children inherit that), and a thread waits for it. The handler is
    for threads that numerical libraries have started before: they can receive it, too.
    """
    warned = threading.Event()
    stopped = threading.Event()
    lost: list[str] = []

    def stop(number: int, _: FrameType | None) -> None:
        if not stopped.is_set():
            stopped.set()
            if lost and not warned.is_set():
                raise _NodeLostError(lost[0])
            raise _Stop(signal.SIGUSR2 if warned.is_set() else signal.Signals(number))

    def wait_for_warning() -> None:
        signal.sigwait({signal.SIGUSR2})
        warned.set()
        _signal_main_thread()

    def interrupt(text: str) -> None:
        lost.append(text)
        _signal_main_thread()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    # submission.submit has blocked these until this process has its own session.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP})
    threading.Thread(target=wait_for_warning, daemon=True).start()
    return interrupt


def _raise_on_end() -> Callable[[str], None]:
    """For the other nodes: a function that raises _NodeLostError in the main thread (this one).

    Slurm signals all nodes of a job. What follows is the first node's decision; only without one
    does a signal end this node, after a while. The warning before the time limit means nothing
    here.
    """
    ended = threading.Event()
    texts: list[str] = []

    def stop(number: int, _: FrameType | None) -> None:
        if ended.is_set():
            return
        if texts:
            ended.set()
            raise _NodeLostError(texts[0])
        text = f"stopped by {signal.Signals(number).name}"
        timer = threading.Timer(FIRST_NODE_S, interrupt, [text])
        timer.daemon = True
        timer.start()

    def interrupt(text: str) -> None:
        texts.append(text)
        _signal_main_thread()

    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP})
    return interrupt


def _signal_main_thread() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM)


def _read_work_span(report: Path) -> list[float] | None:
    try:
        start, end = map(float, report.read_text(encoding="utf-8").split())
        report.unlink()
    except (OSError, ValueError):
        return None
    return [start, end]


def _append_to_log(output: Path, log: Path) -> None:
    """Move the output to the end of the rule's log. Snakemake empties that log at the start."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(output.read_bytes())
    output.unlink()


def _format_exception(error: BaseException) -> str:
    """The last lines of the exception, without its traceback."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return "\n".join(lines[-8:])
