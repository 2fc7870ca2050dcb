"""A deployment as command-line arguments of the vLLM that is installed. Pure.

Which arguments exist, and what they default to, changes with every few versions of vLLM. So
every value that decides the result is given, and nothing that the installed parser lacks.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from servegrid.errors import ConfigError
from servegrid.study.grid import Deployment

GPU_MEMORY_UTILIZATION = 0.90
SHUTDOWN_TIMEOUT_S = 15
KV_CACHE_LIMIT_BYTES = 1 << 30
"""Enough for a demo, and soon made ready: vLLM writes to all of its KV cache when it starts."""
BLOCK_TOKENS = 128
"""vLLM on a CPU gives the KV cache out in blocks of so many tokens."""

KEYS_OF_THE_DEPLOYMENT = {
    "model": "checkpoint",
    "served_model_name": "model",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "tensor_parallel_size": "gpu_count",
}
"""Arguments that a deployment gives by a key of its own, with that key."""

KEYS_OF_THE_SITE = ("host", "port", "uds", "api_key")


def format_arguments(
    deployment: Deployment,
    defaults: Mapping[str, Any],
    options: Collection[str],
    version: str,
) -> list[str]:
    """The arguments for a parser that knows the option strings `options`.

    `defaults` are the values of `defaults_for`; the deployment's own `engine_args` come over them,
    and a null among those leaves the choice to vLLM. True and false become flags, lists several
    values, mappings JSON. Raises ConfigError, naming the key, where an argument is one that the
    deployment or the site decides, or unknown to `version`.
    """
    for key in deployment.engine_args:
        _check_not_decided_elsewhere(deployment, key)
        if not _is_known(key, options):
            raise ConfigError(_unknown(deployment, key, options, version))
    settings = {key: value for key, value in defaults.items() if _is_known(key, options)}
    settings |= deployment.engine_args
    return [
        word
        for key, value in settings.items()
        if value is not None
        for word in _words(key, value, options)
    ]


def default_arguments(
    deployment: Deployment, checkpoint: str, kv_cache_bytes: int | None
) -> dict[str, Any]:
    """What a deployment means in vLLM's arguments, its own `engine_args` left out.

    `kv_cache_bytes` is the size of the KV cache on a CPU; on GPUs vLLM takes what the share
    `gpu_memory_utilization` of their memory leaves beside the weights.
    """
    settings = {
        "model": checkpoint,
        "served_model_name": deployment.model,
        "max_model_len": deployment.max_model_len,
        "max_num_seqs": deployment.max_num_seqs,
        "tensor_parallel_size": max(1, deployment.gpu_count),
        "seed": 0,
        "generation_config": "vllm",
        "enable_prefix_caching": False,
        "shutdown_timeout": SHUTDOWN_TIMEOUT_S,
    }
    if deployment.gpu_count:
        return settings | {"gpu_memory_utilization": GPU_MEMORY_UTILIZATION}
    return settings | {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "kv_cache_memory_bytes": kv_cache_bytes,
    }


def kv_cache_bytes(
    deployment: Deployment, model_config: Mapping[str, Any], memory_bytes: int
) -> int:
    """Bytes of KV cache for `max_num_seqs` requests of `max_model_len` tokens on a CPU.

    Per token and layer: a key and a value for each KV head in 16 bits, as `model_config` (the
    model's config.json) says. At most `KV_CACHE_LIMIT_BYTES` and a quarter of the machine's
    `memory_bytes`, which is also the answer for a model whose config says it otherwise; but
    always enough for one request, without which vLLM would not start.
    """
    limit = min(KV_CACHE_LIMIT_BYTES, memory_bytes // 4)
    try:
        heads = model_config["num_attention_heads"]
        head_dim = model_config.get("head_dim") or model_config["hidden_size"] // heads
        kv_heads = model_config.get("num_key_value_heads") or heads
        layers = model_config["num_hidden_layers"]
    except KeyError:
        return limit
    per_token: int = layers * kv_heads * head_dim * 2 * 2
    per_request = per_token * -(-deployment.max_model_len // BLOCK_TOKENS) * BLOCK_TOKENS
    return max(per_request, min(limit, per_request * deployment.max_num_seqs))


def _check_not_decided_elsewhere(deployment: Deployment, key: str) -> None:
    if key in KEYS_OF_THE_DEPLOYMENT:
        raise ConfigError(
            f"deployment `{deployment.name}`: engine_args.{key} is decided by the deployment's own "
            f"key `{KEYS_OF_THE_DEPLOYMENT[key]}`. Set that one and remove the argument."
        )
    if key in KEYS_OF_THE_SITE:
        raise ConfigError(
            f"deployment `{deployment.name}`: engine_args.{key} is decided by where it runs. "
            "Remove it; the profile's `socket` chooses between tcp and unix."
        )


def _is_known(key: str, options: Collection[str]) -> bool:
    return _flag(key) in options or _flag(key, negated=True) in options


def _words(key: str, value: Any, options: Collection[str]) -> list[str]:
    flag = _flag(key)
    if value is True:
        return [flag]
    if value is False:
        negated = _flag(key, negated=True)
        return [negated] if negated in options else []
    if isinstance(value, Mapping):
        return [flag, json.dumps(value, sort_keys=True)]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def _flag(key: str, negated: bool = False) -> str:
    return ("--no-" if negated else "--") + key.replace("_", "-")


def _unknown(deployment: Deployment, key: str, options: Collection[str], version: str) -> str:
    names = [each.removeprefix("--").replace("-", "_") for each in options if each[:2] == "--"]
    close = difflib.get_close_matches(key, names)
    meant = f"Did you mean {' or '.join(f'`{each}`' for each in close)}?" if close else "Remove it."
    return (
        f"deployment `{deployment.name}`: engine_args.{key}: "
        f"vLLM {version} has no option {_flag(key)}. {meant}"
    )
