"""Temporary folders that do not stay, even if the process that made them is killed.

A killed process cannot remove its folder, and Slurm can kill every process of a job at once. So the
next folder that the same user makes on the machine removes those whose process has ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

_NAME = re.compile(r"servegrid-([0-9a-f]+)-([0-9a-f]+)-([0-9a-f]+)-\w+")


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder with mode 0700 for the block."""
    remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=f"{_prefix()}-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def remove_abandoned() -> None:
    """Remove this user's temporary folders whose process has ended.

    Only of processes in the same PID namespace: the processes of a container look ended from
    another one, but it can share the folder.
    """
    for path in Path(tempfile.gettempdir()).glob("servegrid-*"):
        match = _NAME.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if match is None or path.is_symlink() or path.stat().st_uid != os.geteuid():
                continue
            namespace, pid, started_s = (int(number, 16) for number in match.groups())
            if namespace == _namespace() and not _is_running(pid, started_s):
                shutil.rmtree(path, ignore_errors=True)


def _prefix() -> str:
    pid = os.getpid()
    # Hexadecimal, because Unix sockets are in the folder, and their paths must be short.
    return f"servegrid-{_namespace():x}-{pid:x}-{_started_s(pid):x}"


def _namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _started_s(pid: int) -> int:
    return round(psutil.Process(pid).create_time())


def _is_running(pid: int, started_s: int) -> bool:
    """Whether the process runs, and not a later one with its pid."""
    try:
        # psutil derives the time from the boot time, which changes with the system clock.
        return abs(_started_s(pid) - started_s) < 60
    except psutil.NoSuchProcess:
        return False
