"""Processes of ours that must not outlive us, and what they have in shared memory."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import psutil

HELD = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""What a terminal or a scheduler sends to a whole job, and the job's own process answers."""

SHARED_MEMORY = Path("/dev/shm")
POLL_S = 0.02
KILLED_S = 10.0
"""How long the kernel may take to clear a killed process away; it has gigabytes to free."""


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Block `HELD` in this thread: processes begun in the block never receive them.

    A process inherits the mask of the thread that starts it, through exec and spawn. A signal
    that comes meanwhile is delivered to another thread, or to this one when the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def descendants(but: Collection[psutil.Process] = ()) -> list[psutil.Process]:
    """All processes below this one except `but` and Python's shared resource tracker."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process not in but and not _is_resource_tracker(process)
    ]


def end(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """End `processes`: asked first, killed after `grace_s` seconds.

    Those that are children of this process stay for whoever started them to wait for.
    """
    left = list(processes)
    for signal_number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILLED_S)):
        left = [process for process in left if not _has_ended(process)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal_number)
        deadline = time.monotonic() + limit_s
        while not all(map(_has_ended, left)) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """The files of named shared memory and semaphores that `processes` have mapped now."""
    mapped = {inode for process in processes for inode in _mapped_inodes(process.pid)}
    found = set()
    for file in SHARED_MEMORY.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_ino in mapped:
                found.add(file)
    return found


def _mapped_inodes(pid: int) -> Iterator[int]:
    # By inode, for whoever makes a semaphore has it mapped under a name that is gone.
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(f"{SHARED_MEMORY}/"):
                yield int(fields[4])


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False
