"""What the engine's processes and GPUs use, sampled for as long as an allocation lasts.

The sampler is a process of its own and ends with the one that started it. It appends one line of
JSON per device and sample, keyed as `columns.TELEMETRY`; a cell remembers where the file ended
when its load began and reads on from there. The engine, the GPUs and the server are each asked in
a thread of their own: where one hangs, its rows or values are missing, and the others go on.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from servegrid.node import nvml, processes
from servegrid.node.nvml import Row
from servegrid.study.endpoint import Endpoint
from servegrid.telemetry.server import gauges

RATE_HZ = 10.0
SCRAPE_HZ = 1.0
STOP_LIMIT_S = 5.0
ENGINE = "engine"

_KIB = 1024
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Sampler:
    """Samples the processes `pids` and the allocation's GPUs into `file` while it is entered.

    With `endpoint`, also what its server says of its load, in rows of the engine about SCRAPE_HZ
    times a second.
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
        with processes.signals_held():
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, text=True, start_new_session=True
            )
        assert self._process.stdin
        # What stands on a command line can be read by others.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(self._endpoint.to_json() if self._endpoint else "")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A process that waits in the kernel for a driver ends when that answers, not when asked.
        for end in (self._process.terminate, self._process.kill):
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
                return


def offset(file: Path) -> int:
    """Where `file` ends now, in bytes; what is sampled later comes behind it."""
    return file.stat().st_size


def slice(file: Path, offset: int, start_ns: int, end_ns: int) -> list[Row]:
    """The samples behind `offset` from `start_ns` to `end_ns`, both of CLOCK_MONOTONIC."""
    with file.open("rb") as stream:
        stream.seek(offset)
        lines = stream.read().splitlines(keepends=True)
    rows = (json.loads(line) for line in lines if line.endswith(b"\n"))
    return [row for row in rows if start_ns <= row["time_ns"] <= end_ns]


def engine_row(pids: Sequence[int], proc: Path = Path("/proc")) -> Row:
    """Memory and CPU time of the processes `pids`, as far as they still live.

    Memory is what they have in RAM, anonymous and shared, plus the mapped files of the one that
    has most of them: the processes of one engine map the same libraries and weights. (The exact
    share of each, PSS, would cost 10 to 26 ms per process and sample on an engine of 3 GB.) Null
    where none is left.
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


class Gauges:
    """What a server says of its load, asked in a thread: a slow answer delays no sample."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._told: deque[Row] = deque(maxlen=1)
        threading.Thread(target=self._ask, daemon=True).start()

    def take(self) -> Row:
        """What it has said since this was last asked; empty where nothing."""
        with contextlib.suppress(IndexError):
            return self._told.pop()
        return {}

    def _ask(self) -> None:
        for _ in _ticks(SCRAPE_HZ):
            self._told.append(gauges(self._endpoint))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Samples an engine's processes, its GPUs and what its server says. The "
        "endpoint of the server, if any, comes as JSON on standard input, as it holds a key."
    )
    parser.add_argument("--pids", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hz", type=float, required=True)
    parser.add_argument("--parent", type=int, required=True, help="the process to end with")
    options = parser.parse_args(arguments)
    endpoint = sys.stdin.read()
    server = Gauges(Endpoint.from_json(endpoint)) if endpoint else None
    # Whole lines at the end, whichever thread they are from; closed with the process alone.
    file = os.open(options.out, os.O_WRONLY | os.O_APPEND)
    # A driver that hangs takes its own thread along, and neither the engine's samples nor the end.
    threading.Thread(target=_sample_gpus, args=(file, options.hz), daemon=True).start()
    for time_ns in _ticks(options.hz):
        if os.getppid() != options.parent:
            return
        told = server.take() if server else {}
        _append(file, time_ns, engine_row(options.pids) | told)


def _sample_gpus(file: int, hz: float) -> None:
    with nvml.driver() as driver:
        if driver is None:
            return
        try:
            gpus = nvml.visible_gpus(driver, os.environ)
        except driver.NVMLError as error:
            nvml.complain(error)
            return
        for _ in _ticks(hz) if gpus else ():
            for uuid, handle in gpus.items():
                time_ns = time.monotonic_ns()
                _append(file, time_ns, nvml.gpu_row(driver, uuid, handle))


def _append(file: int, time_ns: int, row: Row) -> None:
    os.write(file, f"{json.dumps({'time_ns': time_ns, **row})}\n".encode())


def _ticks(hz: float) -> Iterator[int]:
    """The time in ns, `hz` times a second; what cannot be in time is left out, not made up for."""
    due = time.monotonic()
    while True:
        yield time.monotonic_ns()
        due = max(due + 1 / hz, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def _status(path: Path) -> dict[str, int]:
    """The fields of /proc/PID/status that are in kB."""
    fields = (line.split() for line in path.read_text().splitlines())
    return {f[0].rstrip(":"): int(f[1]) for f in fields if len(f) == 3 and f[2] == "kB"}


def _cpu_s(path: Path) -> float:
    """User and system time of /proc/PID/stat, that of threads that have ended included."""
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


if __name__ == "__main__":
    main()
