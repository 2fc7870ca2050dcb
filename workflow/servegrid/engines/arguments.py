"""Translates a deployment to command-line arguments of the installed vLLM. Pure.

vLLM's arguments and their defaults change every few versions. So every setting that can change a
result is passed explicitly, and an argument that the installed vLLM does not have is left out.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from servegrid.errors import ConfigError
from servegrid.study.deployment import GPU_MEMORY_UTILIZATION
from servegrid.study.grid import Deployment

SHUTDOWN_TIMEOUT_S = 15
KV_CACHE_LIMIT_BYTES = 1 << 30
"""Enough for a demo, and quick to start: vLLM writes to the whole KV cache when it starts."""
BLOCK_TOKENS = 128
"""Tokens per block of the KV cache in vLLM on a CPU."""

_DEPLOYMENT_KEYS = {
    "model": "checkpoint",
    "served_model_name": "model",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "chat_template": "chat_template",
    "lora_modules": "lora",
}
"""Arguments of vLLM that a deployment sets with another key, and that key."""

_SITE_KEYS = ("host", "port", "uds", "api_key")


def format_arguments(
    deployment: Deployment,
    defaults: Mapping[str, Any],
    options: Collection[str],
    version: str,
) -> list[str]:
    """The words of the command line, for a parser that knows the option strings `options`.

    `defaults` comes from `default_arguments`. The deployment's `engine_args` override it; the value
    null leaves the choice to vLLM. True and false become flags, a list becomes several words, and a
    mapping becomes JSON, also within a list.

    Raises ConfigError with the key if servegrid sets this argument itself, or if vLLM `version`
    does not know it.
    """
    for key, value in deployment.engine_args.items():
        _check_allowed(deployment, key)
        _check_no_option(deployment, key, value)
        if not _is_known(key, options):
            raise ConfigError(_unknown_argument(deployment, key, options, version))
    settings = {key: value for key, value in defaults.items() if _is_known(key, options)}
    settings |= deployment.engine_args
    return [
        word
        for key, value in settings.items()
        if value is not None
        for word in _format_argument(key, value, options)
    ]


def default_arguments(
    deployment: Deployment, checkpoint: str, kv_cache_bytes: int | None
) -> dict[str, Any]:
    """vLLM's arguments for a deployment, without its `engine_args`.

    `kv_cache_bytes` is the size of the KV cache on a CPU. On GPUs, vLLM uses the fraction
    `gpu_memory_utilization` of their memory: the weights first, the KV cache with the rest.
    """
    settings = {
        "model": checkpoint,
        "served_model_name": deployment.model,
        "max_model_len": deployment.max_model_len,
        "max_num_seqs": deployment.max_num_seqs,
        "tensor_parallel_size": deployment.parallelism.tensor,
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

    Each replica gets them. Each token needs, per layer and KV head, a key and a value of `head_dim`
    numbers of 16 bits, or of 32 if `dtype` says so; these sizes come from `model_config`, the
    model's config.json. All replicas together get at most `KV_CACHE_LIMIT_BYTES` and a quarter of
    `memory_bytes`, the machine's memory. This limit is also the result if config.json lacks these
    sizes. It is always enough for one request, because vLLM does not start with less. vLLM uses the
    first block of the cache for nothing (`null_block` of its BlockPool), so there is one more.
    """
    limit = min(KV_CACHE_LIMIT_BYTES, memory_bytes // 4) // deployment.replicas
    try:
        heads = model_config["num_attention_heads"]
        head_dim = model_config.get("head_dim") or model_config["hidden_size"] // heads
        kv_heads = model_config.get("num_key_value_heads") or heads
        layers = model_config["num_hidden_layers"]
    except KeyError:
        return limit
    single = deployment.engine_args.get("dtype") in ("float", "float32")
    per_token: int = layers * kv_heads * head_dim * 2 * (4 if single else 2)
    per_request = per_token * -(-deployment.max_model_len // BLOCK_TOKENS) * BLOCK_TOKENS
    unused = per_token * BLOCK_TOKENS
    return max(unused + per_request, min(limit, unused + per_request * deployment.max_num_seqs))


def worker_cores(
    cores: Collection[int], workers: int, siblings: Callable[[int], frozenset[int]]
) -> str:
    """The cores of each of vLLM's workers on a CPU, as VLLM_CPU_OMP_THREADS_BIND wants them.

    vLLM 0.32 itself binds all replicas to the same cores. Like vLLM, this takes one hardware thread
    of each physical core, unless there are too few; `siblings` returns the threads of a core.

    >>> worker_cores(range(8), 2, lambda core: frozenset({core % 4, core % 4 + 4}))
    '0,1|2,3'
    """
    physical = sorted({min(siblings(core) & frozenset(cores)) for core in cores})
    usable = physical if len(physical) >= workers else sorted(cores)
    each = len(usable) // workers
    if not each:
        return "nobind"
    parts = (usable[number * each : (number + 1) * each] for number in range(workers))
    return "|".join(",".join(map(str, part)) for part in parts)


def _check_no_option(deployment: Deployment, key: str, value: Any) -> None:
    """A value that begins with a hyphen would be an option of its own for vLLM's parser."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, str) and each.startswith("-"):
            raise ConfigError(
                f"deployment `{deployment.name}`: engine_args.{key}: {each!r} begins with a "
                "hyphen, so vLLM would take it for an option. Correct the value."
            )


def _check_allowed(deployment: Deployment, key: str) -> None:
    key = key.replace("-", "_")  # vLLM takes both
    if key in _DEPLOYMENT_KEYS:
        raise ConfigError(
            f"deployment `{deployment.name}`: engine_args.{key} is set by the deployment's "
            f"own key `{_DEPLOYMENT_KEYS[key]}`. Set that key and remove the argument."
        )
    if key == "config":
        raise ConfigError(
            f"deployment `{deployment.name}`: engine_args.config would take arguments from a file "
            "that no record shows. Write them into engine_args."
        )
    if key in _SITE_KEYS:
        raise ConfigError(
            f"deployment `{deployment.name}`: engine_args.{key} is set by servegrid. "
            "Remove it. `socket` in the profile chooses between tcp and unix."
        )


def _is_known(key: str, options: Collection[str]) -> bool:
    return _flag(key) in options or _flag(key, negated=True) in options


def _format_argument(key: str, value: Any, options: Collection[str]) -> list[str]:
    flag = _flag(key)
    if value is True:
        return [flag]
    if value is False:
        negated = _flag(key, negated=True)
        return [negated] if negated in options else []
    if isinstance(value, Mapping):
        return [flag, json.dumps(value, sort_keys=True)]
    if isinstance(value, list | tuple):
        return [flag, *map(_format_item, value)]
    return [flag, str(value)]


def _format_item(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else str(value)


def _flag(key: str, negated: bool = False) -> str:
    return ("--no-" if negated else "--") + key.replace("_", "-")


def _unknown_argument(
    deployment: Deployment, key: str, options: Collection[str], version: str
) -> str:
    names = [name.removeprefix("--").replace("-", "_") for name in options if name[:2] == "--"]
    close = difflib.get_close_matches(key, names)
    remedy = (
        f"Did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else "Remove it."
    )
    return (
        f"deployment `{deployment.name}`: engine_args.{key}: "
        f"vLLM {version} has no option {_flag(key)}. {remedy}"
    )
