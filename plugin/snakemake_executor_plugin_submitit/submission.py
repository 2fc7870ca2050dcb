"""From the resources of a job and the site's knowledge of nodes to a submitted submitit job."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
import yaml
from snakemake_interface_common.exceptions import WorkflowError
from submitit.helpers import clean_env

from snakemake_executor_plugin_submitit.kinds import check_kind
from snakemake_executor_plugin_submitit.liveness import Submission, runs, start_ticks

CLUSTERS = ("slurm", "local")
SLURM_PROGRAMS = ("sbatch", "squeue", "scancel")

_MEMORY_KEYS = {"mem_gb", "slurm_mem", "slurm_mem_per_cpu", "slurm_mem_per_gpu"}
_GPU_KEYS = {"gpus_per_node", "slurm_gres"}
_COPIED_RESOURCES = (
    *("nodes", "cpus_per_task"),
    *("slurm_partition", "slurm_account", "slurm_constraint", "slurm_qos"),
)
_LOCAL_LIMIT_MIN = 7 * 24 * 60


def choose_cluster(wanted: str | None) -> str:
    """The cluster to submit to: the wanted one, else Slurm where its programs are installed.

    Raises WorkflowError where it is unknown or its programs are missing.
    """
    missing = [name for name in SLURM_PROGRAMS if shutil.which(name) is None]
    cluster = wanted or ("local" if missing else "slurm")
    if cluster not in CLUSTERS:
        raise WorkflowError(
            f"submitit-cluster: `{cluster}` is unknown. Valid are: {', '.join(CLUSTERS)}."
        )
    if cluster == "slurm" and missing:
        raise WorkflowError(
            f"submitit-cluster: slurm needs {', '.join(missing)} on the PATH. "
            "Run snakemake on a node of the cluster, or choose `local`."
        )
    return cluster


def checked_name(name: str | None, setting: str) -> str | None:
    """The name of a function. Raises WorkflowError where it is not of the form module:function."""
    if name is not None and not re.fullmatch(r"[\w.]+:\w+", name):
        raise WorkflowError(
            f"{setting}: `{name}` is not of the form module:function, "
            "as in my_package.services:serve."
        )
    return name


def loaded(name: str | None, setting: str) -> Callable[..., Any] | None:
    """The function of that name. Raises WorkflowError where there is none."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise WorkflowError(f"{setting}: `{name}` cannot be imported ({error}).") from error
    return found


def read_kinds(path: Path) -> dict[str, dict[str, Any]]:
    """What the site knows of its kinds of nodes: submission parameters by kind.

    Raises WorkflowError, naming file, kind and key, where it cannot be read or has a key or a
    type that is not of KIND_KEYS.
    """
    try:
        kinds = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise WorkflowError(f"submitit-kinds: {path} cannot be read: {error}") from error
    if not isinstance(kinds, dict):
        raise WorkflowError(f"submitit-kinds: {path} must map kinds to their parameters.")
    for kind, parameters in kinds.items():
        where = f"submitit-kinds: {path}: {kind}"
        if not isinstance(parameters, dict):
            raise WorkflowError(f"{where} must map parameters to values.")
        for problem in check_kind(parameters):
            raise WorkflowError(f"{where}.{problem.key}: {problem.problem}. {problem.remedy}")
    return kinds


def python_of(
    kind: Mapping[str, Any], resources: Mapping[str, Any], start: Path, where: str
) -> dict[str, str]:
    """The kind's `python` as an absolute path, empty where it has none.

    Paths are as seen from `start`; a bare name is looked for on the node. A job whose resource
    `environment` is `main` wants the main process's Python, whatever its kind says. Raises
    WorkflowError, naming `where`, where the path leads nowhere.
    """
    python = kind.get("python")
    if python is None or resources.get("environment") == "main":
        return {}
    if "/" not in python:
        return {"python": python}
    path = start / Path(python).expanduser()
    if not path.exists():
        raise WorkflowError(
            f"{where}.python: {path} does not exist. Make that environment, or correct the path."
        )
    return {"python": str(path)}


@dataclass(frozen=True)
class Parameters:
    """What is asked of the cluster, in the words of a kinds file."""

    values: Mapping[str, Any]

    @property
    def limit_s(self) -> float:
        return float(self.values["timeout_min"]) * 60

    @property
    def warned_s(self) -> int:
        """How long before the limit the allocation is warned: at most a quarter of it."""
        return int(self.values.get("signal_delay_s", min(60, self.limit_s / 4)))

    @classmethod
    def of(cls, cluster: str, resources: Mapping[str, Any], kind: Mapping[str, Any]) -> Parameters:
        """Of a job's resources; what its kind of node says wins over them.

        Raises WorkflowError where a time limit is missing on Slurm.
        """
        values: dict[str, Any] = {
            key: resources[key] for key in _COPIED_RESOURCES if key in resources
        }
        values.setdefault("cpus_per_task", resources.get("_cores", 1))
        if "runtime" in resources:
            values["timeout_min"] = resources["runtime"]
        if "mem_mb" in resources and not _MEMORY_KEYS & kind.keys():
            values["slurm_mem"] = f"{resources['mem_mb']}M"
        gpus, has = int(resources.get("gpus") or 0), kind.get("gpus_of_node")
        nodes = kind.get("nodes", values.get("nodes", math.ceil(gpus / has) if gpus and has else 1))
        values["nodes"] = nodes
        if gpus and not _GPU_KEYS & kind.keys():
            values["gpus_per_node"] = math.ceil(gpus / nodes)
        values |= {key: value for key, value in kind.items() if key != "gpus_of_node"}
        if values.get("gpus_per_node") == 0:
            del values["gpus_per_node"]
        if "timeout_min" not in values:
            if cluster == "slurm":
                raise WorkflowError(
                    "An allocation on Slurm needs a time limit. Give the rule the resource "
                    "`runtime` (minutes), its kind of node `timeout_min`, or set "
                    "default-resources: runtime=… in the profile."
                )
            values["timeout_min"] = _LOCAL_LIMIT_MIN
        return cls(values)

    def for_slurm(self) -> dict[str, Any]:
        """As the parameters of submitit's SlurmExecutor."""
        values = dict(self.values)
        cpus, nodes = values["cpus_per_task"], values.get("nodes", 1)
        # srun would start one process per CPU of an exclusive node, and one per node of several;
        # since Slurm 22.05 it does not take the batch job's --cpus-per-task over.
        arguments = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={cpus}"]
        memory = {"mem": f"{round(values['mem_gb'] * 1024)}M"} if "mem_gb" in values else {}
        return {
            "time": math.ceil(values["timeout_min"]),
            "signal_delay_s": self.warned_s,
            "nodes": nodes,
            "cpus_per_task": cpus,
            "srun_args": arguments + values.get("srun_args", []),
            "stderr_to_stdout": True,
            **{key: values[key] for key in ("gpus_per_node", "setup") if key in values},
            **memory,
            **{
                key.removeprefix("slurm_"): value
                for key, value in values.items()
                if key.startswith("slurm_") and value is not False
            },
        }

    def for_local(self) -> dict[str, Any]:
        """As the parameters of submitit's LocalExecutor."""
        gpus = self.values.get("gpus_per_node", 0)
        return {
            "timeout_min": self.values["timeout_min"],
            "signal_delay_s": self.warned_s,
            "nodes": self.values.get("nodes", 1),
            # A type, as in a100:2, is for Slurm to choose by.
            "gpus_per_node": int(str(gpus).rpartition(":")[2]),
            "setup": self.values.get("setup", []),
            "stderr_to_stdout": True,
        }


class SchedulerUnavailable(Exception):
    """The cluster could not be asked: this says nothing of what was asked."""


_OUT_OF_REACH = re.compile(
    "Unable to contact slurm controller|Socket timed out|Connection refused|Resource temporarily "
    "unavailable|slurm_persist_conn_open|Zero Bytes were transmitted|Transport endpoint",
    re.IGNORECASE,
)


def submit(
    name: str,
    cluster: str,
    job_name: str,
    folder: Path,
    parameters: Parameters,
    function: Callable[[], None],
) -> tuple[Submission, Any]:
    """Submit `function`, which must be importable on the node, as one submitit job.

    `folder` is where submitit keeps its files. Returns what to remember of the job, and
    submitit's handle. Raises WorkflowError if the cluster refuses, SchedulerUnavailable if it does
    not answer.
    """
    python = parameters.values.get("python")
    try:
        if cluster == "slurm":
            executor = submitit.SlurmExecutor(folder, python=python)
            executor.update_parameters(job_name=job_name, **parameters.for_slurm())
        else:
            executor = submitit.LocalExecutor(folder, python=python)
            executor.update_parameters(**parameters.for_local())
        with clean_env(), _deaf_to_the_terminal():
            handle = executor.submit(function)
    except (OSError, ValueError, subprocess.SubprocessError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if _OUT_OF_REACH.search(message):
            raise SchedulerUnavailable(message) from error
        raise WorkflowError(f"{cluster} refused the allocation {name}: {message}") from error
    submission = Submission(
        name=name,
        cluster=cluster,
        host=socket.gethostname(),
        job_id=handle.job_id,
        job_name=job_name,
        submitted=time.time(),
        log=str(handle.paths.stdout),
        start_ticks=start_ticks(int(handle.job_id)) if cluster == "local" else None,
    )
    return submission, handle


def cancel(submission: Submission) -> None:
    """Ask a submitted job to end; it does so when its service is down."""
    if submission.cluster == "slurm":
        # By its name as well: job ids are used again.
        command = ["scancel", f"--name={submission.job_name}", submission.job_id]
        subprocess.run(command, capture_output=True, timeout=60)
        return
    pid = int(submission.job_id)
    if submission.start_ticks is not None and runs(pid, submission.start_ticks):
        os.kill(pid, signal.SIGTERM)


@contextlib.contextmanager
def _deaf_to_the_terminal() -> Iterator[None]:
    """Processes begun meanwhile ignore Ctrl-C and hang-ups: what they mean, Snakemake decides."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
