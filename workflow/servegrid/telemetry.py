"""What the engine's processes and GPUs do meanwhile: a sampler in a process of its own.

It runs as long as its allocation and appends one JSON line per sample; a cell notes where the
file ends when it begins and later reads on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

RATE_HZ = 10.0
STOP_LIMIT_S = 5.0
PR_SET_PDEATHSIG = 1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

Source = Callable[[], Iterator[Mapping[str, Any]]]
"""Gives one mapping of telemetry columns per device, without the time."""


class Sampler:
    """Samples the processes `pids` and the visible GPUs into `file` while the context is open."""

    def __init__(self, pids: Sequence[int], file: Path, rate_hz: float = RATE_HZ) -> None:
        self.file = file
        self.command = [sys.executable, "-m", "servegrid.telemetry", "--file", str(file)]
        self.command += ["--rate-hz", str(rate_hz), "--pids", *map(str, pids)]

    def __enter__(self) -> Self:
        self.file.touch()
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def offset(file: Path) -> int:
    """Where the samples to come will begin."""
    return file.stat().st_size


def between(file: Path, start: int, first_ns: int, last_ns: int) -> list[dict[str, Any]]:
    """The samples from position `start` on that were taken in [first_ns, last_ns]."""
    with file.open("rb") as samples:
        samples.seek(start)
        lines = samples.read().splitlines(keepends=True)
    rows = (json.loads(line) for line in lines if line.endswith(b"\n"))
    return [row for row in rows if first_ns <= row["time_ns"] <= last_ns]


def processes(pids: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    """Memory and CPU time of the engine's processes together, as one device."""
    memory, cpu = 0, 0.0
    found = False
    for pid in pids:
        with contextlib.suppress(OSError):
            memory += _resident_bytes(pid)
            cpu += _cpu_s(pid)
            found = True
    if found:
        yield {"device": "engine", "memory_bytes": memory, "cpu_s": round(cpu, 3)}


def _resident_bytes(pid: int) -> int:
    """Resident set size. What processes share counts in each; the proportional size, which
    would not, walks all pages: 6 ms for 500 MB, too much at 10 Hz beside an engine.
    """
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def gpus(nvml: Any) -> Source:
    """A source for the GPUs that this process may use; `nvml` is the module `pynvml`.

    Raises nvml.NVMLError where there is no driver.
    """
    nvml.nvmlInit()
    handles = visible(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))

    def ask(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(*arguments)
        except (nvml.NVMLError, AttributeError):  # not supported here: unknown, never 0
            return None

    def scaled(value: float | None, factor: float) -> float | None:
        return None if value is None else value * factor

    def sample() -> Iterator[Mapping[str, Any]]:
        for uuid, handle in handles:
            memory = ask("nvmlDeviceGetMemoryInfo", handle)
            rates = ask("nvmlDeviceGetUtilizationRates", handle)
            yield {
                "device": uuid,
                "memory_bytes": None if memory is None else int(memory.used),
                "utilization": None if rates is None else rates.gpu / 100,
                "power_w": scaled(ask("nvmlDeviceGetPowerUsage", handle), 1e-3),
                "energy_j": scaled(ask("nvmlDeviceGetTotalEnergyConsumption", handle), 1e-3),
                "sm_clock_mhz": ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
                "memory_clock_mhz": ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
                "temperature_c": ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
                "throttle_reasons": ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle),
            }

    return sample


def visible(nvml: Any, allowed: str | None) -> list[tuple[str, Any]]:
    """UUID and handle of each GPU in CUDA_VISIBLE_DEVICES (indices in PCI order, or UUIDs).

    NVML itself shows all GPUs of the node; None allows them all.
    """
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
        names = None if allowed is None else [each.strip() for each in allowed.split(",")]
        if names is None or str(index) in names or any(n and uuid.startswith(n) for n in names):
            found.append((uuid, handle))
    return found


def sources(pids: Sequence[int]) -> list[Source]:
    """The engine's processes, and the GPUs where NVML finds a driver."""
    found: list[Source] = [lambda: processes(pids)]
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        found.append(gpus(pynvml))
    return found


def record(file: Path, wanted: Sequence[Source], rate_hz: float) -> None:
    """Sample until the process is ended."""
    period_ns = int(1e9 / rate_hz)
    due = time.monotonic_ns()
    with file.open("a", buffering=1) as samples:
        while True:
            for source in wanted:
                for values in source():
                    samples.write(json.dumps({"time_ns": time.monotonic_ns(), **values}) + "\n")
            due = max(due + period_ns, time.monotonic_ns())
            time.sleep(max(0.0, (due - time.monotonic_ns()) / 1e9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pids", type=int, nargs="+", required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--rate-hz", type=float, default=RATE_HZ)
    arguments = parser.parse_args()
    # A sampler without its allocation would run for ever.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    record(arguments.file, sources(arguments.pids), arguments.rate_hz)


if __name__ == "__main__":
    main()
