"""Turns the resources of a job and the parameters of a kind of node into a submitit job."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
import yaml
from snakemake_interface_common.exceptions import WorkflowError
from submitit.helpers import clean_env

from snakemake_executor_plugin_submitit.container import PYTHON, PYXIS, Container
from snakemake_executor_plugin_submitit.kinds import validate_kind
from snakemake_executor_plugin_submitit.liveness import Submission, is_running, start_ticks
from snakemake_executor_plugin_submitit.slurm import ask

CLUSTERS = ("slurm", "local")
SLURM_PROGRAMS = ("sbatch", "squeue", "scancel")

_MEMORY_KEYS = {"mem_gb", "slurm_mem", "slurm_mem_per_cpu", "slurm_mem_per_gpu"}
_GPU_KEYS = {"gpus_per_node", "slurm_gres"}
_COPIED_RESOURCES = (
    *("nodes", "cpus_per_task"),
    *("slurm_partition", "slurm_account", "slurm_constraint", "slurm_qos"),
)
_LOCAL_TIME_LIMIT_MIN = 7 * 24 * 60
MAX_EARLY_S = 90.0
"""Slurm warns up to a minute too early; half a minute is for the start of the allocation."""


def choose_cluster(requested: str | None) -> str:
    """The requested cluster; without a request Slurm if its programs are installed, else local.

    Raises WorkflowError if the cluster is unknown or its programs are missing.
    """
    missing = [name for name in SLURM_PROGRAMS if shutil.which(name) is None]
    cluster = requested or ("local" if missing else "slurm")
    if cluster not in CLUSTERS:
        raise WorkflowError(
            f"submitit-cluster: `{cluster}` is unknown. Use one of: {', '.join(CLUSTERS)}."
        )
    if cluster == "slurm" and missing:
        raise WorkflowError(
            f"submitit-cluster: slurm needs {', '.join(missing)} on the PATH. "
            "Run snakemake on a node of the cluster, or use `local`."
        )
    return cluster


def check_function_name(name: str | None, setting: str) -> str | None:
    """The name. Raises WorkflowError if it does not have the form module:function."""
    if name is not None and not re.fullmatch(r"[\w.]+:\w+", name):
        raise WorkflowError(
            f"{setting}: `{name}` does not have the form module:function. "
            "Write it as in my_package.services:serve."
        )
    return name


def import_function(name: str | None, setting: str) -> Callable[..., Any] | None:
    """The function `module:function`. Raises WorkflowError if it cannot be imported."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise WorkflowError(
            f"{setting}: `{name}` cannot be imported ({error}). "
            "Correct the name, or add the module's folder to PYTHONPATH."
        ) from error
    return found


def load_kinds(path: Path) -> dict[str, dict[str, Any]]:
    """The submission parameters of each kind of node.

    Raises WorkflowError, with file, kind and key, if the file cannot be read or a kind is not
    valid.
    """
    try:
        kinds = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise WorkflowError(
            f"submitit-kinds: {path} cannot be read: {error}. Correct the path or the file."
        ) from error
    if not isinstance(kinds, dict):
        raise WorkflowError(
            f"submitit-kinds: {path} must map kinds to their parameters. "
            "Write `kind:` lines with indented `key: value` lines below them."
        )
    for kind, parameters in kinds.items():
        location = f"submitit-kinds: {path}: {kind}"
        if not isinstance(parameters, dict):
            raise WorkflowError(
                f"{location} must map parameters to values. "
                "Write indented `key: value` lines below it."
            )
        for problem in validate_kind(parameters):
            raise WorkflowError(f"{location}.{problem.key}: {problem.problem}. {problem.remedy}")
    return kinds


def resolve_python(
    kind: Mapping[str, Any], resources: Mapping[str, Any], start: Path, location: str
) -> dict[str, str]:
    """The kind's `python` with an absolute path; empty if the main process's Python is used.

    A path is relative to `start`; the node looks up a bare name. A job with the resource
    `environment: main` always uses the main process's Python. Raises WorkflowError, with
    `location`, if the path does not exist.
    """
    python = kind.get("python")
    if python is None or resources.get("environment") == "main":
        return {}
    if "/" not in python or "container" in kind:  # the node, or the image, has it
        return {"python": python}
    path = start / Path(python).expanduser()
    if not path.exists():
        raise WorkflowError(
            f"{location}.python: {path} does not exist. "
            "Create this environment, or correct the path."
        )
    return {"python": str(path)}


@dataclass(frozen=True)
class Parameters:
    """Submission parameters, with the keys of a kinds file. `gpus` are those of the whole job.

    `on_all_nodes` says whether each node runs a process, not only the first.
    """

    values: Mapping[str, Any]
    gpus: int = 0
    on_all_nodes: bool = False

    @property
    def nodes(self) -> int:
        return int(self.values.get("nodes", 1))

    @property
    def container(self) -> Container | None:
        found = self.values.get("container")
        return Container.from_values(found) if found else None

    def python_command(self, workdir: Path) -> str:
        """The shell command that starts the allocation's Python."""
        # With -P, Python imports nothing from the working directory, where results of strangers
        # can be.
        python, container = self.values.get("python"), self.container
        if container is None:
            return shlex.join([python or sys.executable, "-P"])
        words = container.command(python or PYTHON, self.gpus, str(workdir))
        return shlex.join([*words, "-P"])

    @property
    def time_limit_s(self) -> float:
        return float(self.values["timeout_min"]) * 60

    @property
    def signal_delay_s(self) -> int:
        """Seconds before the time limit at which the allocation is warned."""
        return int(self.values.get("signal_delay_s", min(60, self.time_limit_s / 4)))

    @property
    def reserve_s(self) -> float:
        """Seconds of the time limit without new jobs: from the warning on, which may come early."""
        return self.signal_delay_s + min(MAX_EARLY_S, self.time_limit_s / 4)

    def lasting(self, seconds: float) -> Parameters:
        """The same with a time limit for `seconds` of work and the reserve, if that is less.

        Slurm counts in whole minutes.
        """
        minutes = math.ceil((seconds + self.reserve_s) / 60)
        if minutes >= self.values["timeout_min"]:
            return self
        limits = {"timeout_min": minutes, "signal_delay_s": self.signal_delay_s}
        return replace(self, values={**self.values, **limits})

    @classmethod
    def build(
        cls,
        cluster: str,
        resources: Mapping[str, Any],
        kind: Mapping[str, Any],
        on_all_nodes: bool = False,
    ) -> Parameters:
        """Parameters from a job's resources and its kind of node. The kind's values win.

        Raises WorkflowError if Slurm needs a time limit and there is none, if the cluster is this
        machine and there are several nodes, or if they need an `interface` and the kind has none.
        """
        values: dict[str, Any] = {
            key: resources[key] for key in _COPIED_RESOURCES if key in resources
        }
        values.setdefault("cpus_per_task", resources.get("_cores", 1))
        if "runtime" in resources:
            values["timeout_min"] = resources["runtime"]
        if "mem_mb" in resources and not _MEMORY_KEYS & kind.keys():
            values["slurm_mem"] = f"{resources['mem_mb']}M"
        gpus, per_node = int(resources.get("gpus") or 0), kind.get("gpus_of_node")
        needed = math.ceil(gpus / per_node) if gpus and per_node else 1
        nodes = kind.get("nodes", values.get("nodes", needed))
        values["nodes"] = nodes
        if gpus and per_node and nodes < needed:
            raise WorkflowError(
                f"nodes: {nodes} × gpus_of_node {per_node} is less than the {gpus} GPUs of the "
                "job. Remove `nodes`: the executor takes as many nodes as it needs."
            )
        if gpus and not _GPU_KEYS & kind.keys():
            values["gpus_per_node"] = math.ceil(gpus / nodes)
        site = ("gpus_of_node", "interface")
        values |= {key: value for key, value in kind.items() if key not in site}
        if values.get("gpus_per_node") == 0:
            del values["gpus_per_node"]
        if "timeout_min" not in values:
            if cluster == "slurm":
                raise WorkflowError(
                    "An allocation on Slurm needs a time limit. Set the resource `runtime` (min) "
                    "of the rule, `timeout_min` of its kind of node, or "
                    "default-resources: runtime=… in the profile."
                )
            values["timeout_min"] = _LOCAL_TIME_LIMIT_MIN
        if cluster != "slurm" and values.get("container", {}).get("runtime") == PYXIS:
            raise WorkflowError(
                "container: the runtime pyxis is a part of Slurm, and this cluster is "
                f"`{cluster}`. Use apptainer or singularity."
            )
        if nodes > 1:
            _check_nodes(cluster, nodes, on_all_nodes, kind)
            if on_all_nodes:
                values["interface"] = kind["interface"]
        return cls(values, gpus, on_all_nodes and nodes > 1)

    @property
    def clusters(self) -> str | None:
        """The clusters of Slurm, separated by commas; None: that of this machine."""
        found = (self.values.get("slurm_additional_parameters") or {}).get("clusters")
        return str(found) if found else None

    def for_slurm(self) -> dict[str, Any]:
        """The parameters of submitit's SlurmExecutor."""
        values = dict(self.values)
        cpus, nodes = values["cpus_per_task"], values.get("nodes", 1)
        # srun would start one process per CPU of an exclusive node, and one per node of several.
        # Since Slurm 22.05 it ignores the batch job's --cpus-per-task.
        tasks = nodes if self.on_all_nodes else 1
        arguments = [f"--nodes={tasks}", f"--ntasks={tasks}", f"--cpus-per-task={cpus}"]
        if self.on_all_nodes:
            arguments.insert(2, "--ntasks-per-node=1")
        if (container := self.container) is not None:
            arguments += container.srun_args(str(Path.cwd()))
        memory = {"mem": f"{round(values['mem_gb'] * 1024)}M"} if "mem_gb" in values else {}
        return {
            "time": math.ceil(values["timeout_min"]),
            "signal_delay_s": self.signal_delay_s,
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
        """The parameters of submitit's LocalExecutor."""
        gpus = self.values.get("gpus_per_node", 0)
        return {
            "timeout_min": self.values["timeout_min"],
            "signal_delay_s": self.signal_delay_s,
            "nodes": self.values.get("nodes", 1),
            # Only Slurm uses a GPU type, as in a100:2.
            "gpus_per_node": int(str(gpus).rpartition(":")[2]),
            "setup": self.values.get("setup", []),
            "stderr_to_stdout": True,
        }


def _check_nodes(cluster: str, nodes: int, on_all_nodes: bool, kind: Mapping[str, Any]) -> None:
    if cluster != "slurm":
        raise WorkflowError(
            f"An allocation needs {nodes} nodes, but this machine is one. Use a kind of node that "
            "has enough GPUs (`gpus_of_node`), or Slurm (submitit-cluster: slurm)."
        )
    if on_all_nodes and "interface" not in kind:
        raise WorkflowError(
            f"An allocation needs {nodes} nodes, but its kind of node does not name the "
            "network between them. Set `interface` of the kind, to a name such as ib0 or to a "
            "network such as 10.7.0.0/16 (`ip -br address` on a node shows both)."
        )


def check_python(path: str) -> None:
    """Raise WorkflowError if Snakemake cannot run scripts with this Python.

    It puts the path into a shell command as it is.
    """
    if re.search(r"[^\w@%+=:,./-]", path):
        raise WorkflowError(
            f"{path}: Snakemake cannot run scripts with this Python, because its path has a space "
            "or another character that the shell interprets. Create the environment in a folder "
            "whose path has only letters, digits and the characters _ - . / + , : = @ %."
        )


def check_folder(folder: Path) -> None:
    """Raise WorkflowError if Slurm and submitit would change the names of log files in it."""
    if "%" in str(folder):
        raise WorkflowError(
            f"submitit-folder: {folder} contains `%`, which Slurm replaces in the names of log "
            "files. Use a working directory without it, or set submitit-folder to another folder "
            "on the shared file system."
        )


class SchedulerUnavailable(Exception):
    """The scheduler did not answer. It has neither accepted nor refused the job."""


class _SlurmExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """Remembers which one of several clusters has taken the job."""

    taken_by: str | None = None

    def _get_job_id_from_submission_command(self, string: bytes | str) -> str:
        text = string if isinstance(string, str) else string.decode(errors="replace")
        if found := re.search(r"on cluster (\S+)", text):
            self.taken_by = found[1]
        job_id: str = submitit.SlurmExecutor._get_job_id_from_submission_command(text)
        return job_id


_UNAVAILABLE = re.compile(
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

    submitit keeps its files in `folder`. Returns the description of the job and submitit's
    handle. Raises WorkflowError if the scheduler refuses the job, SchedulerUnavailable if it does
    not answer.
    """
    python = parameters.python_command(Path.cwd())
    try:
        if cluster == "slurm":
            executor = _SlurmExecutor(folder, python=python)
            executor.update_parameters(job_name=job_name, **parameters.for_slurm())
        else:
            executor = submitit.LocalExecutor(folder, python=python)
            executor.update_parameters(**parameters.for_local())
        with clean_env(), _safe_path(), _terminal_signals_blocked():
            handle = executor.submit(function)
    except (OSError, ValueError, subprocess.SubprocessError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if _UNAVAILABLE.search(message):
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
        clusters=parameters.clusters and (executor.taken_by or parameters.clusters),
    )
    return submission, handle


def cancel(submission: Submission) -> str | None:
    """Ask a submitted job to end. It first stops its service. Returns why that failed, or None."""
    if submission.cluster == "slurm":
        # With its name, because Slurm reuses job ids.
        name = f"--name={submission.job_name}"
        answer = ask("scancel", name, submission.job_id, clusters=submission.clusters)
        return None if answer.text is not None else answer.error
    pid = int(submission.job_id)
    if submission.start_ticks is not None and is_running(pid, submission.start_ticks):
        os.kill(pid, signal.SIGTERM)
    return None


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Processes started in the block have -P as well. submitit gives no other way for its own."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


@contextlib.contextmanager
def _terminal_signals_blocked() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C and hang-ups: the main process handles them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
