"""How the GPUs of a vLLM deployment work together. Pure.

`gpu_count` counts all GPUs of a deployment, on all its nodes, because costs and allocations depend
on them. A CPU has none, so there `tensor_parallel_size` says how many workers share the model. vLLM
needs tensor × pipeline × data × prefill context parallel sizes (vLLM 0.32, ParallelConfig in
`vllm/config/parallel.py`). Expert parallelism and decode context parallelism use the same GPUs
again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from servegrid.errors import ConfigError

TENSOR = "tensor_parallel_size"
PIPELINE, DATA = "pipeline_parallel_size", "data_parallel_size"
PREFILL_CONTEXT = "prefill_context_parallel_size"

SEVERAL_SERVERS = frozenset(
    {
        *("data_parallel_size_local", "data_parallel_rank", "data_parallel_start_rank"),
        *("data_parallel_address", "data_parallel_external_lb", "data_parallel_hybrid_lb"),
        *("data_parallel_multi_port_external_lb", "headless", "nnodes", "node_rank"),
        *("master_addr", "master_port"),
    }
)
"""Arguments for a model that several servers or nodes share. servegrid sets those it needs."""


@dataclass(frozen=True)
class Parallelism:
    """The GPUs in each dimension; their product is the number of GPUs (1 for a CPU)."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    prefill_context: int = 1

    @property
    def workers(self) -> int:
        """The processes that share the work."""
        return self.tensor * self.pipeline * self.data * self.prefill_context


def read_parallelism(engine_args: Mapping[str, Any], gpu_count: int, where: str) -> Parallelism:
    """The parallelism of vLLM with these `engine_args` on `gpu_count` GPUs (0: a CPU).

    Tensor parallelism uses what the other dimensions leave. Raises ConfigError, which names `where`
    and the key, if that is not a whole number of GPUs, or if an argument needs several servers.
    """
    given = {key.replace("-", "_"): value for key, value in engine_args.items()}  # vLLM takes both
    if TENSOR in given and gpu_count:
        raise ConfigError(
            f"{where}: engine_args.{TENSOR} is set by the deployment's own key `gpu_count`, which "
            "counts all GPUs. Set that key and remove the argument."
        )
    for key in SEVERAL_SERVERS & given.keys():
        if given[key] not in (None, False):
            raise ConfigError(
                f"{where}: engine_args.{key} spreads the model over several servers, but servegrid "
                f"starts one. Remove the argument. `replicas` starts several copies. If a node has "
                "too few GPUs, servegrid takes several nodes."
            )
    sizes = {key: _size(given.get(key), key, where) for key in (PIPELINE, DATA, PREFILL_CONTEXT)}
    others = sizes[PIPELINE] * sizes[DATA] * sizes[PREFILL_CONTEXT]
    if gpu_count % others:
        factors = " × ".join(f"{key} {size}" for key, size in sizes.items() if size > 1)
        raise ConfigError(
            f"{where}: gpu_count {gpu_count} is not a multiple of {others} ({factors} in "
            "engine_args). `gpu_count` counts all GPUs of the deployment: tensor × pipeline × data "
            f"parallel. Set it to {others} times the GPUs of tensor parallelism."
        )
    tensor = gpu_count // others if gpu_count else _size(given.get(TENSOR), TENSOR, where)
    return Parallelism(max(1, tensor), *sizes.values())


def _size(value: Any, key: str, where: str) -> int:
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{where}: engine_args.{key}: {value!r} is not valid. Use a whole number above 0."
        )
    return value
