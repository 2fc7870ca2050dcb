"""Both nodes of a real vLLM on the CPU: two processes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from helpers.deployments import DEMO_VLLM
from helpers.serving import http_client
from servegrid.study.endpoint import Endpoint

SCRIPT = Path(__file__).with_name("serve_nodes.py")
VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Both nodes are this machine, and would bind their workers to the same cores."""


class TwoNodes:
    """Both nodes of an engine. Each has its own temporary folder."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        workers: int = 2,
        prefixes: Sequence[Sequence[str]] = ((), ()),
        engine_args: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """All `workers` share each layer, unless `engine_args` say otherwise. `prefixes` are
        commands that start the process of each node; for `settings`, see serve_nodes."""
        self.folder = folder
        settings = {"models": str(folder), "workers": workers // 2, **settings}
        deployment = replace(
            DEMO_VLLM,
            checkpoint=str(model),
            tokenizer=str(model),
            engine_args={"dtype": "float32"} | (engine_args or {"tensor_parallel_size": workers}),
        )
        self.temporary = [Path(tempfile.mkdtemp(prefix="sg-")) for _ in range(2)]
        self.processes = []
        for rank in range(2):
            with (folder / f"log-{rank}").open("w") as log:
                words = [str(rank), str(folder / "nodes"), json.dumps(asdict(deployment))]
                self.processes.append(
                    subprocess.Popen(
                        [
                            *prefixes[rank],
                            sys.executable,
                            str(SCRIPT),
                            *words,
                            json.dumps(settings),
                        ],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        env=os.environ | VARIABLES | {"TMPDIR": str(self.temporary[rank])},
                        start_new_session=True,
                    )
                )
        for rank in range(2):
            self.read(rank)
        self.up, self.part = self.read(0), self.read(1)
        pids = self.up["pids"] + self.part["pids"]
        self.all = [psutil.Process(pid) for pid in pids]
        self.commands = {each.pid: " ".join(each.cmdline()) for each in self.all}

    def read(self, rank: int) -> dict[str, Any]:
        stdout = self.processes[rank].stdout
        assert stdout
        line = stdout.readline()
        assert line, (self.folder / f"log-{rank}").read_text()[-4000:]
        message: dict[str, Any] = json.loads(line)
        assert "error" not in message, message
        return message

    def healthy(self) -> bool:
        stdin = self.processes[0].stdin
        assert stdin
        stdin.write("\n")
        stdin.flush()
        return bool(self.read(0)["healthy"])

    def client(self) -> httpx.Client:
        client = http_client(Endpoint(**self.up["endpoint"]))
        client.timeout = httpx.Timeout(600)
        return client

    def assert_nothing_is_left(self, limit_s: float) -> None:
        """Neither a process of the engine nor a temporary file, on either node."""
        began = time.monotonic()
        _, left = psutil.wait_procs(self.all, timeout=limit_s)
        states = [(each.status(), self.commands[each.pid]) for each in left if each.is_running()]
        assert left == [], states
        print(f"nothing is left after {time.monotonic() - began:.1f} s")
        for process in self.processes:
            process.wait(30)
        deadline = time.monotonic() + 30
        while files := [file for each in self.temporary for file in each.glob("servegrid-*")]:
            assert time.monotonic() < deadline, files
            time.sleep(0.1)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        for each in self.all if hasattr(self, "all") else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for folder in self.temporary:
            shutil.rmtree(folder, ignore_errors=True)


def complete(client: httpx.Client, prompt: str, tokens: int) -> str:
    body = {"model": DEMO_VLLM.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    response = client.post("/v1/completions", json=body)
    response.raise_for_status()
    text: str = response.json()["choices"][0]["text"]
    return text
