"""The commands that the comparison with other clients runs, and servegrid's own one."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

import peers
from peer_results import PeerError

pytestmark = pytest.mark.crowded

BURN = "import time\nwhile time.process_time() < 0.5: pass"


def run_and_sample(program: str, folder: Path) -> list[tuple[float, float]]:
    return peers.run_and_sample([sys.executable, "-c", program], os.environ, folder)


def test_the_cpu_time_of_all_processes_is_counted(tmp_path: Path) -> None:
    start = time.monotonic()
    program = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])\n{BURN}"
    samples = run_and_sample(program, tmp_path)
    times, cpu_s = zip(*samples, strict=True)
    assert list(times) == sorted(times)
    assert list(cpu_s) == sorted(cpu_s)
    assert 1.0 <= cpu_s[-1] < 2 * (time.monotonic() - start)


def test_a_failed_command_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"it exited with 3: no tokenizer"):
        run_and_sample("import sys; print('no tokenizer\\n'); sys.exit(3)", tmp_path)


def test_a_command_that_hangs_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "TIMEOUT_S", 2.0)
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(100)"
    )
    with pytest.raises(PeerError, match="did not end within 2 s") as raised:
        run_and_sample(program, tmp_path)
    child = int(str(raised.value).split()[-1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_servegrids_own_command_works(tmp_path: Path) -> None:
    programs = Path(sys.executable).parent
    errors, cpu_s = peers.run(peers.OURS, programs, concurrency=2, requests=4, tokenizer=tmp_path)
    assert errors.lost == 0
    assert len(errors.ttft) == len(errors.mean_itl) == 4
    assert errors.itl is not None
    assert len(errors.itl) == 4 * 99
    assert cpu_s > 0
