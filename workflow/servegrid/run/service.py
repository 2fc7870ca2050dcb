"""The service of an allocation: it starts one engine and tells the cells where it is.

A profile names `serve` as the executor's service. Each cell is measured in another process; it
finds the engine through the file that the environment variable SERVEGRID_ALLOCATION names.
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

from servegrid.engines import (
    EMULATED,
    EXTERNAL,
    Engine,
    EnginePart,
    Nodes,
    Site,
    start_engine,
    start_part,
)
from servegrid.engines.vllm_nodes import visible_devices
from servegrid.errors import ConfigError, EngineError, NotServableError
from servegrid.node import environment
from servegrid.node.environment import find_vllm
from servegrid.node.reaper import start_reaper
from servegrid.records.verdict import Verdict
from servegrid.run import cores, pruning
from servegrid.run import nodes as other_nodes
from servegrid.run.calibration import calibrate, describe_calibration
from servegrid.run.revisions import read_pinned
from servegrid.run.unmeasured import RefusedEngine
from servegrid.study import models
from servegrid.study.deployment import VLLM
from servegrid.study.endpoint import Endpoint, api_key_for
from servegrid.study.grid import Deployment, Trial
from servegrid.study.nodes import nodes_problem, version_problem, workers_per_node
from servegrid.telemetry.sampler import Sampler

INFO_VARIABLE = "SERVEGRID_ALLOCATION"
INFO_NAME = "allocation.json"
STARTUP_S = 1800.0
RESULTS = Path("results")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Jobs download nothing: the study's lock file says what was fetched."""


@dataclass(frozen=True)
class Service:
    """For the executor: environment variables for its jobs, and whether the engine still works."""

    env: Mapping[str, str]
    healthy: Callable[[], bool]
    choose: Callable[[Sequence[int]], int | None] | None = None
    """Which of the waiting jobs is next, by their orders; None: the lowest."""


@dataclass(frozen=True)
class AllocationInfo:
    """What a cell needs to know about its allocation and its engine."""

    endpoint: Endpoint
    deployment_digest: str
    tokenizer: Path | None
    """None if the engine accepts any token ids."""
    telemetry: Path
    process: tuple[int, float]
    """Pid and start time of the allocation's process."""
    engine: Mapping[str, Any]
    environment: Mapping[str, Any]
    cpu_sets: Sequence[Sequence[int]]
    """The cores of each process of the load client."""
    calibration: Mapping[str, Any] | None
    """The timing error of the load client on this node; None for an emulated engine."""
    api_key_env: str | None = None
    """The variable with the API key of an external endpoint; the key itself is not written."""
    errors: Path | None = None
    """The file to which the engine's processes write their errors; None if it has none."""
    outcomes: Path | None = None
    """The journal of the deployment's outcomes; None if dominated workloads are tried as well."""
    refused: Mapping[str, Any] | None = None
    """The verdict of all cells if the engine cannot start; then nothing answers at `endpoint`."""

    def write(self, path: Path) -> None:
        known = {name: getattr(self, name) for name in _PATHS}
        paths = {name: str(each) for name, each in known.items() if each is not None}
        endpoint = replace(self.endpoint, api_key=None) if self.api_key_env else self.endpoint
        data = asdict(self) | paths | {"endpoint": asdict(endpoint)}
        with os.fdopen(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
        ) as file:
            json.dump(data, file)

    @classmethod
    def read(cls) -> AllocationInfo:
        """The information of the allocation that this process runs in.

        Raises EngineError if it runs in no allocation, or if the endpoint's API key is missing.
        """
        try:
            data = json.loads(Path(os.environ[INFO_VARIABLE]).read_text(encoding="utf-8"))
        except KeyError:
            raise EngineError(
                "There is no engine, because this process does not run in an allocation. "
                "Run snakemake with a profile, for example --profile profiles/local."
            ) from None
        except OSError as error:
            raise EngineError(
                f"{os.environ[INFO_VARIABLE]}: the allocation has ended ({error.strerror}). "
                "Run the same command again: servegrid measures only what is missing."
            ) from error
        data["endpoint"] = Endpoint(**data["endpoint"])
        if variable := data["api_key_env"]:
            try:
                key = api_key_for(data["endpoint"].base_url, variable, os.environ)
            except ConfigError as error:
                raise EngineError(
                    f"This job lacks the environment of its allocation: {error} Make the jobs "
                    "inherit it."
                ) from None
            data["endpoint"] = replace(data["endpoint"], api_key=key)
        data |= {name: data[name] and Path(data[name]) for name in _PATHS}
        return cls(**data)

    def check_active(self) -> None:
        """Raise EngineError if the allocation has ended: the engine is then not to blame."""
        pid, started = self.process
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).create_time() == started:
                return
        raise EngineError(
            "The allocation ended while this cell was measured. "
            "Run the same command again: servegrid measures only what is missing."
        )


_PATHS = ("telemetry", "tokenizer", "errors", "outcomes")
"""The fields of AllocationInfo that are paths."""


def check_servable(
    name: str, params: Mapping[str, Any], resources: Mapping[str, Any], site: Mapping[str, Any]
) -> None:
    """Raise ConfigError if the requested nodes cannot serve the deployment.

    The executor calls this before it submits; `site` contains the submission parameters.
    """
    deployment = Trial.from_spec(json.loads(params["spec"])).deployment
    nodes = site.get("nodes", 1)
    problem = nodes_problem(deployment, nodes)
    if problem is None and nodes > 1 and "interface" not in site and deployment.engine == VLLM:
        problem = (
            f"deployment `{deployment.name}` needs {deployment.gpu_count} GPUs on {nodes} nodes, "
            "but the profile starts a process on the first one only. Write `submitit-follower: "
            "servegrid.run.service:follow` into its config.yaml."
        )
    if problem is None and (nodes > 1 or deployment.replicas > 1):
        problem = version_problem(deployment, nodes, find_vllm(site))
    if problem is not None:
        raise ConfigError(problem)


@contextlib.contextmanager
def follow(
    name: str, params: Mapping[str, Any], resources: Mapping[str, Any], nodes: Nodes
) -> Iterator[Service]:
    """On each node of an allocation but the first: run this node's part of the engine.

    The arguments are those of `serve`, which the first node is in meanwhile.
    """
    environment.use_utf8()
    deployment = Trial.from_spec(json.loads(params["spec"])).deployment
    site = _site(deployment, resources, nodes)
    check_allocated_gpus(deployment, os.environ)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(start_reaper()).folder
        stack.enter_context(environment.set_environment(OFFLINE | _visible(deployment, nodes)))
        nodes.send({"environment": other_nodes.describe(deployment)}, rank=0)
        part: EnginePart = stack.enter_context(start_part(deployment, site))
        samples = folder / "telemetry.jsonl"
        stack.enter_context(Sampler(part.pids(), samples))
        stack.enter_context(other_nodes.send_samples(nodes, samples))
        yield Service({}, part.healthy)


def _site(deployment: Deployment, resources: Mapping[str, Any], nodes: Nodes | None) -> Site:
    return Site(
        socket=resources.get("socket", "tcp"),
        startup_s=float(resources.get("startup_s", STARTUP_S)),
        models=models.default_folder(),
        revisions=read_pinned(deployment, RESULTS),
        nodes=nodes,
    )


def _visible(deployment: Deployment, nodes: Nodes | None) -> dict[str, str]:
    """On several nodes, the GPUs of this one that the engine uses."""
    if nodes is None or not deployment.node_gpus or deployment.engine != VLLM:
        return {}
    return visible_devices(os.environ, workers_per_node(deployment, len(nodes.hosts)))


@contextlib.contextmanager
def serve(
    name: str,
    params: Mapping[str, Any],
    resources: Mapping[str, Any],
    nodes: Nodes | None = None,
) -> Iterator[Service]:
    """Start the deployment that the cells of one allocation share.

    `params["spec"]` is the specification of any of its trials, as JSON. `resources` contains the
    settings of the site: `socket` (tcp or unix) and `startup_s` (seconds within which the engine
    must start). It also contains `max_concurrency`, the highest number of requests in flight in
    the study, and `prune`: 1 if dominated workloads are not tried. `nodes` is None if the
    allocation has one node; the others are in `follow`.

    If the engine cannot start and no repeat changes that, the cells get this as their verdict.
    """
    environment.use_utf8()
    deployment = Trial.from_spec(json.loads(params["spec"])).deployment
    site = _site(deployment, resources, nodes)
    check_allocated_gpus(deployment, os.environ)
    max_concurrency = int(resources.get("max_concurrency", 1))
    # The client gets its own cores if the engine does not compute on this CPU.
    split = deployment.engine == EXTERNAL or deployment.gpu_count > 0
    cpu_sets = cores.assign_cpu_sets(os.sched_getaffinity(0), max_concurrency, split)
    with contextlib.ExitStack() as stack:
        # The reaper removes the folder with the engine's API key even if this process is killed.
        folder = stack.enter_context(start_reaper()).folder
        stack.enter_context(environment.set_environment(OFFLINE | _visible(deployment, nodes)))
        others = other_nodes.meet(deployment, nodes)
        calibration = None
        if deployment.engine != EMULATED:
            socket = None if site.socket == "tcp" else folder / "mock"
            calibration = calibrate(max_concurrency, cpu_sets, socket)
            print(f"Load client on this node: {describe_calibration(calibration)}", flush=True)
        with cores.pinned_to(cpu_sets.engine):
            engine = _start_or_refuse(stack, deployment, site)
        refused = engine.verdict.record if isinstance(engine, RefusedEngine) else None
        samples = folder / "telemetry.jsonl"
        if deployment.engine == EXTERNAL or refused is not None:
            samples.touch()  # No process and no GPU of this node belongs to the engine.
        else:
            stack.enter_context(Sampler(engine.pids(), samples, engine.endpoint))
            stack.enter_context(other_nodes.samples_of_others(nodes, samples))
        info = AllocationInfo(
            endpoint=engine.endpoint,
            deployment_digest=deployment.digest,
            tokenizer=_tokenizer(deployment, site),
            telemetry=samples,
            process=(os.getpid(), psutil.Process().create_time()),
            engine={**engine.facts, **_revisions(deployment, site)},
            environment=other_nodes.describe(deployment)
            | ({"other_nodes": others} if others else {})
            | {"allocation": name, "started": datetime.now(UTC).isoformat()},
            cpu_sets=[sorted(cpu_set) for cpu_set in cpu_sets.client],
            calibration=calibration,
            api_key_env=None if deployment.endpoint is None else deployment.endpoint.api_key_env,
            errors=engine.errors,
            outcomes=_start_journal(folder, deployment) if resources.get("prune") else None,
            refused=refused,
        )
        info.write(folder / INFO_NAME)
        env = {INFO_VARIABLE: str(folder / INFO_NAME), **OFFLINE}
        yield Service(env, engine.healthy, _chooser(params, resources, site, folder))


def _chooser(
    params: Mapping[str, Any], resources: Mapping[str, Any], site: Site, folder: Path
) -> Callable[[Sequence[int]], int | None] | None:
    """What chooses the next job if a search runs in this allocation."""
    if not resources.get("search"):
        return None
    # Not at the top: only searches need it.
    from servegrid.run.search import Chooser, complete_file
    from servegrid.run.search_plan import SearchPlan

    trial = Trial.from_spec(json.loads(params["spec"]))
    plan = SearchPlan.read(Path(resources["search"]))
    return Chooser(plan, trial.bring_up, site.revisions, complete_file(folder / INFO_NAME))


def _start_or_refuse(stack: contextlib.ExitStack, deployment: Deployment, site: Site) -> Engine:
    """The engine, or a RefusedEngine if it cannot start, whatever is tried.

    On several nodes this stays an error: the other nodes still wait for the start.
    """
    try:
        return stack.enter_context(start_engine(deployment, site))
    except NotServableError as error:
        if site.nodes is not None:
            raise
        print(f"All cells get the verdict {error.verdict}: {error}", flush=True)
        verdict = Verdict(error.verdict, str(error), error.evidence)
        return RefusedEngine.of(deployment, verdict)


def _start_journal(folder: Path, deployment: Deployment) -> Path:
    """A journal with what earlier allocations found out about the deployment."""
    journal = folder / "outcomes.jsonl"
    for outcome in pruning.find_outcomes(RESULTS / "cells", deployment):
        pruning.append_outcome(journal, outcome)
    return journal


def check_allocated_gpus(deployment: Deployment, env: Mapping[str, str]) -> None:
    """Raise EngineError if Slurm has granted fewer GPUs than the deployment needs.

    On a site without GRES, jobs get whole nodes and Slurm lists no GPUs: then this check passes.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if "SLURM_JOB_ID" not in env or visible is None or not deployment.node_gpus:
        return
    nodes = int(env.get("SLURM_JOB_NUM_NODES", 1))
    found, wanted = len(list(filter(None, visible.split(",")))), -(-deployment.node_gpus // nodes)
    if found < wanted:
        raise EngineError(
            f"deployment `{deployment.name}`: this allocation has {found} of {wanted} GPUs on "
            f"node {env.get('SLURMD_NODENAME', '')} (CUDA_VISIBLE_DEVICES={visible}). Set "
            f"slurm_gres or gpus_per_node for the kind `{deployment.gpu}` in the profile."
        )


def _tokenizer(deployment: Deployment, site: Site) -> Path | None:
    return (
        None
        if deployment.engine == EMULATED
        else models.locate(deployment.tokenizer, site.models, site.revisions, "tokenizer")
    )


def _revisions(deployment: Deployment, site: Site) -> dict[str, str]:
    """For the records: the commits of checkpoint and tokenizer, if they are from the Hub."""
    if deployment.engine == EMULATED:
        return {}
    found = {
        "revision": deployment.checkpoint
        and models.find_revision(deployment.checkpoint, site.revisions),
        "tokenizer_revision": models.find_revision(deployment.tokenizer, site.revisions),
    }
    return {key: commit for key, commit in found.items() if commit}
