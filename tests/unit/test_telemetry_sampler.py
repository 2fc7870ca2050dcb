"""The sampler's rows of an engine from a fake /proc, and the sampler process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from servegrid.records import columns, parquet
from servegrid.telemetry import sampler

TICKS = os.sysconf("SC_CLK_TCK")


def write_process(
    proc: Path, pid: int, anonymous: int, files: int, shared: int, ticks: tuple[int, int]
) -> None:
    """A process of /proc with memory in kB; see proc(5) for the fields."""
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "status").write_text(
        f"Name:\tpython\nState:\tS (sleeping)\nThreads:\t4\n"
        f"VmRSS:\t{anonymous + files + shared} kB\n"
        f"RssAnon:\t{anonymous} kB\nRssFile:\t{files} kB\nRssShmem:\t{shared} kB\n"
    )
    before = f"{pid} (an odd) name) S 1 1 1 0 -1 4194304 0 0 0 0"
    (folder / "stat").write_text(f"{before} {ticks[0]} {ticks[1]} 7 7 20 0 4 0 100 0 0\n")


def test_mapped_files_are_counted_once_and_cpu_times_are_added(tmp_path: Path) -> None:
    write_process(tmp_path, 10, anonymous=1000, files=300, shared=20, ticks=(150, 50))
    write_process(tmp_path, 11, anonymous=4000, files=500, shared=30, ticks=(900, 100))
    assert sampler.sample_processes([10, 11], tmp_path) == {
        "device": "engine",
        "memory_bytes": (1000 + 20 + 4000 + 30 + 500) * 1024,
        "cpu_s": 1200 / TICKS,
    }


def test_ended_processes_are_ignored_and_no_process_means_unknown(tmp_path: Path) -> None:
    write_process(tmp_path, 10, anonymous=1000, files=300, shared=20, ticks=(150, 50))
    assert sampler.sample_processes([9, 10], tmp_path)["memory_bytes"] == 1320 * 1024
    assert sampler.sample_processes([9], tmp_path) == {"device": "engine"}


def test_samples_are_read_after_the_offset_and_within_the_times(
    tmp_path: Path,
) -> None:
    file = tmp_path / "telemetry.jsonl"

    def append(*times: int) -> None:
        with file.open("a") as stream:
            stream.writelines(json.dumps({"time_ns": time}) + "\n" for time in times)

    append(1, 2)
    offset = sampler.end_offset(file)
    append(2, 3, 4, 5)
    with file.open("a") as stream:
        stream.write('{"time_ns": 4')  # still being written
    assert [row["time_ns"] for row in sampler.read_samples(file, offset, 2, 4)] == [2, 3, 4]
    assert [row["time_ns"] for row in sampler.read_samples(file, 0, 1, 2)] == [1, 2, 2]


def samples(file: Path, count: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 30
    while len(rows := sampler.read_samples(file, 0, 0, time.monotonic_ns())) < count:
        assert time.monotonic() < deadline, f"{len(rows)} samples"
        time.sleep(0.02)
    return rows


def test_the_sampler_samples_a_process_until_its_block_ends(tmp_path: Path) -> None:
    file = tmp_path / "telemetry.jsonl"
    with sampler.Sampler([os.getpid()], file, hz=50):
        assert sampler.end_offset(file) >= 0
        rows = samples(file, 3)
        (process,) = (
            child for child in psutil.Process().children() if str(file) in child.cmdline()
        )
    assert not process.is_running()
    times = [row["time_ns"] for row in rows]
    assert times == sorted(set(times))
    rss = psutil.Process().memory_info().rss
    assert rows[-1]["memory_bytes"] == pytest.approx(rss, rel=0.2)
    assert 0 < rows[-1]["cpu_s"] <= sum(psutil.Process().cpu_times()[:2]) + 1 / TICKS
    assert parquet.arrow_table(columns.TELEMETRY, rows).num_rows == len(rows)


def test_the_sampler_ends_with_its_parent(tmp_path: Path) -> None:
    file = tmp_path / "telemetry.jsonl"
    code = (
        "import os, sys, time, pathlib; from servegrid.telemetry import sampler\n"
        "with sampler.Sampler([os.getpid()], pathlib.Path(sys.argv[1]), hz=50): time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(file)])
    while not file.exists():
        time.sleep(0.02)
    samples(file, 1)
    (process,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    gone, _ = psutil.wait_procs([process], timeout=30)
    assert gone == [process]
