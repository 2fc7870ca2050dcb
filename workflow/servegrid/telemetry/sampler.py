"""Samples what the engine's processes and the GPUs use, for the whole allocation.

The sampler is a separate process; it ends with the process that started it. It appends one line of
JSON per device and sample, with the keys of `columns.TELEMETRY`. A cell notes the file's size when
its workload starts and reads the lines after that. The engine's processes, the GPUs and the server
are read by separate threads: if one of them hangs, its rows or values are missing and the others
go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from servegrid.node import nvml, processes
from servegrid.node.nvml import Row
from servegrid.study.endpoint import Endpoint
from servegrid.telemetry.server import read_gauges

RATE_HZ = 10.0
SCRAPE_HZ = 1.0
STOP_LIMIT_S = 5.0
ENGINE = "engine"

_KIB = 1024
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Sampler:
    """A context manager that samples the processes `pids` and the allocation's GPUs into `file`.

    With `endpoint`, it also reads the server's gauges about SCRAPE_HZ times per second and adds
    them to rows of the engine.
    """

    def __init__(
        self,
        pids: Sequence[int],
        file: Path,
        endpoint: Endpoint | None = None,
        hz: float = RATE_HZ,
    ) -> None:
        self._file = file
        self._endpoint = endpoint
        self._command = [sys.executable, "-m", __name__, "--out", str(file), "--hz", str(hz)]
        self._command += ["--parent", str(os.getpid()), "--pids", *map(str, pids)]

    def __enter__(self) -> Self:
        self._file.touch()
        with processes.block_signals():
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, encoding="utf-8", start_new_session=True
            )
        assert self._process.stdin
        # Not on the command line: other users can read it, and the endpoint contains the API key.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(self._endpoint.to_json() if self._endpoint else "")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A process that waits for a driver inside the kernel ends only when the driver answers.
        for stop in (self._process.terminate, self._process.kill):
            stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
                return


def end_offset(file: Path) -> int:
    """The size of `file` now, in bytes: later samples come after this offset."""
    return file.stat().st_size


def read_samples(file: Path, offset: int, start_ns: int, end_ns: int) -> list[Row]:
    """The samples after `offset` from `start_ns` to `end_ns` (ns of CLOCK_MONOTONIC)."""
    with file.open("rb") as stream:
        stream.seek(offset)
        lines = stream.read().splitlines(keepends=True)
    rows = (json.loads(line) for line in lines if line.endswith(b"\n"))
    return [row for row in rows if start_ns <= row["time_ns"] <= end_ns]


def wait_for(
    file: Path, offset: int, end_ns: int, devices: Collection[str], limit_s: float
) -> None:
    """Wait until each of `devices` has a sample from `end_ns` on: those of other nodes come late.

    After `limit_s` seconds the samples that are missing are left out.
    """
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found = {row["device"] for row in read_samples(file, offset, end_ns, sys.maxsize)}
        if found >= set(devices):
            return
        time.sleep(0.1)


def sample_processes(pids: Sequence[int], proc: Path = Path("/proc")) -> Row:
    """Memory and CPU time of those processes among `pids` that still run.

    Memory is the anonymous and shared memory of all of them, plus the mapped files of the process
    that has most of these: the processes of one engine map the same libraries and weights. (The
    exact share, PSS, takes 10 to 26 ms per process and sample for an engine of 3 GB.) If no process
    runs, memory and CPU time are null.
    """
    memory, files, cpu = 0, 0, 0.0
    alive = False
    for pid in pids:
        with contextlib.suppress(OSError, KeyError):
            kilobytes = _status(proc / str(pid) / "status")
            memory += kilobytes["RssAnon"] + kilobytes["RssShmem"]
            files = max(files, kilobytes["RssFile"])
            cpu += _cpu_s(proc / str(pid) / "stat")
            alive = True
    if not alive:
        return {"device": ENGINE}
    return {"device": ENGINE, "memory_bytes": (memory + files) * _KIB, "cpu_s": cpu}


class GaugePoller:
    """Reads the server's gauges in a thread, so that a slow answer delays no sample."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._latest: deque[Row] = deque(maxlen=1)
        threading.Thread(target=self._poll, daemon=True).start()

    def pop_latest(self) -> Row:
        """The newest gauges since the last call; empty if there are none."""
        with contextlib.suppress(IndexError):
            return self._latest.pop()
        return {}

    def _poll(self) -> None:
        for _ in _ticks(SCRAPE_HZ):
            self._latest.append(read_gauges(self._endpoint))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Samples an engine's processes, its GPUs and its server's gauges. The server's "
        "endpoint, if any, is read as JSON from standard input, because it contains the API key."
    )
    parser.add_argument("--pids", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hz", type=float, required=True)
    parser.add_argument("--parent", type=int, required=True, help="end when this process ends")
    options = parser.parse_args(arguments)
    endpoint = sys.stdin.read()
    poller = GaugePoller(Endpoint.from_json(endpoint)) if endpoint else None
    # O_APPEND: lines of different threads do not mix. Only the end of the process closes the file.
    file = os.open(options.out, os.O_WRONLY | os.O_APPEND)
    # A driver that hangs blocks only this thread, neither the engine's samples nor the exit.
    threading.Thread(target=_sample_gpus, args=(file, options.hz), daemon=True).start()
    for time_ns in _ticks(options.hz):
        if os.getppid() != options.parent:
            return
        gauges = poller.pop_latest() if poller else {}
        _append(file, time_ns, sample_processes(options.pids) | gauges)


def _sample_gpus(file: int, hz: float) -> None:
    with nvml.open_driver() as driver:
        if driver is None:
            return
        try:
            gpus = nvml.visible_gpus(driver, os.environ)
        except driver.NVMLError as error:
            nvml.warn_unavailable(error)
            return
        for _ in _ticks(hz) if gpus else ():
            for uuid, handle in gpus.items():
                time_ns = time.monotonic_ns()
                _append(file, time_ns, nvml.sample_gpu(driver, uuid, handle))


def _append(file: int, time_ns: int, row: Row) -> None:
    os.write(file, f"{json.dumps({'time_ns': time_ns, **row})}\n".encode())


def _ticks(hz: float) -> Iterator[int]:
    """The time in ns, `hz` times per second. Ticks that are missed are skipped."""
    due = time.monotonic()
    while True:
        yield time.monotonic_ns()
        due = max(due + 1 / hz, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def _status(path: Path) -> dict[str, int]:
    """The fields of /proc/PID/status that are in kB."""
    fields = (
        line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    return {f[0].rstrip(":"): int(f[1]) for f in fields if len(f) == 3 and f[2] == "kB"}


def _cpu_s(path: Path) -> float:
    """User and system time of /proc/PID/stat, including threads that have ended."""
    fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


if __name__ == "__main__":
    main()
