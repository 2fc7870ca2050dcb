"""What an allocation does for its cells: one engine up, watched, and known to them.

`serve` is what a profile names as the executor's service; a cell's own process, forked
elsewhere, finds the engine through the hand-over file that SERVEGRID_ALLOCATION names.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from servegrid.engines import EMULATED, EXTERNAL, Site, start_engine
from servegrid.errors import ConfigError, EngineError
from servegrid.node import environment, nvml
from servegrid.node.reaper import start_reaper
from servegrid.run import cores
from servegrid.run.calibration import calibrate, describe_calibration
from servegrid.study import models
from servegrid.study.endpoint import Endpoint, read_api_key
from servegrid.study.grid import Deployment, Trial
from servegrid.telemetry.sampler import Sampler

INFO_VARIABLE = "SERVEGRID_ALLOCATION"
STARTUP_S = 1800.0


@dataclass(frozen=True)
class Service:
    """What the executor needs: variables for its jobs, and whether more of them make sense."""

    env: Mapping[str, str]
    healthy: Callable[[], bool]


@dataclass(frozen=True)
class AllocationInfo:
    """What a cell must know of the engine that its allocation has up."""

    endpoint: Endpoint
    deployment_digest: str
    tokenizer: Path | None
    """None where the engine takes any token ids."""
    telemetry: Path
    process: tuple[int, float]
    """Pid and start time of the allocation's process."""
    engine: Mapping[str, Any]
    environment: Mapping[str, Any]
    cpu_sets: Sequence[Sequence[int]]
    """The cores of each process of the load client."""
    self_check: Mapping[str, Any] | None
    """What the load client distorts on this node; None where nothing real is served."""
    api_key_env: str | None = None
    """The variable with the API key of an external endpoint, whose key is not written down."""

    def write(self, path: Path) -> None:
        paths = {"telemetry": str(self.telemetry)}
        if self.tokenizer is not None:
            paths["tokenizer"] = str(self.tokenizer)
        endpoint = replace(self.endpoint, api_key=None) if self.api_key_env else self.endpoint
        data = asdict(self) | paths | {"endpoint": asdict(endpoint)}
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(data, file)

    @classmethod
    def read(cls) -> AllocationInfo:
        """The hand-over of the allocation that this process runs in.

        Raises EngineError where it runs in none, or lacks the endpoint's API key.
        """
        try:
            data = json.loads(Path(os.environ[INFO_VARIABLE]).read_text())
        except KeyError:
            raise EngineError(
                "No engine is up: a cell is measured inside an allocation. "
                "Run snakemake with a profile, such as --profile profiles/local."
            ) from None
        except OSError as error:
            raise EngineError(
                f"{os.environ[INFO_VARIABLE]}: the allocation has ended ({error.strerror}). "
                "Run the same command again: only what is missing is measured."
            ) from error
        data["endpoint"] = Endpoint(**data["endpoint"])
        if variable := data["api_key_env"]:
            key = read_api_key(variable, os.environ)
            if key is None:
                raise EngineError(
                    f"the variable {variable} holds no API key in this job, though it did in its "
                    "allocation. Have the jobs inherit it."
                )
            data["endpoint"] = replace(data["endpoint"], api_key=key)
        data["telemetry"] = Path(data["telemetry"])
        data["tokenizer"] = data["tokenizer"] and Path(data["tokenizer"])
        return cls(**data)

    def refuse_ended(self) -> None:
        """Raise EngineError where the allocation is gone: what failed then says nothing."""
        pid, started = self.process
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).create_time() == started:
                return
        raise EngineError(
            "The allocation was ended while this cell was measured. "
            "Run the same command again: only what is missing is measured."
        )


def check_servable(
    name: str, params: Mapping[str, Any], resources: Mapping[str, Any], site: Mapping[str, Any]
) -> None:
    """Raise ConfigError where the deployment cannot be served on what is asked of the cluster.

    The executor asks this before it submits; `site` are the submission parameters.
    """
    deployment = Trial.from_spec(json.loads(params["spec"])).deployment
    nodes = site.get("nodes", 1)
    if nodes > 1 and deployment.engine != EMULATED:
        raise ConfigError(
            f"deployment `{deployment.name}` needs {deployment.gpu_count} GPUs on {nodes} nodes, "
            f"and servegrid brings {deployment.engine} up on one: over several it would take a "
            "process on each of them and a network between their GPUs, which is not supported. "
            "Choose a kind of node with enough GPUs, or leave it out by `exclude` in the study."
        )


@contextlib.contextmanager
def serve(name: str, params: Mapping[str, Any], resources: Mapping[str, Any]) -> Iterator[Service]:
    """Bring up the deployment that the cells of one allocation share.

    `params["spec"]` is the specification of any of its trials, as JSON. The site speaks through
    `resources`: `socket` (tcp or unix) and `startup_s`, the limit of the bring-up in seconds; the
    study as well: `max_concurrency`, the most requests that will be in flight.
    """
    deployment = Trial.from_spec(json.loads(params["spec"])).deployment
    site = Site(
        socket=resources.get("socket", "tcp"),
        startup_s=float(resources.get("startup_s", STARTUP_S)),
        models=models.default_folder(),
    )
    check_allocated_gpus(deployment, os.environ)
    max_concurrency = int(resources.get("max_concurrency", 1))
    # Beside an engine that is elsewhere the client has cores of its own, as beside one on GPUs.
    apart = deployment.engine == EXTERNAL or deployment.gpu_count > 0
    shared = cores.assign_cpu_sets(os.sched_getaffinity(0), max_concurrency, apart)
    with contextlib.ExitStack() as stack:
        # A reaper, so that the folder with the engine's key goes even if this process is killed.
        folder = stack.enter_context(start_reaper()).folder
        check = None
        if deployment.engine != EMULATED:
            socket = None if site.socket == "tcp" else folder / "self-check"
            check = calibrate(max_concurrency, shared, socket)
            print(f"The load client on this node: {describe_calibration(check)}", flush=True)
        with cores.pinned_to(shared.engine):
            engine = stack.enter_context(start_engine(deployment, site))
        samples = folder / "telemetry.jsonl"
        if deployment.engine == EXTERNAL:
            samples.touch()  # Nothing on this node is the engine's, neither processes nor GPUs.
        else:
            stack.enter_context(Sampler(engine.pids(), samples, engine.endpoint))
        info = AllocationInfo(
            endpoint=engine.endpoint,
            deployment_digest=deployment.digest,
            tokenizer=_tokenizer(deployment, site),
            telemetry=samples,
            process=(os.getpid(), psutil.Process().create_time()),
            engine=engine.facts,
            environment=environment.describe_node()
            | (nvml.describe_gpus(os.environ) if deployment.node_gpus else {})
            | {"allocation": name, "started": datetime.now(UTC).isoformat()},
            cpu_sets=[sorted(each) for each in shared.client],
            self_check=check,
            api_key_env=None if deployment.endpoint is None else deployment.endpoint.api_key_env,
        )
        info.write(folder / "handover.json")
        yield Service({INFO_VARIABLE: str(folder / "handover.json")}, engine.healthy)


def check_allocated_gpus(deployment: Deployment, env: Mapping[str, str]) -> None:
    """Raise EngineError where Slurm has handed over fewer GPUs than the deployment needs.

    Where it hands none over by name (whole nodes, on sites without GRES), nothing is known here.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if "SLURM_JOB_ID" not in env or visible is None or not deployment.node_gpus:
        return
    nodes = int(env.get("SLURM_JOB_NUM_NODES", 1))
    found, wanted = len(list(filter(None, visible.split(",")))), -(-deployment.node_gpus // nodes)
    if found < wanted:
        raise EngineError(
            f"deployment `{deployment.name}`: this allocation has {found} of {wanted} GPUs on "
            f"node {env.get('SLURMD_NODENAME', '')} (CUDA_VISIBLE_DEVICES={visible}). Make the "
            f"kind `{deployment.gpu}` of the profile ask for them, by slurm_gres or gpus_per_node."
        )


def _tokenizer(deployment: Deployment, site: Site) -> Path | None:
    return (
        None if deployment.engine == EMULATED else models.locate(deployment.tokenizer, site.models)
    )
