"""Whose lock may be removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snakemake_executor_plugin_submitit.unlock import HOLDER, LOCKS, hold, remove_stale_locks


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two lock files whose holder has been killed."""
    monkeypatch.chdir(tmp_path)
    LOCKS.mkdir(parents=True)
    locks = [LOCKS / name for name in ("0.input.lock", "0.output.lock")]
    for lock in locks:
        lock.write_text("out/a\n")
    program = (
        "import os, signal; from snakemake_executor_plugin_submitit.unlock import hold; hold(); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    return locks


def left(locks: list[Path]) -> int:
    return sum(lock.exists() for lock in locks)


def test_the_lock_of_a_dead_process_goes(held: list[Path]) -> None:
    assert remove_stale_locks() == 2
    assert left(held) == 0
    assert remove_stale_locks() == 0


def test_the_lock_of_a_living_process_stays(held: list[Path]) -> None:
    hold()
    assert remove_stale_locks() == 0
    assert left(held) == 2


def elsewhere(holder: dict[str, Any]) -> None:
    holder["host"] = "another-machine"


def reused(holder: dict[str, Any]) -> None:
    holder["pid"] = os.getpid()


@pytest.mark.parametrize(("change", "removed"), [(elsewhere, 0), (reused, 2)])
def test_a_holder_is_known_by_machine_and_beginning(
    held: list[Path], change: Callable[[dict[str, Any]], None], removed: int
) -> None:
    holder = json.loads(HOLDER.read_text())
    change(holder)
    HOLDER.write_text(json.dumps(holder))
    assert remove_stale_locks() == removed


def test_a_younger_lock_is_somebody_else_s(held: list[Path]) -> None:
    young = HOLDER.stat().st_mtime_ns + 10**9
    os.utime(held[0], ns=(young, young))
    assert remove_stale_locks() == 1
    assert [lock.exists() for lock in held] == [True, False]


def test_without_a_holder_nothing_is_touched(held: list[Path]) -> None:
    HOLDER.unlink()
    assert remove_stale_locks() == 0
    assert left(held) == 2
