"""Whether a deployment can serve its cells: capability, shapes, memory. Pure.

It calls impossible only what is sure to fail. `engines.compatibility` checks the node's own GPUs
and software in the job.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from servegrid.reference import data
from servegrid.reference.checkpoint import quantization_method
from servegrid.reference.memory import (
    RUNTIME_BYTES,
    Capability,
    Device,
    Placement,
    parse_capability,
)
from servegrid.study.deployment import EMULATED, EXTERNAL, VLLM, Deployment
from servegrid.study.grid import Trial, Workload

FITS, QUEUES, CANNOT, UNKNOWN = "fits", "will queue", "cannot work", "unknown"
GIB = 2**30

AMPERE: Capability = (8, 0)
TURING: Capability = (7, 5)
SIZE_CHANGING = ("offload", "load_format", "hf_overrides", "quantization")
"""With arguments that contain one of these, the GPUs may hold less than the weights' size."""
CONTEXT_CHANGING = ("hf_overrides", "rope")
"""With these, a model may take more tokens than its config.json says."""


class Outlook(NamedTuple):
    """How a cell will go: FITS, QUEUES, CANNOT or UNKNOWN, and why."""

    status: str
    why: str | None = None


def deployment_problem(
    deployment: Deployment, placement: Placement, device: Device, config: Mapping[str, Any]
) -> str | None:
    """Why the engine cannot start, with the remedy; None if nothing is sure to fail.

    `config` is the checkpoint's config.json, empty if it is not here. Engines that servegrid does
    not start, or that need no model, have no problem.
    """
    if deployment.engine in (EMULATED, EXTERNAL):
        return None
    checks: list[Iterator[str]] = [_context(deployment, placement)]
    if deployment.engine == VLLM and deployment.gpu_count:
        checks += [
            _capability(deployment, device, config),
            _parallelism(deployment, placement),
            _memory(deployment, placement, device),
        ]
    return next((problem for check in checks for problem in check), None)


def _capability(deployment: Deployment, device: Device, config: Mapping[str, Any]) -> Iterator[str]:
    if device.capability is None:
        return
    quantizations = data.quantizations()
    needed: list[tuple[str, Capability]] = []
    if deployment.quantization in quantizations.index:
        row: dict[Any, Any] = quantizations.loc[deployment.quantization].to_dict()
        if (least := parse_capability(row["capability"])) is not None:
            needed.append((f"quantization `{deployment.quantization}`", least))
    if method := quantization_method(config):
        known = quantizations[quantizations["kernel"] == method]["capability"].dropna()
        if len(known) and (least := parse_capability(float(known.min()))):
            needed.append((f"the checkpoint's quantization `{method}`", least))
    if str(deployment.engine_args.get("dtype")).lower() == "bfloat16":
        needed.append(("dtype bfloat16", AMPERE))
    if str(deployment.engine_args.get("kv_cache_dtype")).lower().startswith("fp8"):
        needed.append(("kv_cache_dtype fp8", TURING))
    for what, least in needed:
        if device.capability < least:
            yield (
                f"{what} needs compute capability {_dotted(least)}, and {deployment.gpu} has "
                f"{_dotted(device.capability)}. Use another data type or quantization, or newer "
                "GPUs."
            )


def _context(deployment: Deployment, placement: Placement) -> Iterator[str]:
    longest = placement.shape.max_context
    if not longest or deployment.max_model_len <= longest or _has(deployment, CONTEXT_CHANGING):
        return
    yield (
        f"max_model_len {deployment.max_model_len} is more than the model's context of {longest} "
        "tokens. Lower it."
    )


def _parallelism(deployment: Deployment, placement: Placement) -> Iterator[str]:
    tensor, shape = deployment.parallelism.tensor, placement.shape
    if shape.heads and shape.heads % tensor:
        yield (
            f"{shape.heads} attention heads cannot be split over {tensor} GPUs. Set `gpu_count` "
            "to a divisor, or use pipeline_parallel_size."
        )
    if shape.kv_heads and shape.kv_heads % tensor and tensor % shape.kv_heads:
        yield (
            f"{shape.kv_heads} KV heads cannot be split over {tensor} GPUs. Set `gpu_count` to a "
            "divisor or a multiple of them, or use pipeline_parallel_size."
        )


def _memory(deployment: Deployment, placement: Placement, device: Device) -> Iterator[str]:
    if device.memory_bytes is None or _has(deployment, SIZE_CHANGING):
        return
    weights, usable = placement.weights / GIB, placement.usable / GIB
    if placement.weights > placement.usable:
        yield (
            f"weights of {weights:.1f} GiB per GPU are more than the usable {usable:.1f} GiB "
            f"({device.memory_bytes / GIB:.0f} GiB × gpu_memory_utilization "
            f"{placement.usable / device.memory_bytes:g}). Raise `gpu_count`, or use larger GPUs "
            "or fewer bits."
        )
    elif (one := placement.sequence_bytes(deployment.max_model_len)) > placement.kv_pool:
        yield (
            f"one request of max_model_len {deployment.max_model_len} needs {one / GIB:.2f} GiB of "
            f"KV cache per GPU, and {max(0.0, placement.kv_pool) / GIB:.2f} GiB are left: usable "
            f"{usable:.1f} - weights {weights:.1f} - {RUNTIME_BYTES / GIB:.1f} for the engine. "
            "Lower max_model_len, or raise `gpu_count`."
        )


def _has(deployment: Deployment, parts: tuple[str, ...]) -> bool:
    """Whether an argument that is set contains one of the texts."""
    return any(
        value and any(part in key for part in parts)
        for key, value in deployment.engine_args.items()
    )


def cell_outlook(
    deployment: Deployment, placement: Placement, workload: Workload, in_flight: float
) -> Outlook:
    """Whether `in_flight` requests of a cell run at once, or some of them wait."""
    if problem := Trial(deployment, workload, 1).unsupported:
        return Outlook(CANNOT, f"{problem}: it gets the verdict unsupported")
    tokens = round(workload.mean_input_len) + workload.max_output_len
    held = placement.sequences(tokens) if placement.kv_pool < math.inf else math.inf
    if in_flight <= min(held, deployment.max_running):
        return Outlook(FITS)
    if held < deployment.max_running:
        need = math.ceil(in_flight) * placement.sequence_bytes(tokens) / placement.copies
        return Outlook(
            QUEUES,
            f"{in_flight:.0f} × {tokens} tokens need {need / GIB:.1f} GiB of KV cache per GPU, and "
            f"there are {placement.kv_pool / GIB:.1f}: {math.floor(held)} run at once",
        )
    return Outlook(
        QUEUES, f"{in_flight:.0f} requests, and max_num_seqs lets {deployment.max_running} run"
    )


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
