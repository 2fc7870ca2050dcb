"""What all engines share, without an engine."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import shared_memory
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from helpers.deployments import SMALL_VLLM
from servegrid.engines import Site, listening, start_engine
from servegrid.engines.vllm_server import resolved_config
from servegrid.errors import ConfigError, EngineError
from servegrid.node import processes, reaper
from servegrid.node.environment import set_environment
from servegrid.study.endpoint import Endpoint
from servegrid.telemetry.server import is_healthy

DEPLOYMENT = SMALL_VLLM


def test_an_unknown_engine_is_refused_with_the_list_of_engines() -> None:
    with pytest.raises(
        ConfigError,
        match=r"`vlm` is not an engine. Use one of: emulated, external, llamacpp, vllm\.",
    ):
        start_engine(replace(DEPLOYMENT, engine="vlm"), Site(models=Path("unused")))


def test_a_socket_path_that_is_too_long_for_the_kernel_is_refused() -> None:
    name = "/engine.sock"
    unix = Site(models=Path("unused"), socket="unix")
    longest = Path("/" + "x" * (107 - 1 - len(name)))
    assert listening.socket_path(unix, longest) == Path(f"{longest}{name}")
    with pytest.raises(EngineError, match=r"has 108 bytes; .* at most 107 bytes.*TMPDIR"):
        listening.socket_path(unix, Path(f"{longest}x"))
    assert listening.socket_path(replace(unix, socket="tcp"), longest) is None


class Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == "Bearer secret"
        self.send_response(self.status if known and self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def test_an_endpoint_is_healthy_if_health_returns_200(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}", "small", "secret")
        assert is_healthy(endpoint)
        monkeypatch.setattr(Health, "status", 503)
        assert not is_healthy(endpoint)
        server.shutdown()
        thread.join()
    assert not is_healthy(endpoint)


def test_wait_until_fails_at_the_deadline_and_names_the_deployment() -> None:
    listening.wait_until(lambda: True, deadline=0, name="small")
    with pytest.raises(EngineError, match="`small`: the engine did not start in time"):
        listening.wait_until(lambda: False, deadline=time.monotonic(), name="small")


def test_the_environment_is_restored_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "before")
    monkeypatch.setenv("REMOVED", "before")
    before = dict(os.environ)
    with set_environment({"KEPT": "inside", "OURS": "inside"}):
        assert (os.environ["KEPT"], os.environ["OURS"]) == ("inside", "inside")
        os.environ["LD_PRELOAD"] = "libsomething.so"
        del os.environ["REMOVED"]
    assert dict(os.environ) == before


def test_a_vllm_config_becomes_plain_data() -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            dtype="torch.bfloat16",
            quantization=None,
            max_model_len=1024,
            enforce_eager=True,
            seed=0,
        ),
        cache_config=SimpleNamespace(
            num_gpu_blocks=364, block_size=128, cache_dtype="auto", enable_prefix_caching=False
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=2048),
        parallel_config=SimpleNamespace(tensor_parallel_size=4, data_parallel_size=2),
    )
    facts = resolved_config(config)
    assert facts["dtype"] == "bfloat16"
    assert facts["kv_capacity_tokens"] == 46_592
    assert facts["prefix_caching"] is False
    assert (facts["tensor_parallel_size"], facts["data_parallel_size"]) == (4, 2)
    assert facts["expert_parallel"] is None
    assert facts["chunked_prefill"] is None  # this version has no such setting
    config.cache_config.num_gpu_blocks = None
    assert resolved_config(config)["kv_capacity_tokens"] is None


def test_processes_started_while_signals_are_blocked_never_receive_them() -> None:
    code = "import signal; print(*sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    with processes.block_signals():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    blocked = sorted(int(number) for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2))
    assert list(map(int, done.stdout.split())) == blocked
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(processes.BLOCKED_SIGNALS)


LEAKING = """
import signal, sys, time
from multiprocessing import shared_memory, resource_tracker
signal.signal(signal.SIGTERM, getattr(signal, sys.argv[1]))
memory = shared_memory.SharedMemory(create=True, size=64)
resource_tracker.unregister(memory._name, "shared_memory")
print(memory.name, flush=True)
time.sleep(60)
"""


def start_leaking(on_sigterm: str) -> tuple[subprocess.Popen[str], Path]:
    """A process, and its shared memory that nothing else removes."""
    process = subprocess.Popen(
        [sys.executable, "-c", LEAKING, on_sigterm], stdout=subprocess.PIPE, text=True
    )
    with process.stdout as stdout:  # type: ignore[union-attr]
        return process, processes.SHARED_MEMORY / stdout.readline().strip()


def test_shared_memory_is_found_through_the_process_that_maps_it() -> None:
    memory = shared_memory.SharedMemory(create=True, size=64)
    try:
        found = processes.shared_memory_files([psutil.Process()])
    finally:
        memory.close()
        memory.unlink()
    assert processes.SHARED_MEMORY / memory.name in found


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    process, segment = start_leaking("SIG_IGN")
    try:
        processes.terminate([psutil.Process(process.pid)], grace_s=0.2)
        assert process.wait(10) == -signal.SIGKILL
    finally:
        segment.unlink()


def test_the_reaper_ends_processes_and_removes_their_memory_and_folder() -> None:
    process, segment = start_leaking("SIG_DFL")
    with reaper.start_reaper() as running:
        assert stat.S_IMODE(running.folder.stat().st_mode) == 0o700
        (running.folder / "file").touch()
        running.watch([psutil.Process(process.pid)])
        assert segment.exists()
    assert process.wait(1) == -signal.SIGTERM
    assert not segment.exists()
    assert not running.folder.exists()


def test_the_reaper_also_cleans_up_after_its_parent_was_killed() -> None:
    process, segment = start_leaking("SIG_DFL")
    code = (
        "import sys, time, psutil; from servegrid.node import reaper\n"
        "with reaper.start_reaper() as running:\n"
        f"    running.watch([psutil.Process({process.pid})])\n"
        "    print(running.folder, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    with parent.stdout:
        folder = Path(parent.stdout.readline().strip())
    (guard,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    gone, _ = psutil.wait_procs([guard], timeout=60)
    assert gone == [guard]
    assert process.wait(1) == -signal.SIGTERM
    assert not segment.exists()
    assert not folder.exists()


def test_the_reaper_ends_an_orphan_that_nobody_named() -> None:
    """A process of the engine that was starting when the one that started it was killed."""
    with reaper.start_reaper() as running:
        starter = (
            "import subprocess, sys; orphan = subprocess.Popen("
            "[sys.executable, '-c', 'import time; time.sleep(60)'], "
            "stdout=subprocess.DEVNULL, start_new_session=True)\n"
            "print(orphan.pid, flush=True)"
        )
        done = subprocess.run(
            [sys.executable, "-c", starter],
            env=os.environ | {"TMPDIR": str(running.folder)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        orphan = psutil.Process(int(done.stdout))
        assert orphan.is_running()
    _, left = psutil.wait_procs([orphan], timeout=10)
    assert left == []
