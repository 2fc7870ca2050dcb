"""A private Slurm per test, and folders in which workflows run on it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.cluster import Cluster, Options, missing, private_cluster
from helpers.processes import wait_for_end

TOY = Path(__file__).parents[1] / "integration" / "executor"
PLAFRIM_KINDS = Path(__file__).parents[2] / "profiles" / "plafrim" / "kinds.yaml"
KIND = {"slurm_partition": "routage", "slurm_exclusive": True, "slurm_mem": "0"}
GPU = KIND | {"slurm_constraint": "sirocco"}


def plafrim_kinds() -> dict[str, dict[str, Any]]:
    """The kinds of PlaFRIM's profile. All nodes are this machine, which has no InfiniBand."""
    kinds: dict[str, dict[str, Any]] = yaml.safe_load(PLAFRIM_KINDS.read_text(encoding="utf-8"))
    for kind in kinds.values():
        if "interface" in kind:
            kind["interface"] = "lo"
    return kinds


def toy_path() -> str:
    """The toy workflow's modules, before those that this process was told of."""
    return os.pathsep.join(filter(None, (str(TOY), os.environ.get("PYTHONPATH"))))


class Workspace:
    """A folder in which the toy workflow of the executor's tests runs on a cluster."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        (folder / "acts").mkdir(parents=True)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.env: dict[str, str] = {}
        self.kinds(toy=GPU)

    def plan(self, **plan: Any) -> None:
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def set_acts(self, **acts: str) -> None:
        for cell, act in acts.items():
            (self.folder / "acts" / cell).write_text(act)

    def kinds(self, **kinds: dict[str, Any]) -> None:
        (self.folder / "kinds.yaml").write_text(yaml.safe_dump(kinds))

    def start(self, *arguments: str, runtime: int = 60) -> subprocess.Popen[bytes]:
        return self.launch(
            *("--snakefile", str(TOY / "Snakefile"), "--executor", "submitit"),
            *("--submitit-cluster", "slurm", "--submitit-service", "toy_service:serve"),
            *("--submitit-kinds", "kinds.yaml", "--submitit-records", "records"),
            *("--default-resources", f"runtime={runtime}"),
            *("--jobs", "100", "--keep-going", "--nocolor", "--rerun-incomplete", *arguments),
        )

    @staticmethod
    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "snakemake", *arguments]

    def launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log.open("w") as log:
            process = subprocess.Popen(
                self.command(*arguments),
                cwd=self.folder,
                env=self.cluster.env | {"PYTHONPATH": toy_path()} | self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    @property
    def log(self) -> Path:
        return self.folder / "output.log"

    def end(self, process: subprocess.Popen[bytes], status: int = 0) -> str:
        output = wait_for_end(process, self.log)
        assert process.returncode == status, output[-6000:]
        return output

    def run(self, *arguments: str, status: int = 0, runtime: int = 60) -> str:
        return self.end(self.start(*arguments, runtime=runtime), status)

    def notes(self, file: str, event: str) -> list[dict[str, Any]]:
        path = self.folder / f"{file}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [note for note in map(json.loads, lines) if note["event"] == event]

    def started(self) -> list[str]:
        """The cells in the order of their starts, with repeats."""
        return [note["cell"] for note in self.notes("cells", "begin")]

    def service_starts(self) -> int:
        return len(self.notes("service", "up"))

    def outputs(self) -> set[str]:
        return {path.name for path in self.folder.glob("out/*")}

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("records/*"))]

    def queue(self) -> list[tuple[str, str, str]]:
        """Job id, state and node of each job in Slurm's queue."""
        text = self.cluster.call("squeue", "-h", "-o", "%i|%T|%N", check=False)
        return [tuple(line.split("|")) for line in text.splitlines()]  # type: ignore[misc]

    def queue_alive(self) -> list[tuple[str, str, str]]:
        """The jobs that have not ended."""
        alive = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED")
        return [job for job in self.queue() if job[1] in alive]

    def wait(self, test: Callable[[], Any], limit_s: float = 60) -> Any:
        deadline = time.monotonic() + limit_s
        while not (found := test()):
            assert time.monotonic() < deadline, self.log.read_text()[-6000:]
            time.sleep(0.1)
        return found

    def wait_started(self, cell: str) -> None:
        self.wait(lambda: cell in self.started())

    def interrupt(self, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGINT)

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster; `@with_options(...)` changes its options."""
    options = getattr(request, "param", Options())
    if lacking := missing(options):
        pytest.skip(f"no private Slurm without {', '.join(lacking)}: tests/install.sh")
    with private_cluster(tmp_path / "slurm", options) as cluster:
        yield cluster


@pytest.fixture
def work(cluster: Cluster, tmp_path: Path) -> Iterator[Workspace]:
    workspace = Workspace(tmp_path / "work", cluster)
    try:
        yield workspace
    finally:
        workspace.close()


def with_options(*options: Options) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cluster", options, indirect=True)
