"""Checks whether GPUs, driver, CUDA and vLLM can run a deployment, before weights are loaded.

It reports only what is sure to fail. A fact that cannot be read is None and fails no check.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servegrid.engines import hardware
from servegrid.engines.hardware import Capability, Gpu, Software
from servegrid.errors import EngineError, NotServableError
from servegrid.node import nvml
from servegrid.records.verdict import OOM_AT_START, UNSUPPORTED
from servegrid.reference.checkpoint import weight_bytes
from servegrid.study.grid import Deployment

TURING: Capability = (7, 5)
AMPERE: Capability = (8, 0)

MIN_CAPABILITY: Sequence[tuple[tuple[int, int], Capability]] = (((0, 20), TURING), ((0, 0), (7, 0)))
"""The first vLLM version and the lowest compute capability from there on; newest version first."""

SCHEME_CAPABILITY: Mapping[str, Capability] = {"compressed-tensors": TURING}
"""Quantization methods with several schemes. vLLM checks the scheme only when it loads the weights;
in versions that support Volta, every scheme for GPUs needs at least this capability."""

TRITON_ONLY_ON_VOLTA = (0, 13)
"""From this vLLM on, Volta has only Triton's attention, which supports fp8 from 8.9 on."""

MIN_DRIVER = {11: 450, 12: 525, 13: 580}
"""The oldest driver for each major version of CUDA; it also runs newer minor versions."""

SIZE_MARGIN = 1.1
"""Weights are too large from this multiple of the memory on: files also contain other data."""

SIZE_CHANGING_ARGUMENTS = frozenset({"hf_overrides", "load_format", "quantization"})
"""With these arguments, and all that offload, the GPUs may hold less than the size of the files."""

_GIB = 1 << 30


@dataclass(frozen=True)
class Requirements:
    """What a deployment needs from its GPUs. `gpus_per_copy` share one copy of the weights.

    `quantization_capability` is the compute capability that the installed vLLM needs for the method
    `quantization`.
    """

    deployment: str
    gpu_count: int
    gpus_per_copy: int
    dtype: str
    quantization: str | None
    quantization_capability: Capability | None
    kv_cache_dtype: str
    weight_bytes: int | None
    gpu_memory_utilization: float


def incompatibility(
    needs: Requirements, gpus: Sequence[Gpu] | None, software: Software
) -> str | None:
    """Why the deployment cannot run here, and the remedy, in one line; None if nothing is wrong.

    `gpus` are the visible GPUs in vLLM's order; None if they cannot be listed.
    """
    found = find_incompatibility(needs, gpus, software)
    return None if found is None else str(found)


def find_incompatibility(
    needs: Requirements, gpus: Sequence[Gpu] | None, software: Software
) -> EngineError | None:
    """As `incompatibility`. NotServableError if only another deployment or GPU can help.

    An allocation or an environment that lacks something is no result: it can be corrected.
    """
    reasons: Iterator[tuple[str | None, str | None]] = itertools.chain(
        [(_too_few(needs, gpus), None), (_old_driver(software), None)],
        *(
            (
                (_no_code(gpu, gpu.capability, software), None),
                (_no_quantization(gpu, gpu.capability, needs, software), UNSUPPORTED),
                (_no_dtype(gpu, gpu.capability, needs, software), UNSUPPORTED),
            )
            for gpu in (gpus or [])[: needs.gpu_count]
            if gpu.capability is not None
        ),
        [(_too_large(needs, gpus), OOM_AT_START)],
    )
    for reason, verdict in reasons:
        if reason is not None:
            message = f"deployment `{needs.deployment}`: {reason}"
            return NotServableError(message, verdict) if verdict else EngineError(message)
    return None


def requirements_for(
    deployment: Deployment,
    defaults: Mapping[str, Any],
    model_config: Mapping[str, Any],
    weight_bytes: int | None,
    capability_for: Callable[[str], Capability | None],
    nodes: int = 1,
) -> Requirements:
    """What a deployment whose weights have `weight_bytes` requires of each of its `nodes`.

    `defaults` comes from `arguments.default_arguments`, and `model_config` is the model's
    config.json. `capability_for` returns the compute capability that vLLM needs for a quantization
    method.
    """
    settings = {**defaults, **deployment.engine_args}
    stored = model_config.get("quantization_config") or model_config.get("compression_config") or {}
    named = settings.get("quantization") or stored.get("quant_method")
    method = str(named).lower() if named else None
    dtype = settings.get("dtype") or "auto"
    if weight_bytes is not None and any(
        value and (key in SIZE_CHANGING_ARGUMENTS or "offload" in key)
        for key, value in settings.items()
    ):
        weight_bytes = None
    elif weight_bytes is not None and _stored_dtype(model_config) == "float32":
        weight_bytes //= 2  # vLLM loads float32 weights as 16 bits unless a flag says otherwise
    if weight_bytes is not None:
        weight_bytes //= nodes
    return Requirements(
        deployment=deployment.name,
        gpu_count=deployment.gpu_count // nodes,
        gpus_per_copy=_gpus_per_copy(deployment, model_config) // nodes,
        dtype=str(dtype).lower(),
        quantization=method,
        quantization_capability=_highest(capability_for(method), SCHEME_CAPABILITY.get(method))
        if method
        else None,
        kv_cache_dtype=str(settings.get("kv_cache_dtype") or "auto").lower(),
        weight_bytes=weight_bytes,
        gpu_memory_utilization=float(settings.get("gpu_memory_utilization") or 1.0),
    )


def check_compatibility(
    deployment: Deployment,
    defaults: Mapping[str, Any],
    checkpoint: Path,
    vllm: str,
    nodes: int = 1,
) -> None:
    """Raise EngineError if the deployment is sure to fail on this node's GPUs.

    This node is one of `nodes`, among which the GPUs and the weights are divided evenly.
    """
    config = checkpoint / "config.json"
    needs = requirements_for(
        deployment,
        defaults,
        json.loads(config.read_text(encoding="utf-8")) if config.exists() else {},
        weight_bytes(checkpoint),
        hardware.required_capability,
        nodes,
    )
    with nvml.open_driver() as driver:
        gpus = hardware.list_gpus(driver, os.environ) if driver else None
        software = hardware.detect_software(vllm, driver)
    if (error := find_incompatibility(needs, gpus, software)) is not None:
        raise error


def _too_few(needs: Requirements, gpus: Sequence[Gpu] | None) -> str | None:
    if gpus is None or len(gpus) >= needs.gpu_count:
        return None
    return (
        f"GPUs needed: {needs.gpu_count}, visible here: {len(gpus)}. Request "
        "this number of GPUs in the profile, and check CUDA_VISIBLE_DEVICES."
    )


def _old_driver(software: Software) -> str | None:
    if software.cuda is None or software.driver_cuda is None:
        return None
    runtime = _version(software.cuda)[0]
    known = software.driver_cuda
    if runtime <= known[0]:
        return None
    needed = MIN_DRIVER.get(runtime)
    return (
        f"vLLM {software.vllm} is built for CUDA {software.cuda}, but the driver "
        f"{software.driver or '(version unknown)'} supports CUDA only up to {known[0]}.{known[1]}. "
        f"Use an environment built for CUDA {known[0]} (see workflow/envs/a100.in), or a node with "
        f"driver {f'{needed} or newer' if needed else f'for CUDA {runtime}'}."
    )


def _no_code(gpu: Gpu, capability: Capability, software: Software) -> str | None:
    oldest = next(oldest for vllm, oldest in MIN_CAPABILITY if _version(software.vllm) >= vllm)
    if capability < oldest:
        problem = f"vLLM {software.vllm} supports only {_format_capability(oldest)} and newer"
    elif not _is_supported(capability, software.architectures):
        problem = f"the installed torch supports only {', '.join(software.architectures)}"
    else:
        return None
    # The GPU can be older or newer than the software supports.
    remedy = (
        "Use the environment for Volta (`make env-v100`)"
        if (7, 0) <= capability < TURING
        else "Use an environment for this kind of GPU (workflow/envs)"
    )
    return f"{_describe_gpu(gpu, capability)}, but {problem}. {remedy}, or another kind of GPU."


def _no_quantization(
    gpu: Gpu, capability: Capability, needs: Requirements, software: Software
) -> str | None:
    wanted = needs.quantization_capability
    if wanted is None or capability >= wanted:
        return None
    return (
        f"quantization `{needs.quantization}` needs compute capability "
        f"{_format_capability(wanted)} in vLLM {software.vllm}, but "
        f"{_describe_gpu(gpu, capability)}. Use a checkpoint with another quantization (GPTQ runs "
        f"on 6.0 and newer), or a GPU of {_format_capability(wanted)} or newer."
    )


def _no_dtype(
    gpu: Gpu, capability: Capability, needs: Requirements, software: Software
) -> str | None:
    if needs.dtype == "bfloat16" and capability < AMPERE:
        return (
            f"dtype bfloat16 needs compute capability {_format_capability(AMPERE)}, but "
            f"{_describe_gpu(gpu, capability)}. Set `engine_args: {{dtype: half}}`."
        )
    if (
        needs.kv_cache_dtype.startswith("fp8")
        and capability < TURING
        and _version(software.vllm) >= TRITON_ONLY_ON_VOLTA
    ):
        return (
            f"kv_cache_dtype {needs.kv_cache_dtype} needs compute capability "
            f"{_format_capability(TURING)} in vLLM {software.vllm}, but "
            f"{_describe_gpu(gpu, capability)}. Remove this argument."
        )
    return None


def _too_large(needs: Requirements, gpus: Sequence[Gpu] | None) -> str | None:
    sizes = [gpu.memory_bytes for gpu in (gpus or [])[: needs.gpus_per_copy]]
    known = [size for size in sizes if size is not None]
    if needs.weight_bytes is None or not known or len(known) < len(sizes):
        return None
    usable = min(known) * len(known) * needs.gpu_memory_utilization
    if needs.weight_bytes <= SIZE_MARGIN * usable:
        return None
    return (
        f"the weights take {needs.weight_bytes / _GIB:.1f} GiB, but vLLM may use only "
        f"{usable / _GIB:.1f} GiB: {len(known)} GPUs × {min(known) / _GIB:.1f} GiB × "
        f"gpu_memory_utilization {needs.gpu_memory_utilization:g}. Raise `gpu_count`, or use "
        "larger GPUs, or a checkpoint quantized to fewer bits."
    )


def _gpus_per_copy(deployment: Deployment, model_config: Mapping[str, Any]) -> int:
    """Data parallel ranks have a copy each. Only experts are shared by all ranks of a model."""
    if any("expert" in key for key in model_config):
        return deployment.gpu_count
    return deployment.gpu_count // deployment.parallelism.data


def _is_supported(capability: Capability, architectures: Sequence[str]) -> bool:
    """Whether code for one of torch's `architectures` runs on a GPU with this capability.

    Machine code (`sm_80`) runs on the same major version with the same or a newer minor version,
    and intermediate code (`compute_80`) runs on all newer ones. Code with a letter (`sm_90a`) runs
    only on exactly this capability. True if no architecture can be parsed.
    """
    parsed = [
        (kind, (int(number[:-1]), int(number[-1])), letter)
        for kind, number, letter in re.findall(
            r"^(sm|compute)_(\d{2,})([a-z]?)$", "\n".join(architectures), re.MULTILINE
        )
    ]
    return not parsed or any(
        capability == built
        or (not letter and built <= capability and (kind == "compute" or built[0] == capability[0]))
        for kind, built, letter in parsed
    )


def _stored_dtype(model_config: Mapping[str, Any]) -> str | None:
    """The data type of the checkpoint's weights; newer versions of transformers renamed the key."""
    return model_config.get("dtype") or model_config.get("torch_dtype")


def _highest(*capabilities: Capability | None) -> Capability | None:
    return max((known for known in capabilities if known is not None), default=None)


def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = [*map(int, re.findall(r"\d+", text)), 0, 0]
    return major, minor


def _describe_gpu(gpu: Gpu, capability: Capability) -> str:
    return f"{gpu.name} has compute capability {_format_capability(capability)}"


def _format_capability(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
