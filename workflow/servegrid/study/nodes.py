"""What a deployment can be on several nodes. Pure.

vLLM's own multi-node start (`--nnodes`) came with vLLM 0.12 (vllm#23691). Its workers are divided
evenly among the nodes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from servegrid.study.deployment import EMULATED, VLLM, Deployment

MIN_VLLM = (0, 12)
MIN_VLLM_REPLICAS = (0, 11)
"""Before this vLLM, GPUs older than A100 got its engine V0, which starts no replicas: it waits for
them for ever. From here on, all GPUs get V1."""
BACKEND = "distributed_executor_backend"


def workers_per_node(deployment: Deployment, nodes: int) -> int:
    """The workers of a vLLM deployment on each of its `nodes`; with GPUs, each has one."""
    return deployment.parallelism.workers // nodes


def nodes_problem(deployment: Deployment, nodes: int) -> str | None:
    """Why the deployment cannot run on this number of nodes, and the remedy; None if it can."""
    if nodes == 1 or deployment.engine == EMULATED:
        return None
    name = f"deployment `{deployment.name}`"
    needs = f"{name} needs {deployment.gpu_count} GPUs on {nodes} nodes"
    remedy = (
        "Choose a kind of node with enough GPUs, or remove the deployment with `exclude` in the "
        "study."
    )
    if deployment.engine != VLLM:
        return f"{needs}, but servegrid starts {deployment.engine} on one node only. {remedy}"
    parallelism = deployment.parallelism
    if parallelism.data > 1:
        return (
            f"{needs}, but servegrid starts the {parallelism.data} replicas of a deployment "
            "(`replicas`, data parallelism) on one node only. Measure one replica, as a deployment "
            "of its own: the capacity plan says how many you need. Or choose a kind of "
            "node with enough GPUs."
        )
    if parallelism.prefill_context > 1:
        return (
            f"{needs}, but on several nodes servegrid supports tensor and pipeline parallelism "
            f"only, not prefill context parallelism. {remedy}"
        )
    if parallelism.workers % nodes:
        return (
            f"{name}: its {parallelism.workers} workers cannot be divided evenly among {nodes} "
            "nodes. Set `gpu_count` (on a CPU: engine_args.tensor_parallel_size) to a multiple of "
            "the number of nodes."
        )
    backend = {key.replace("-", "_"): each for key, each in deployment.engine_args.items()}.get(
        BACKEND
    )
    if backend not in (None, "mp"):
        return (
            f"{name}: engine_args.{BACKEND}: on several nodes servegrid supports only `mp`, not "
            f"`{backend}`. Remove the argument."
        )
    return None


def version_problem(deployment: Deployment, nodes: int, vllm: str | None) -> str | None:
    """Why this version of vLLM cannot run on several nodes, or several replicas.

    None if it can, or is unknown.
    """
    if deployment.engine != VLLM or vllm is None:
        return None
    found = tuple(map(int, re.findall(r"\d+", vllm)[:2]))
    if len(found) == 2 and found < MIN_VLLM_REPLICAS and deployment.replicas > 1:
        return (
            f"deployment `{deployment.name}` has {deployment.replicas} replicas, but vLLM {vllm} "
            f"of the kind `{deployment.gpu}` may start the engine V0, which has none. vLLM "
            f"{'.'.join(map(str, MIN_VLLM_REPLICAS))} and newer can: use another environment "
            "(`python` of the kind), or measure one replica."
        )
    if nodes == 1 or len(found) < 2 or found >= MIN_VLLM:
        return None
    return (
        f"deployment `{deployment.name}` needs {deployment.gpu_count} GPUs on {nodes} nodes, but "
        f"vLLM {vllm} of the kind `{deployment.gpu}` cannot start on several nodes. vLLM "
        f"{'.'.join(map(str, MIN_VLLM))} and newer can: use another environment (`python` of the "
        "kind), a kind of node with enough GPUs, or `exclude` in the study."
    )


def site_problem(
    deployment: Deployment, nodes: int, kind: Mapping[str, Any], place: str, vllm: str | None
) -> str | None:
    """Why the deployment cannot run on `nodes` nodes of this kind, and the remedy; None if it can.

    `place` is the kind's file and name. `vllm` is the version in its environment; None if unknown.
    """
    if too_few := capacity_problem(deployment.node_gpus, nodes, kind.get("gpus_of_node"), place):
        return f"deployment `{deployment.name}`: {too_few}"
    found = nodes_problem(deployment, nodes)
    if found is None and nodes > 1 and deployment.engine == VLLM and "interface" not in kind:
        found = (
            f"deployment `{deployment.name}` takes {nodes} nodes, but the kind does not name the "
            "network between them. Set `interface`, to a name such as ib0 or to a network such "
            "as 10.7.0.0/16 (`servegrid doctor --network` lists both)."
        )
    found = found or version_problem(deployment, nodes, vllm)
    return found and f"{place}: {found}"


def capacity_problem(gpus: int, nodes: int, per_node: Any, place: str) -> str | None:
    """Why this number of nodes has too few GPUs; None if it has enough, or their number is unknown.

    >>> capacity_problem(4, 1, 2, "kinds.yaml: a100").partition(". ")[0]
    'kinds.yaml: a100.nodes: 1 × gpus_of_node 2 is less than the 4 GPUs that are needed'
    """
    if not isinstance(per_node, int) or isinstance(per_node, bool) or nodes * per_node >= gpus:
        return None
    return (
        f"{place}.nodes: {nodes} × gpus_of_node {per_node} is less than the {gpus} GPUs that are "
        "needed. Remove `nodes`: servegrid takes as many nodes as it needs."
    )
