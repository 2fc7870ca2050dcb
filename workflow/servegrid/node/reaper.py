"""A small process that cleans up after an engine, even if the allocation's process is killed.

A killed process cannot stop its engine. vLLM's processes would then stay and keep their memory.
The reaper ends all processes that it watches as soon as its parent ends or closes the pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from servegrid.node import processes
from servegrid.node.folders import temporary_folder

GRACE_S = 5.0
PARENT_CHECK_S = 2.0
FOLDER_VARIABLE = "TMPDIR"
"""A process whose temporary folder is the reaper's belongs to the engine. The parent may not have
named it: a process that dies while it starts another one leaves an orphan."""
STOP_TIMEOUT_S = 2 * GRACE_S + processes.KILL_TIMEOUT_S


class Reaper:
    """The parent's side of the reaper process, which also removes `folder` (mode 0700)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", __name__, str(os.getpid()), str(folder)]
        # A new session: a signal that kills the job's process group does not reach the reaper.
        with processes.block_signals():
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, encoding="utf-8", start_new_session=True
            )

    def watch(self, engine: Iterable[psutil.Process]) -> None:
        """Add the processes `engine`, and the shared memory they use now, to the clean-up."""
        engine = list(engine)
        message = {
            "processes": [identity for process in engine for identity in _identity(process)],
            "files": sorted(map(str, processes.shared_memory_files(engine))),
        }
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Make the reaper clean up now, and wait until it has ended."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def start_reaper() -> Iterator[Reaper]:
    """A reaper for the block, with a new temporary folder for the engine's files."""
    with temporary_folder() as folder:
        reaper = Reaper(folder)
        try:
            yield reaper
        finally:
            reaper.close()


class CleanupSet:
    """Processes and shared-memory files to remove, besides the processes that use `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: set[psutil.Process] = set()
        self.files: set[Path] = set()

    def add(self, line: str) -> None:
        """Add what one line of `Reaper.watch` names."""
        message = json.loads(line)
        self.files.update(map(Path, message["files"]))
        for pid, created in message["processes"]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.create_time() == created:
                    self.processes.add(process)

    def remove(self, grace_s: float) -> None:
        """End the processes and all their descendants, then remove the shared memory."""
        engine = set(self.processes)
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.update(process.children(recursive=True))
        engine.update(self._orphans())
        while engine:
            self.files |= processes.shared_memory_files(engine)
            processes.terminate(engine, grace_s)
            # Those that were starting; what can't be killed must not hold up the rest.
            engine = set(self._orphans()) - engine
        for file in self.files:
            file.unlink(missing_ok=True)

    def _orphans(self) -> list[psutil.Process]:
        return processes.started_with(FOLDER_VARIABLE, str(self.folder))


def _identity(process: psutil.Process) -> Iterator[tuple[int, float]]:
    """Pid and start time: the kernel may give the pid to another process later."""
    with contextlib.suppress(psutil.NoSuchProcess):
        yield process.pid, process.create_time()


def _read_lines(parent: int) -> Iterator[str]:
    """Lines of standard input, until it is closed or `parent` has ended and no line is left."""
    pending = b""
    while True:
        ended = os.getppid() != parent
        if select.select([0], [], [], 0 if ended else PARENT_CHECK_S)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            yield from (line.decode() for line in lines)
        elif ended:
            return


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent, folder = int(sys.argv[1]), Path(sys.argv[2])
    cleanup = CleanupSet(folder)
    for line in _read_lines(parent):
        cleanup.add(line)
    cleanup.remove(GRACE_S)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
