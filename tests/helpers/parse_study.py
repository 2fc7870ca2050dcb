"""parse_study.py STUDY OUT: parses a study's deployments with the vLLM that is imported.

Writes JSON: vLLM's version, the parsed arguments of each deployment, and the required parameters
of vLLM's parts.
"""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from servegrid.engines import arguments, vllm_api
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


def parse_arguments(api: vllm_api.VllmApi, deployment: Deployment) -> dict[str, Any]:
    defaults = arguments.default_arguments(deployment, "/models/any", None)
    words = arguments.format_arguments(deployment, defaults, api.options, api.version)
    namespace = api.parse([*words, "--api-key", "secret"], deployment.name)
    return {name: getattr(namespace, name, "missing") for name in PARSED}


def required(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


api = vllm_api.load_api()
result = {
    "version": api.version,
    "device": api.device,
    "parsed": {
        deployment.name: parse_arguments(api, deployment)
        for deployment in load_study(Path(sys.argv[1])).deployments
    },
    "required": {
        "build_engine": required(api.build_engine),
        "build_app": required(api.build_app),
        "init_state": required(api.init_state),
    },
}
Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
