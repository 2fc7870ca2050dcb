"""parse_study.py STUDY OUT: parses a study's deployments with the vLLM that is imported.

Writes JSON: vLLM's version, the parsed arguments of each deployment, and the required parameters
of vLLM's parts.
"""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from servegrid.engines import arguments, vllm_api, vllm_nodes
from servegrid.errors import EngineError
from servegrid.study.config import load_study
from servegrid.study.grid import Deployment

PARSED = (
    "api_key",
    "dtype",
    "enable_prefix_caching",
    "generation_config",
    "gpu_memory_utilization",
    "max_model_len",
    "max_num_seqs",
    "model",
    "seed",
    "served_model_name",
    "tensor_parallel_size",
)


ON_NODES = (
    "distributed_executor_backend",
    "master_addr",
    "master_port",
    "nnodes",
    "node_rank",
    "pipeline_parallel_size",
    "tensor_parallel_size",
)


def parse_arguments(api: vllm_api.VllmApi, deployment: Deployment) -> dict[str, Any]:
    defaults = arguments.default_arguments(deployment, "/models/any", None)
    words = arguments.format_arguments(deployment, defaults, api.options, api.version)
    namespace = api.parse([*words, "--api-key", "secret"], deployment.name)
    return {name: getattr(namespace, name, "missing") for name in PARSED}


def parse_on_nodes(api: vllm_api.VllmApi, deployment: Deployment) -> list[dict[str, Any]] | None:
    """The arguments of each of two nodes; None if this vLLM cannot start on several."""
    try:
        vllm_nodes.check_api(deployment, api)
    except EngineError:
        return None
    defaults = arguments.default_arguments(deployment, "/models/any", None)
    words = arguments.format_arguments(deployment, defaults, api.options, api.version)
    found = []
    for rank in range(2):
        own = vllm_nodes.node_arguments(rank, 2, "10.7.0.1", 29500)
        namespace = api.parse([*words, *own], deployment.name)
        found.append({name: getattr(namespace, name) for name in ON_NODES})
    return found


def environment_on_nodes() -> dict[str, Any]:
    """What vLLM and torch make of the variables of a node: those of vLLM that this version does not
    know, and whether torch leaves its store to servegrid."""
    from vllm import envs

    # `torch.distributed.rendezvous` is also the name of a function.
    rendezvous = importlib.import_module("torch.distributed.rendezvous")

    variables = vllm_nodes.node_environment("10.7.0.2", "ib0")
    os.environ |= variables
    names = {name for name in variables if name.startswith("VLLM_")}
    return {
        "unknown": sorted(names - envs.environment_variables.keys()),
        "host_ip": envs.VLLM_HOST_IP,
        "store_is_given": rendezvous._torchelastic_use_agent_store(),
    }


def required(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


api = vllm_api.load_api()
DEPLOYMENTS = load_study(Path(sys.argv[1])).deployments
result = {
    "on_nodes": parse_on_nodes(api, next(each for each in DEPLOYMENTS if each.gpu_count == 4)),
    "environment": environment_on_nodes(),
    "version": api.version,
    "device": api.device,
    "parsed": {deployment.name: parse_arguments(api, deployment) for deployment in DEPLOYMENTS},
    "required": {
        "build_engine": required(api.build_engine),
        "build_app": required(api.build_app),
        "init_state": required(api.init_state),
    },
}
Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
