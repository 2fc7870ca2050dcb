"""Child processes that must end with this one, and their shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import psutil

BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""A terminal or a scheduler sends these to all processes of a job; the main one handles them."""

SHARED_MEMORY = Path("/dev/shm")
POLL_S = 0.02
KILL_TIMEOUT_S = 10.0
"""Time that the kernel may take to remove a killed process: it frees gigabytes of memory."""


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Block `BLOCKED_SIGNALS` in this thread; processes started in the block never receive them.

    A process inherits the signal mask of the thread that starts it, through exec and spawn. A
    signal that arrives during the block goes to another thread, or to this one after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def descendants(exclude: Collection[psutil.Process] = ()) -> list[psutil.Process]:
    """All processes below this one, except `exclude` and Python's resource tracker."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process not in exclude and not _is_resource_tracker(process)
    ]


def started_with(variable: str, value: str) -> list[psutil.Process]:
    """The processes that were started with this environment variable, whoever their parent is now.

    Only those that this user may look into; without this process and Python's resource tracker,
    which ends by itself when the others have ended.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                found.append(process)
    return [process for process in found if not _is_resource_tracker(process)]


def terminate(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """Send SIGTERM to `processes`, and SIGKILL to those that still run after `grace_s` seconds.

    Children of this process become zombies; the code that started them must wait for them.
    """
    running = list(processes)
    for signal_number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_TIMEOUT_S)):
        running = [process for process in running if not _has_ended(process)]
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal_number)
        deadline = time.monotonic() + limit_s
        while not all(map(_has_ended, running)) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def shared_memory_files(processes: Iterable[psutil.Process]) -> set[Path]:
    """The files of named shared memory and semaphores that `processes` have mapped now."""
    mapped = {inode for process in processes for inode in _mapped_inodes(process.pid)}
    found = set()
    for file in SHARED_MEMORY.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_ino in mapped:
                found.add(file)
    return found


def _mapped_inodes(pid: int) -> Iterator[int]:
    # Compare inodes, not names: the creator of a semaphore maps it under a temporary name.
    with contextlib.suppress(OSError):
        for line in os.fsdecode(Path(f"/proc/{pid}/maps").read_bytes()).splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(f"{SHARED_MEMORY}/"):
                yield int(fields[4])


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False
