"""A small process that cleans up after an engine, above all when nobody else is left to do so.

An allocation that is killed outright cannot stop its engine, and vLLM's processes then stay,
with their memory. The warden ends what it was told to watch as soon as its parent has ended or
has closed its pipe.
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
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from servegrid.node import processes

GRACE_S = 5.0
PARENT_CHECK_S = 2.0
END_LIMIT_S = 2 * GRACE_S + processes.KILLED_S


class Warden:
    """What is told to the warden's process; `folder`, of mode 0700, goes with the engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", __name__, str(os.getpid()), str(folder)]
        # In a session of its own, it survives what kills the job's process group.
        with processes.signals_held():
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, text=True, start_new_session=True
            )

    def watch(self, engine: Iterable[psutil.Process]) -> None:
        """Have `engine`, and the shared memory it has now, removed in the end."""
        engine = list(engine)
        told = {
            "processes": [each for process in engine for each in _identity(process)],
            "files": sorted(map(str, processes.shared_memory(engine))),
        }
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(told) + "\n")
            self._process.stdin.flush()

    def dismiss(self) -> None:
        """Let it clean up what is left now, and end."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def guarded() -> Iterator[Warden]:
    """A warden, and a fresh folder for what an engine needs on disk, for the block."""
    with tempfile.TemporaryDirectory(prefix="servegrid-", ignore_cleanup_errors=True) as folder:
        warden = Warden(Path(folder))
        try:
            yield warden
        finally:
            warden.dismiss()


class Remains:
    """What an engine would leave if it ended now."""

    def __init__(self) -> None:
        self.processes: set[psutil.Process] = set()
        self.files: set[Path] = set()

    def note(self, told: str) -> None:
        """Take up one line of `Warden.watch`."""
        line = json.loads(told)
        self.files.update(map(Path, line["files"]))
        for pid, created in line["processes"]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.create_time() == created:
                    self.processes.add(process)

    def remove(self, grace_s: float) -> None:
        """End the processes with all below them, then remove the shared memory."""
        engine = set(self.processes)
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.update(process.children(recursive=True))
        self.files |= processes.shared_memory(engine)
        processes.end(engine, grace_s)
        for file in self.files:
            file.unlink(missing_ok=True)


def _identity(process: psutil.Process) -> Iterator[tuple[int, float]]:
    with contextlib.suppress(psutil.NoSuchProcess):
        yield process.pid, process.create_time()


def _lines_until_end_of(parent: int) -> Iterator[str]:
    """Lines on standard input until it is closed, or `parent` has ended and nothing is left."""
    pending = b""
    while True:
        ended = os.getppid() != parent
        if select.select([0], [], [], 0 if ended else PARENT_CHECK_S)[0]:
            read = os.read(0, 1 << 16)
            if not read:
                return
            *lines, pending = (pending + read).split(b"\n")
            yield from (line.decode() for line in lines)
        elif ended:
            return


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    remains = Remains()
    for line in _lines_until_end_of(int(sys.argv[1])):
        remains.note(line)
    remains.remove(GRACE_S)
    shutil.rmtree(sys.argv[2], ignore_errors=True)


if __name__ == "__main__":
    main()
