"""Commands that the comparison with other clients runs, and servegrid's own."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

import peers
from peer_results import PeerError

BURN = "import time\nwhile time.process_time() < 0.5: pass"


def sampled(program: str, folder: Path) -> list[tuple[float, float]]:
    return peers.sampled([sys.executable, "-c", program], os.environ, folder)


def test_cpu_of_all_processes_is_counted(tmp_path: Path) -> None:
    start = time.monotonic()
    program = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])\n{BURN}"
    samples = sampled(program, tmp_path)
    at, cpu_s = zip(*samples, strict=True)
    assert list(at) == sorted(at)
    assert list(cpu_s) == sorted(cpu_s)
    assert 1.0 <= cpu_s[-1] < 2 * (time.monotonic() - start)


def test_a_command_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"it ended with 3: no tokenizer"):
        sampled("import sys; print('no tokenizer\\n'); sys.exit(3)", tmp_path)


def test_a_command_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "LIMIT_S", 2.0)
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(100)"
    )
    with pytest.raises(PeerError, match="had not ended after 2 s") as raised:
        sampled(program, tmp_path)
    child = int(str(raised.value).split()[-1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_servegrids_own_row(tmp_path: Path) -> None:
    programs = Path(sys.executable).parent
    found, cpu_s = peers.run(peers.OURS, programs, streams=2, requests=4, tokenizer=tmp_path)
    assert found.lost == 0
    assert len(found.ttft) == len(found.mean_itl) == 4
    assert found.itl is not None
    assert len(found.itl) == 4 * 99
    assert cpu_s > 0
