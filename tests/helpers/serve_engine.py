"""Starts one engine, as an allocation does, for a test that watches it from outside.

Usage: serve_engine.py DEPLOYMENT SITE, both JSON. When the engine has started or failed, the script
prints a line of JSON. For each line on standard input it prints whether the engine is healthy; the
end of standard input stops the engine.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from servegrid.engines import Site, start_engine
from servegrid.errors import ServegridError
from servegrid.node import processes
from servegrid.study.grid import Deployment


def report(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


class Watch(threading.Thread):
    """Records all processes and shared memory that exist while an engine starts."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.pids: set[int] = set()
        self.segments: set[str] = set()

    def run(self) -> None:
        while True:
            found = processes.descendants()
            self.pids.update(process.pid for process in found)
            self.segments.update(map(str, processes.shared_memory_files(found)))
            time.sleep(0.1)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    deployment = Deployment(**json.loads(sys.argv[1]))
    site = json.loads(sys.argv[2])
    watch = Watch()
    watch.start()
    report(pid=os.getpid())
    environment = dict(os.environ)
    try:
        with start_engine(deployment, Site(**site | {"models": Path(site["models"])})) as engine:
            report(
                endpoint=json.loads(engine.endpoint.to_json()),
                facts=engine.facts,
                pids=engine.pids(),
                all_pids=sorted(watch.pids),
                segments=sorted(watch.segments),
                healthy=engine.healthy(),
                environment_kept=environment == dict(os.environ),
            )
            for _ in sys.stdin:
                report(healthy=engine.healthy())
    except ServegridError as error:
        report(error=f"{type(error).__name__}: {error}", all_pids=sorted(watch.pids))
    report(
        pids_left=[pid for pid in watch.pids if _is_running(pid)],
        segments=sorted(watch.segments),
        segments_left=[path for path in watch.segments if Path(path).exists()],
    )


def _is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    main()
