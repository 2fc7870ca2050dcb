"""The calibration: plausible on a good node, and able to show a slow client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from servegrid.run import calibration
from servegrid.run.calibration import calibrate, describe_calibration
from servegrid.run.cores import assign_cpu_sets

CPU_SETS = assign_cpu_sets(os.sched_getaffinity(0), 8, on_gpu=False)


@pytest.mark.parametrize("unix", [False, True])
def test_a_calibration_gives_the_timing_error_and_leaves_nothing_behind(
    unix: bool, tmp_path: Path
) -> None:
    before = psutil.Process().children()
    result = calibrate(8, CPU_SETS, tmp_path / "socket" if unix else None)
    assert psutil.Process().children() == before
    assert list(tmp_path.iterdir()) == []
    json.dumps(result)
    assert (result["concurrency"], result["requests"], result["lost"]) == (8, 8, 0)
    assert result["token_events"] == 800
    assert 0 <= result["arrival_error_s_p50"] <= result["arrival_error_s_p99"]
    assert 0 < result["reading_s_p50"] < result["ttft_error_s_p50"] + 0.1
    assert result["cpu_s_per_1000_events"] > 0
    assert "at concurrency 8 " in describe_calibration(result)


def test_a_client_that_is_stopped_for_a_while_has_a_large_timing_error(tmp_path: Path) -> None:
    """On a Unix socket, where arrivals have no kernel time stamps."""
    program = (
        "import json, os, sys; from pathlib import Path;"
        "from servegrid.run.cores import assign_cpu_sets;"
        "from servegrid.run.calibration import calibrate;"
        "sets = assign_cpu_sets(os.sched_getaffinity(0), 4, False);"
        "result = calibrate(4, sets, Path(sys.argv[1]));"
        "print(json.dumps(result))"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "socket")],
        stdout=subprocess.PIPE,
        text=True,
    )
    stopping = threading.Event()

    def interrupt() -> None:
        while not stopping.wait(0.2):
            client.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            client.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        result = json.loads(client.communicate(timeout=120)[0])
    finally:
        stopping.set()
        thread.join()
        client.kill()
        client.wait()
    # Stopped half of the time, 0.2 s each time: at least 1% of the arrivals are that late.
    assert result["arrival_error_s_p99"] > 0.1


def test_a_failed_calibration_returns_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(calibration.calibration_workload(4), input_len=7, requests=5)
    monkeypatch.setattr(calibration, "calibration_workload", lambda concurrency: broken)
    result = calibrate(4, CPU_SETS)
    assert result["error"].startswith(
        "requests 5: a burst workload of concurrency 4 needs a multiple"
    )
    assert "no cell will be valid" in describe_calibration(result)


def test_the_mock_server_ends_with_the_calibrating_process() -> None:
    program = (
        "import time; from servegrid.mock_server.process import start_mock_server;"
        "from servegrid.mock_server.responses import ResponseScript\n"
        "with start_mock_server(ResponseScript()): print('up', flush=True); time.sleep(99)"
    )
    client = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    client.stdout.readline()
    (server,) = psutil.Process(client.pid).children()
    client.kill()
    client.wait()
    client.stdout.close()
    server.wait(20)
