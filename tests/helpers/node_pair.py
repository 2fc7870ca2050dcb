"""Both processes of an allocation of two nodes, as Slurm starts them, on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snakemake_executor_plugin_submitit.spool import Spool

TOY = Path(__file__).parents[1] / "integration" / "executor"
PROGRAM = """
import json, sys
from snakemake_executor_plugin_submitit import allocation

class NoJobs:  # the process for jobs imports Snakemake, and these tests run no job
    def __init__(self, *_): pass
    def close(self): pass

allocation.Runner = NoJobs
allocation.Allocation(**json.loads(sys.argv[1]))()
"""


class Pair:
    """Both processes of an allocation. Its service has a helper process on each node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spool = Spool.create(folder / "spool")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.prefixes: list[list[str]] = [[], []]
        """Commands that start the process of each node, such as `ip netns exec NAME`."""

    def start(self, **changes: Any) -> Pair:
        settings: dict[str, Any] = {
            "name": "a",
            "folder": str(self.spool.root),
            "service": "toy_service:serve",
            "follower": "toy_service:follow",
            "params": {"group": "a"},
            "resources": {},
            "idle_timeout": 600,
            "time_limit": 3600,
            "signal_delay": 60,
            "modules": str(TOY),
            "interface": "127.0.0.0/8",
        } | changes
        for rank in range(2):
            slurm = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_JOB_ID": "0"}
            temporary = self.folder / f"tmp-{rank}"
            temporary.mkdir()
            with (self.folder / f"log-{rank}").open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [
                            *self.prefixes[rank],
                            sys.executable,
                            "-P",
                            "-c",
                            PROGRAM,
                            json.dumps(settings),
                        ],
                        cwd=self.folder,
                        env=os.environ
                        | slurm
                        | {"SLURMD_NODENAME": f"node{rank}", "TMPDIR": str(temporary)},
                        stdout=log,
                        stderr=log,
                    )
                )
        return self

    def wait_until_up(self) -> None:
        self.wait(lambda: self.events("service_started"))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [dict(event.data) for event in self.spool.journal().read_new() if event.kind == kind]

    def notes(self, event: str) -> list[dict[str, Any]]:
        path = self.folder / "service.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [note for note in map(json.loads, lines) if note["event"] == event]

    def log(self, rank: int) -> str:
        return (self.folder / f"log-{rank}").read_text()

    def wait(self, test: Callable[[], Any], limit_s: float = 200) -> None:
        deadline = time.monotonic() + limit_s
        while not test():
            assert time.monotonic() < deadline, (self.log(0), self.log(1))
            time.sleep(0.05)

    def ends(self) -> list[int]:
        """The exit statuses of both nodes; nothing of the service is left on either."""
        began = time.monotonic()
        statuses = [process.wait(100) for process in self.processes]
        print(f"both nodes have ended after {time.monotonic() - began:.1f} s")
        return statuses

    def helpers_left(self) -> list[int]:
        helpers = [note["helper"] for note in self.notes("up") + self.notes("joined")]
        assert len(helpers) == 2
        return [pid for pid in helpers if Path(f"/proc/{pid}").exists()]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for pid in self.helpers_left() if self.notes("up") and self.notes("joined") else []:
            os.kill(pid, signal.SIGKILL)
