"""Which locks are removed, and which stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snakemake_executor_plugin_submitit.unlock import (
    HOLDER,
    LOCKING_S,
    LOCKS,
    record_lock_holder,
    remove_stale_locks,
)


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two lock files of a killed process."""
    monkeypatch.chdir(tmp_path)
    LOCKS.mkdir(parents=True)
    locks = [LOCKS / name for name in ("0.input.lock", "0.output.lock")]
    for lock in locks:
        lock.write_text("out/a\n")
    program = (
        "import os, signal; from snakemake_executor_plugin_submitit import unlock; "
        "unlock.record_lock_holder(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    return locks


def count_left(locks: list[Path]) -> int:
    return sum(lock.exists() for lock in locks)


def test_the_lock_of_a_dead_process_is_removed(held: list[Path]) -> None:
    assert remove_stale_locks() == 2
    assert count_left(held) == 0
    assert remove_stale_locks() == 0


def test_the_lock_of_a_live_process_stays(held: list[Path]) -> None:
    record_lock_holder()
    assert remove_stale_locks() == 0
    assert count_left(held) == 2


def elsewhere(holder: dict[str, Any]) -> None:
    holder["host"] = "another-machine"


def reused(holder: dict[str, Any]) -> None:
    holder["pid"] = os.getpid()


@pytest.mark.parametrize(("change", "removed"), [(elsewhere, 0), (reused, 2)])
def test_a_holder_is_identified_by_machine_and_start_time(
    held: list[Path], change: Callable[[dict[str, Any]], None], removed: int
) -> None:
    holder = json.loads(HOLDER.read_text())
    change(holder)
    HOLDER.write_text(json.dumps(holder))
    assert remove_stale_locks() == removed


def test_a_lock_much_younger_than_its_record_stays(held: list[Path]) -> None:
    young = HOLDER.stat().st_mtime_ns + int(1.1e9 * LOCKING_S)
    os.utime(held[0], ns=(young, young))
    assert remove_stale_locks() == 1
    assert [lock.exists() for lock in held] == [True, False]


def test_without_a_recorded_holder_nothing_is_removed(held: list[Path]) -> None:
    HOLDER.unlink()
    assert remove_stale_locks() == 0
    assert count_left(held) == 2


SNAKEFILE = """
import os
# The first thing that Snakemake does under its lock, long before it creates an executor.
from snakemake.dag import DAG
DAG.postprocess = lambda *_, **__: os.kill(os.getpid(), 9)
rule a:
    output: "a"
    shell: "touch {output}"
"""


def test_the_lock_of_a_process_killed_right_after_it_locked_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("Snakefile").write_text(SNAKEFILE, encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "--executor", "submitit", "--jobs", "1"]
    assert subprocess.run(command, capture_output=True).returncode == -9
    assert len([*LOCKS.glob("*.lock")]) == 1
    assert remove_stale_locks() == 1


def test_a_process_that_finds_the_folder_locked_does_not_replace_the_holder(
    held: list[Path],
) -> None:
    Path("Snakefile").write_text(SNAKEFILE.replace('"a"\n', '"out/a"\n'), encoding="utf-8")
    before = HOLDER.read_text()
    command = [sys.executable, "-m", "snakemake", "--executor", "submitit", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "LockException" in done.stdout + done.stderr
    assert HOLDER.read_text() == before
