"""Several processes that send one workload together and start at the same moment.

One process reads some ten thousand chunks per second. A few hundred concurrent requests need more,
and threads would not help: they share one interpreter lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import struct
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Generic, NoReturn, TypeVar

from servegrid.errors import LoadError, ServegridError

CONCURRENCY_PER_PROCESS = 512
"""One process serves this many concurrent requests of 50 tokens/s on half of a slow core."""
CORES_PER_PROCESS = 4
"""The client gets at most one process per this many cores of the node."""
START_DELAY_S = 0.005
"""Time from when all processes are ready to the common start, so that each learns of it before."""

_PR_SET_PDEATHSIG = 1
_HELPER_NICE = 10
"""A helper gives way to the client and to an engine on this CPU, but still makes progress."""
_START = struct.Struct("q")
_READY = b"r"

Result = TypeVar("Result")
WaitForStart = Callable[[], int]
"""Waits for the common start and returns it, in ns of CLOCK_MONOTONIC."""


def processes_needed(concurrency: int) -> int:
    """How many processes `concurrency` requests in flight need."""
    return -(-concurrency // CONCURRENCY_PER_PROCESS)


def processes_allowed(concurrency: int, cores: int) -> int:
    """How many processes the client gets on a node with `cores` cores."""
    return max(1, min(processes_needed(concurrency), cores // CORES_PER_PROCESS))


def run_parallel(
    tasks: Sequence[Callable[[WaitForStart], Result]],
    cpu_sets: Sequence[Collection[int]] = (),
) -> list[Result]:
    """Run each task in its own process, with a common start, and return their results.

    A task must call the function it is given exactly once, when it is ready. `cpu_sets` has the
    CPUs of each process. Raises the exception of the first task that failed, and LoadError if a
    process was killed.
    """
    workers = [
        _Worker(task, cpu_sets[number] if cpu_sets else ()) for number, task in enumerate(tasks)
    ]
    try:
        for worker in workers:
            worker.wait_until_ready()
        start_ns = time.monotonic_ns() + int(START_DELAY_S * 1e9)
        for worker in workers:
            worker.start(start_ns)
        return [worker.result() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


class _Worker(Generic[Result]):
    """One process. One pipe carries the start time to it, another its result back."""

    def __init__(self, task: Callable[[WaitForStart], Result], cpus: Collection[int]) -> None:
        start_reader, self._start_writer = os.pipe()
        self._result_reader, result_writer = os.pipe()
        self._received = bytearray()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                die_with(parent)
                if cpus:
                    os.sched_setaffinity(0, cpus)
                _run_task(task, start_reader, result_writer)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(start_reader)
        os.close(result_writer)

    def wait_until_ready(self) -> None:
        byte = os.read(self._result_reader, 1)
        if byte != _READY:
            self._received += byte
            self.result()

    def start(self, start_ns: int) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._start_writer, _START.pack(start_ns))

    def result(self) -> Result:
        while data := os.read(self._result_reader, 1 << 20):
            self._received += data
        try:
            error, result = pickle.loads(self._received)
        except (pickle.UnpicklingError, EOFError):
            raise_killed()
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def kill(self) -> None:
        os.close(self._start_writer)
        os.close(self._result_reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def raise_killed() -> NoReturn:
    """Raise LoadError: a process of the client has ended before its work was done."""
    raise LoadError(
        "A process of the load client was killed from outside (out of memory?). This measurement "
        "is lost. To repeat it, run the same command again."
    )


def _run_task(
    task: Callable[[WaitForStart], Result], start_reader: int, result_writer: int
) -> NoReturn:
    def wait_for_start() -> int:
        os.write(result_writer, _READY)
        (start_ns,) = _START.unpack(os.read(start_reader, _START.size))
        time.sleep(max(0.0, (start_ns - time.monotonic_ns()) / 1e9 - 0.001))
        while time.monotonic_ns() < start_ns:
            pass
        return int(start_ns)

    outcome: tuple[Exception | None, Result | None]
    try:
        outcome = (None, task(wait_for_start))
    except ServegridError as error:
        outcome = (error, None)
    data = memoryview(pickle.dumps(outcome, protocol=pickle.HIGHEST_PROTOCOL))
    while data:
        data = data[os.write(result_writer, data) :]
    os._exit(0)


def start_helper(task: Callable[[], None], kept: int) -> int:
    """Fork a process of low priority that runs `task` and ends. Returns its id.

    It has no open file but `kept` and the standard ones: the server would else not see that the
    parent closes a connection. A ServegridError ends it quietly.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        die_with(parent)
        _close_all_but(kept)
        # Rust threads of the parent do not exist here.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.nice(_HELPER_NICE)
        task()
    except ServegridError:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def end_helper(pid: int) -> None:
    """End a process of `start_helper` and wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _close_all_but(kept: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and descriptor != kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
