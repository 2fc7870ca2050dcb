"""Runs one node of an engine on several nodes, for a test that watches it from outside.

Usage: serve_nodes.py RANK FOLDER DEPLOYMENT SETTINGS; the last two are JSON. The settings are
those of `Site`, the `interface` between the nodes (default: lo) and the `workers` of each node.
Both nodes print a line of JSON when their part has started. For each line on its standard input,
the first node prints whether the engine is healthy; the end of standard input ends the engine.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from servegrid.engines import Site, start_engine, start_part
from servegrid.errors import ServegridError
from servegrid.study.deployment import Deployment
from snakemake_executor_plugin_submitit.nodes import gather, join

COUNT = 2
SETTINGS = json.loads(sys.argv[4])
INTERFACE, WORKERS = SETTINGS.pop("interface", "lo"), SETTINGS.pop("workers", 1)

if WORKERS > 1:  # vLLM takes a CPU for one device; its processes import this module as well
    import torch

    torch.cpu.device_count = lambda: WORKERS


REPORTS = os.fdopen(os.dup(1), "w")
"""Only this module writes here. What servegrid prints goes to standard error, as in a job's log."""
os.dup2(2, 1)


def report(**facts: object) -> None:
    print(json.dumps(facts), file=REPORTS, flush=True)


def interrupt(_: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    deployment, site = Deployment(**json.loads(sys.argv[3])), SETTINGS
    site["models"] = Path(site["models"])
    report(pid=os.getpid())
    try:
        if rank > 0:
            with (
                join(rank, f"node{rank}", INTERFACE, folder, interrupt) as nodes,
                start_part(deployment, Site(**site, nodes=nodes)) as part,
            ):
                report(pids=part.pids())
                while part.healthy():
                    time.sleep(0.2)
                nodes.report_failure("a worker has ended")
            return
        with (
            gather(COUNT, "node0", INTERFACE, folder, interrupt) as nodes,
            start_engine(deployment, Site(**site, nodes=nodes)) as engine,
        ):
            endpoint = json.loads(engine.endpoint.to_json())
            report(endpoint=endpoint, facts=engine.facts, pids=engine.pids())
            for _ in sys.stdin:
                report(healthy=engine.healthy())
    except ServegridError as error:
        report(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
