"""How the weights and the KV cache of a deployment lie in the memory of its GPUs. Pure.

vLLM takes the fraction `gpu_memory_utilization` of each GPU: the weights first, then what a step
needs, and the KV cache with the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from servegrid.errors import ConfigError
from servegrid.reference import data
from servegrid.reference.roofline import ModelShape
from servegrid.study.deployment import CPU, GPU_MEMORY_UTILIZATION
from servegrid.study.grid import Deployment

Capability = tuple[int, int]
"""NVIDIA's compute capability."""

RUNTIME_BYTES = 1.5e9
"""Memory of each GPU for CUDA, activations and communication, within the utilization."""
BLOCK_TOKENS = 16
"""Tokens per block of vLLM's KV cache on GPUs."""
CPU_CORE_BANDWIDTH, CPU_CORE_FLOPS = 8e9, 0.15e12
"""Bytes/s and FLOP/s of one core: round numbers of servers with AVX-512, not of any one CPU."""


@dataclass(frozen=True)
class Device:
    """One GPU, or one core of a CPU.

    `link` is the bandwidth to the other GPUs in bytes/s, `power_w` the power limit. `memory_bytes`
    and `capability` are None if they are not known.
    """

    architecture: str
    bandwidth: float
    flops: float
    link: float
    memory_bytes: float | None = None
    capability: Capability | None = None
    power_w: float | None = None


CPU_CORE = Device(CPU, CPU_CORE_BANDWIDTH, CPU_CORE_FLOPS, link=math.inf)


def find_device(gpu: str) -> Device:
    """The GPU of this name. Raises ConfigError if `data.gpus()` does not have it."""
    if gpu == CPU:
        return CPU_CORE
    gpus = data.gpus()
    if gpu not in gpus.index:
        raise ConfigError(
            f"the memory and the speed of gpu `{gpu}` are not known. Use one of "
            f"{', '.join(gpus.index)}, or add a row to reference/gpus.csv of the package."
        )
    row: dict[Any, Any] = gpus.loc[gpu].to_dict()
    return Device(
        architecture=row["architecture"],
        bandwidth=row["bandwidth_gb_s"] * 1e9,
        flops=row["fp16_tflops"] * 1e12,
        link=row["link_gb_s"] * 1e9,
        memory_bytes=row["memory_gib"] * 2**30,
        capability=parse_capability(row["capability"]),
        power_w=row["power_w"],
    )


def parse_capability(value: float) -> Capability | None:
    """
    >>> parse_capability(8.9)
    (8, 9)
    """
    return None if value != value else divmod(round(10 * value), 10)


@dataclass(frozen=True)
class Placement:
    """The memory of a deployment, in bytes per GPU; `kv_pool` is what is left for the KV cache.

    `copies` counts the copies of the model (data parallelism). `kv_share` is the part of a
    sequence's KV cache that one GPU holds. `kv_pool` is infinite if the memory is not known, and
    negative if the weights do not fit.
    """

    shape: ModelShape
    weights: float
    usable: float
    kv_pool: float
    copies: int
    kv_share: float

    def sequence_bytes(self, tokens: float) -> float:
        """The KV cache of one sequence with `tokens` tokens, on each of its GPUs."""
        return self.shape.kv_cache_bytes(tokens) * self.kv_share

    def sequences(self, tokens: float) -> float:
        """How many sequences of `tokens` tokens the KV caches of all copies hold."""
        return max(0.0, self.kv_pool) * self.copies / self.sequence_bytes(tokens)

    def capacity_tokens(self, length: float) -> float:
        """The tokens in sequences of `length` tokens that the KV caches of all copies hold."""
        return self.sequences(length) * length


def place(deployment: Deployment, shape: ModelShape, device: Device) -> Placement:
    """How vLLM places the deployment.

    Tensor and pipeline parallelism split the weights. Tensor parallelism splits the KV cache by
    heads; with more GPUs than KV heads, a head is stored several times. Replicas have a copy of the
    weights each, but vLLM divides the experts of a model among all of them. Raises ConfigError if
    `engine_args` contradict `gpu_count`.
    """
    sizes, arguments = deployment.parallelism, deployment.engine_args
    gpus = sizes.tensor * sizes.pipeline
    shared = shape.expert_share * (1 - 1 / sizes.data)
    weights = shape.weight_bytes * (1 - shared) / gpus
    repeats = max(1.0, sizes.tensor / shape.kv_heads) if shape.kv_heads else 1.0
    kv_share = repeats / gpus
    if device.memory_bytes is None:
        usable = pool = math.inf
    else:
        usable = device.memory_bytes * get_number(
            deployment, "gpu_memory_utilization", GPU_MEMORY_UTILIZATION
        )
        pool = usable - weights - RUNTIME_BYTES
    if arguments.get("kv_cache_memory_bytes"):
        pool = get_number(deployment, "kv_cache_memory_bytes", pool)
    if arguments.get("num_gpu_blocks_override"):
        block = get_number(deployment, "block_size", BLOCK_TOKENS)
        blocks = get_number(deployment, "num_gpu_blocks_override", 0)
        pool = blocks * block * shape.kv_bytes_per_token * kv_share
    return Placement(shape, weights, usable, pool, sizes.data, kv_share)


def get_number(deployment: Deployment, key: str, default: float) -> float:
    """A number of `engine_args`. Raises ConfigError if it is none, or not above 0."""
    value = deployment.engine_args.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ConfigError(
            f"deployment `{deployment.name}`: engine_args.{key}: {value!r} is not a number above "
            "0. Correct it."
        )
    return float(value)
