"""`servegrid` as a process: its output ends early, cannot be written, or it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVEGRID = (sys.executable, "-m", "servegrid.cli.main")
PLAN = (*SERVEGRID, "capacity", "--published", "inria-2024")
FULL = Path("/dev/full")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_nobody_reads_is_no_error(unbuffered: str) -> None:
    end, start = os.pipe()
    os.close(end)
    variables = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open(start, "wb") as unread:  # noqa: PTH123 - the end of a pipe
        done = subprocess.run(
            PLAN, stdout=unread, stderr=subprocess.PIPE, env=variables, check=False
        )
    # 1 would mean "slower" or "cannot work". 141 is what a shell gives for SIGPIPE.
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_error(unbuffered: str) -> None:
    variables = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with FULL.open("wb") as full:
        done = subprocess.run(
            PLAN, stdout=full, stderr=subprocess.PIPE, text=True, env=variables, check=False
        )
    assert done.returncode == 2
    assert done.stderr == (
        "servegrid: a file, or the standard output, cannot be written (No space left on device). "
        "Free some space.\n"
    )


def test_an_interrupt_shows_no_traceback() -> None:
    # Searching the number of users up to the largest one takes many seconds.
    slow = subprocess.Popen(
        [*PLAN, "--slo-attainment", "1e-12"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until_it_computes(slow.pid)
    slow.send_signal(signal.SIGINT)
    assert slow.communicate(timeout=60)[1] == "servegrid: interrupted\n"
    assert slow.returncode == 130


def wait_until_it_computes(pid: int) -> None:
    """Until pandas is loaded: an interrupt while modules are imported shows where that was."""
    deadline = time.monotonic() + 60
    maps = Path(f"/proc/{pid}/maps")
    while "pandas/_libs/groupby" not in maps.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)


def test_a_working_directory_that_is_gone_is_one_error(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    script = 'rmdir "$PWD"; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *PLAN], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "servegrid: the working directory cannot be used (No such file or directory). Change to a "
        "folder that exists.\n"
    )
