"""What the engine's processes and GPUs use, sampled for as long as an allocation lasts.

The sampler is a process of its own and ends with the one that started it. It appends one line of
JSON per device and sample, keyed as `records.TELEMETRY`; a cell remembers where the file ended
when its load began and reads on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from servegrid import processes

RATE_HZ = 10.0
STOP_LIMIT_S = 5.0
ENGINE = "engine"

Row = dict[str, Any]

_KIB = 1024
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Sampler:
    """Samples the processes `pids` and the allocation's GPUs into `file` while it is entered."""

    def __init__(self, pids: Sequence[int], file: Path, hz: float = RATE_HZ) -> None:
        self._file = file
        self._command = [sys.executable, "-m", __name__, "--out", str(file), "--hz", str(hz)]
        self._command += ["--parent", str(os.getpid()), "--pids", *map(str, pids)]

    def __enter__(self) -> Self:
        self._file.touch()
        with processes.signals_held():
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, start_new_session=True
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


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


def visible_gpus(nvml: Any, environment: Mapping[str, str]) -> list[Any]:
    """NVML's handles of the GPUs that CUDA_VISIBLE_DEVICES names: all of them where it is unset.

    NVML itself knows nothing of that variable, whose entries are indices, here in PCI order as
    NVML counts, or UUIDs that may be cut short.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return handles
    by_uuid = {nvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    found = []
    for name in filter(None, map(str.strip, named.split(","))):
        if name.isdecimal():
            found += handles[int(name) : int(name) + 1]
        else:
            found += [handle for uuid, handle in by_uuid.items() if uuid.startswith(name)]
    return found


def gpu_row(nvml: Any, handle: Any) -> Row:
    """One sample of a GPU; a reading that it does not support is null."""

    def read(name: str, *arguments: Any) -> Any:
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            return getattr(nvml, name)(handle, *arguments)
        return None

    def scaled(value: float | None, factor: float) -> float | None:
        return None if value is None else value * factor

    memory, rates = read("nvmlDeviceGetMemoryInfo"), read("nvmlDeviceGetUtilizationRates")
    return {
        "device": nvml.nvmlDeviceGetUUID(handle),
        "memory_bytes": memory and memory.used,
        "utilization": rates and scaled(rates.gpu, 0.01),
        "power_w": scaled(read("nvmlDeviceGetPowerUsage"), 0.001),
        "energy_j": scaled(read("nvmlDeviceGetTotalEnergyConsumption"), 0.001),
        "sm_clock_mhz": read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        "temperature_c": read("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "throttle_reasons": read("nvmlDeviceGetCurrentClocksThrottleReasons"),
    }


@contextlib.contextmanager
def gpu_source(environment: Mapping[str, str]) -> Iterator[Callable[[], list[Row]]]:
    """What gives a row for each of the allocation's GPUs; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield list
        return
    try:
        handles = visible_gpus(pynvml, environment)
        yield lambda: [gpu_row(pynvml, handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def sample(rows: Callable[[], list[Row]], file: Path, hz: float, parent: int) -> None:
    """Append `rows` to `file` `hz` times a second for as long as `parent` lives.

    Samples that cannot be taken in time are left out, not made up for.
    """
    with file.open("ab", buffering=0) as stream:
        due = time.monotonic()
        while os.getppid() == parent:
            time_ns = time.monotonic_ns()
            lines = (json.dumps({"time_ns": time_ns, **row}) for row in rows())
            stream.write("".join(f"{line}\n" for line in lines).encode())
            due = max(due + 1 / hz, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Samples an engine's processes and GPUs.")
    parser.add_argument("--pids", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hz", type=float, default=RATE_HZ)
    parser.add_argument("--parent", type=int, required=True, help="the process to end with")
    options = parser.parse_args(arguments)
    with gpu_source(os.environ) as gpus:
        sample(lambda: [engine_row(options.pids), *gpus()], options.out, options.hz, options.parent)


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
