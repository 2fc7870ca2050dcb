"""The real vLLM on the CPU over two nodes, in what takes too long for CI.

A study is measured on the private Slurm and certified, although its allocation ends in another way
after each cell. The network between two nodes with two workers each is cut during a request. And
each node has half of the layers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from helpers import namespaces
from helpers.demo_model import pad_heads
from helpers.two_nodes import TwoNodes, complete
from servegrid.study import models
from slurm.conftest import KIND, Workspace
from slurm.test_slurm_rehearsal import Rehearsal

ROOT = Path(__file__).parents[2]
SEEN_S = 30.0
START_S = 1800.0
"""How long an engine may take to start beside other tests."""

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(5400)]


class Study(Rehearsal):
    """One deployment over two nodes, with more cells than end before a time limit is noticed.

    Slurm looks once per minute, and a cell takes about a second.
    """

    def __init__(self, work: Workspace, model: Path) -> None:
        self.work, self.deployments, self.cells = work, 1, 48
        deployment = {
            "name": "two_nodes",
            "model": "smollm2-135m-instruct",
            "checkpoint": str(model),
            "quantization": "fp32",
            "engine": "vllm",
            "gpu": "cpu",
            "max_model_len": 512,
            "max_num_seqs": 8,
            "engine_args": {"tensor_parallel_size": 2, "dtype": "float32"},
        }
        workload = {
            "concurrency": [*range(1, 9)],
            "input_len": [*range(20, 68, 8)],
            "output_len": 8,
            "drift_checks": False,
        }
        study = {"study": "nodes", "workload": workload, "deployments": [deployment]}
        (work.folder / "study.yaml").write_text(yaml.safe_dump(study))
        # Both nodes are this machine: their workers would be bound to the same cores.
        setup = ["export VLLM_CPU_OMP_THREADS_BIND=nobind"]
        site = {"slurm_constraint": "a100", "nodes": 2, "interface": "lo", "cpus_per_task": 2}
        work.kinds(cpu=KIND | site | {"setup": setup})

    def measured(self) -> list[str]:
        """The ticket of each job that has succeeded, without the number of the attempt."""
        return [
            event["ticket"].partition("-")[2]
            for event in self.journal()
            if event["event"] == "job_finished" and event["status"] == 0
        ]


def parts(work: Workspace) -> dict[int, list[psutil.Process]]:
    """The Python processes of the allocation by the rank of their node, main process first."""
    found: dict[int, list[psutil.Process]] = {}
    for process in sorted(psutil.process_iter(), key=lambda each: each.pid):
        try:
            environment = process.environ()
            if environment.get("SLURM_CONF") != str(work.cluster.conf):
                continue
            if "python" in Path(process.exe()).name and "SLURM_STEP_ID" in environment:
                found.setdefault(int(environment["SLURM_PROCID"]), []).append(process)
        except (psutil.Error, OSError):
            continue
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    from servegrid.records import parquet

    return [
        parquet.read_record(file)
        for file in sorted(folder.glob("results/cells/**/requests.parquet"))
    ]


def kill_the_other_node(work: Workspace, running: dict[int, list[psutil.Process]]) -> None:
    os.kill(running[1][0].pid, signal.SIGKILL)


def requeue(work: Workspace, running: dict[int, list[psutil.Process]]) -> None:
    """What Slurm does to a job that it preempts."""
    work.cluster.call("scontrol", "requeue", work.queue_alive()[0][0])


def reach_the_time_limit(work: Workspace, running: dict[int, list[psutil.Process]]) -> None:
    """The limit is in the past now: Slurm ends the job when it looks, within a minute."""
    job = work.queue_alive()[0][0]
    work.cluster.call("scontrol", "update", f"jobid={job}", "timelimit=1")


def cancel(work: Workspace, running: dict[int, list[psutil.Process]]) -> None:
    work.cluster.call("scancel", work.queue_alive()[0][0])


FAULTS = (kill_the_other_node, requeue, reach_the_time_limit)
"""Each comes after one more cell, and another allocation continues without being asked."""
ENDED_S = {reach_the_time_limit: 60 + SEEN_S}


def test_a_study_over_two_nodes_survives_every_end_and_is_certified(work: Workspace) -> None:
    cache = models.default_folder()
    models.fetch(cache)
    source = models.locate("demo:smollm2-135m-instruct", cache)
    study = Study(work, pad_heads(source, work.folder / "padded"))
    run = study.start()
    for number, end in enumerate((*FAULTS, cancel)):
        done = len(study.measured()) if number else 0
        work.wait(lambda done=done: len(study.measured()) > done, limit_s=START_S)
        running = parts(work)
        assert set(running) == {0, 1}
        everything = running[0] + running[1]
        began = time.monotonic()
        end(work, running)
        _, left = psutil.wait_procs(everything, timeout=ENDED_S.get(end, SEEN_S))
        print(
            f"\n{end.__name__}: nothing of {len(everything)} processes is left after "
            f"{time.monotonic() - began:.1f} s"
        )
        assert left == []
    run.wait(timeout=START_S)
    if run.returncode:  # the jobs of a cancelled allocation fail; the rule tries each once more
        run = study.start()
        run.wait(timeout=START_S)
    assert run.returncode == 0, work.log.read_text()[-6000:]

    events = Counter(event["event"] for event in study.journal())
    measured = study.measured()
    assert len(measured) == len(set(measured)) == study.cells
    assert events["service_started"] == 2 + len(FAULTS)
    engines = [record["engine"] for record in records(work.folder)]
    assert [engine["nodes"] for engine in engines] == [2] * study.cells
    links = [{"transport": "tcp", "interface": "lo", "gpu_direct": None}]
    assert all(each["network"] == {"library": "gloo", "links": links} for each in engines)
    cells = pq.read_table(work.folder / "results/tables/cells.parquet").to_pylist()
    print([(each["verdict"], each["valid"], each["invalid_evidence"]) for each in cells])
    assert {each["verdict"] for each in cells} == {"ok"}

    study.assert_nothing_to_do()
    study.end(study.start(target="bundle"))
    (bundle,) = work.folder.glob("results/bundles/*.tar*")
    verified = subprocess.run(
        [sys.executable, "-m", "servegrid.cli.main", "verify", str(bundle)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(verified.stdout[-600:])
    assert verified.returncode == 0, verified.stdout + verified.stderr


@pytest.mark.skipif(not namespaces.is_possible(), reason="only root makes network namespaces")
def test_a_cut_network_ends_an_engine_with_two_workers_per_node(tmp_path: Path) -> None:
    cache = models.default_folder()
    models.fetch(cache)
    source = models.locate("demo:smollm2-135m-instruct", cache)
    model = pad_heads(source, tmp_path / "padded")
    with namespaces.cable() as cable:
        nodes = TwoNodes(
            *(model, tmp_path, 4, cable.prefixes),
            interface=namespaces.INTERFACE,
            socket="unix",  # the loopback of a namespace is its own
        )
        try:
            facts = nodes.up["facts"]
            assert (facts["tensor_parallel_size"], facts["nodes"]) == (4, 2)
            (link,) = facts["network"]["links"]
            assert (link["transport"], link["interface"]) == ("tcp", namespaces.INTERFACE)
            # Two workers on each node, besides its own process and the scheduler on the first.
            assert (len(nodes.up["pids"]), len(nodes.part["pids"])) == (4, 3)
            with nodes.client() as client:
                assert complete(client, "The capital of France is", 3).startswith(" Paris")
                cutter = threading.Timer(2.0, cable.cut)
                cutter.start()
                began = time.monotonic()
                with pytest.raises(httpx.HTTPError):
                    while time.monotonic() - began < SEEN_S:
                        complete(client, "a b c", 100)
                print(f"\ncut: requests fail after {time.monotonic() - began - 2:.1f} s")
            nodes.assert_nothing_is_left(SEEN_S)
        finally:
            nodes.close()


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_layers_are_divided_between_the_nodes(tmp_path: Path, tensor: int) -> None:
    """Pipeline parallel 2. On a CPU, vLLM can do it only with a compiled model."""
    cache = models.default_folder()
    models.fetch(cache)
    source = models.locate("demo:smollm2-135m-instruct", cache)
    sizes = {"pipeline_parallel_size": 2, "tensor_parallel_size": tensor, "enforce_eager": False}
    nodes = TwoNodes(
        pad_heads(source, tmp_path / "padded"), tmp_path, 2 * tensor, engine_args=sizes
    )
    try:
        assert nodes.up["facts"] | sizes | {"nodes": 2} == nodes.up["facts"]
        with nodes.client() as client:
            assert complete(client, "The capital of France is", 3).startswith(" Paris")
            os.kill(nodes.part["pids"][-1], signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(httpx.HTTPError):
                while time.monotonic() - began < SEEN_S:
                    complete(client, "a b c", 100)
        print(f"\nkilled worker: requests fail after {time.monotonic() - began:.1f} s")
        deadline = time.monotonic() + SEEN_S
        while nodes.healthy():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        # An allocation whose engine is not healthy ends.
        stdin = nodes.processes[0].stdin
        assert stdin
        stdin.close()
        nodes.assert_nothing_is_left(SEEN_S)
    finally:
        nodes.close()
