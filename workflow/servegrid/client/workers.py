"""Several processes that put one load on a server, beginning at the same moment.

One process reads some ten thousand chunks a second; above a few hundred streams that is no longer
enough, and Python's threads would share it.
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
from typing import Any, Generic, TypeVar

from servegrid.errors import LoadError, ServegridError

STREAMS_PER_PROCESS = 512
"""A process keeps up with so many streams of 50 tokens/s on half of a slow core."""
CORES_PER_PROCESS = 4
"""Of the cores that a node has, for each process of the client at most one in so many."""
START_AFTER_S = 0.005
"""From when all are ready to the common start: time for all of them to hear of it."""

_PR_SET_PDEATHSIG = 1
_START = struct.Struct("q")
_READY = b"r"

Result = TypeVar("Result")
Start = Callable[[], int]
"""Waits for the common start and returns it, in ns of CLOCK_MONOTONIC."""


def wanted(concurrency: int) -> int:
    """How many processes so many streams take."""
    return -(-concurrency // STREAMS_PER_PROCESS)


def size(concurrency: int, cores: int) -> int:
    """How many they get on a node with so many cores."""
    return max(1, min(wanted(concurrency), cores // CORES_PER_PROCESS))


def run(
    parts: Sequence[Callable[[Start], Result]], places: Sequence[Collection[int]] = ()
) -> list[Result]:
    """What each of `parts` returns, each called in a process of its own with a common start.

    Each must call the function it is given once, when it is ready. `places` are the cores for
    each process. Raises what the first part to fail has raised, and LoadError where a process is
    gone without a word.
    """
    members = [_Member(part, places[number] if places else ()) for number, part in enumerate(parts)]
    try:
        for member in members:
            member.wait_until_ready()
        start_ns = time.monotonic_ns() + int(START_AFTER_S * 1e9)
        for member in members:
            member.begin(start_ns)
        return [member.result() for member in members]
    finally:
        for member in members:
            member.end()


class _Member(Generic[Result]):
    """One process: a pipe to it for the start, a pipe from it for a ready byte and its result."""

    def __init__(self, part: Callable[[Start], Result], cores: Collection[int]) -> None:
        told, self._tell = os.pipe()
        self._hear, answer = os.pipe()
        self._heard = bytearray()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _end_with(parent)
                if cores:
                    os.sched_setaffinity(0, cores)
                _work(part, told, answer)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(told)
        os.close(answer)

    def wait_until_ready(self) -> None:
        word = os.read(self._hear, 1)
        if word != _READY:
            self._heard += word
            self.result()

    def begin(self, start_ns: int) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._tell, _START.pack(start_ns))

    def result(self) -> Result:
        while data := os.read(self._hear, 1 << 20):
            self._heard += data
        try:
            error, result = pickle.loads(self._heard)
        except (pickle.UnpicklingError, EOFError):
            self._gone()
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def end(self) -> None:
        os.close(self._tell)
        os.close(self._hear)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _gone(self) -> Any:
        raise LoadError(
            "A process of the load client was ended from outside (out of memory?). Nothing of "
            "this load is kept; run the same command again."
        )


def _work(part: Callable[[Start], Any], told: int, answer: int) -> None:
    def start() -> int:
        os.write(answer, _READY)
        (start_ns,) = _START.unpack(os.read(told, _START.size))
        time.sleep(max(0.0, (start_ns - time.monotonic_ns()) / 1e9 - 0.001))
        while time.monotonic_ns() < start_ns:
            pass
        return int(start_ns)

    try:
        outcome: tuple[Exception | None, Any] = (None, part(start))
    except ServegridError as error:
        outcome = (error, None)
    data = memoryview(pickle.dumps(outcome, protocol=pickle.HIGHEST_PROTOCOL))
    while data:
        data = data[os.write(answer, data) :]
    os._exit(0)


def _end_with(parent: int) -> None:
    """Have this process killed when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
