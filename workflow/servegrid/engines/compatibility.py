"""Whether GPUs, driver, CUDA and vLLM fit a deployment, before any weights are loaded.

Only what is sure to fail is refused. What cannot be found out is None and refuses nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servegrid.engines import hardware
from servegrid.engines.hardware import Capability, Gpu, Software
from servegrid.errors import EngineError
from servegrid.node import nvml
from servegrid.study.grid import Deployment

TURING: Capability = (7, 5)
AMPERE: Capability = (8, 0)

OLDEST: Sequence[tuple[tuple[int, int], Capability]] = (((0, 20), TURING), ((0, 0), (7, 0)))
"""The oldest capability that vLLM has code for, from which version on; the newest first."""

SCHEMES: Mapping[str, Capability] = {"compressed-tensors": TURING}
"""Methods of several schemes. vLLM looks at the scheme only once it loads the weights, and none
of the schemes for GPUs that exist in a vLLM with code for Volta needs less than this."""

ONLY_TRITON_ON_VOLTA = (0, 13)
"""From this vLLM on, Triton's attention is all that is left for Volta; it knows fp8 from 8.9."""

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""The oldest driver of each major version of CUDA; minor versions may be newer than the driver."""

CLEARLY = 1.1
"""Weights are refused where they are so many times the memory: a file holds other things too."""

CHANGE_THE_SIZE = frozenset({"hf_overrides", "load_format", "quantization"})
"""Arguments, beside all that offload, by which less than the files' bytes may come to the GPUs."""

_GIB = 1 << 30


@dataclass(frozen=True)
class Needs:
    """What a deployment asks of its GPUs.

    `quantization_capability` is what the installed vLLM asks for the method `quantization`.
    """

    deployment: str
    gpu_count: int
    dtype: str
    quantization: str | None
    quantization_capability: Capability | None
    kv_cache_dtype: str
    weight_bytes: int | None
    gpu_memory_utilization: float


def incompatibility(needs: Needs, gpus: Sequence[Gpu] | None, software: Software) -> str | None:
    """Why the deployment cannot run here, with the remedy, in one line; None where it may.

    `gpus` are the visible ones in vLLM's order, None where they cannot be listed.
    """
    reasons = (
        _too_few(needs, gpus),
        _old_driver(software),
        *(
            reason
            for gpu in (gpus or [])[: needs.gpu_count]
            if gpu.capability is not None
            for reason in (
                _no_code(gpu, gpu.capability, software),
                _no_quantization(gpu, gpu.capability, needs, software),
                _no_dtype(gpu, gpu.capability, needs, software),
            )
        ),
        _too_large(needs, gpus),
    )
    first = next(filter(None, reasons), None)
    return first and f"deployment `{needs.deployment}`: {first}"


def requirements_for(
    deployment: Deployment,
    defaults: Mapping[str, Any],
    model_config: Mapping[str, Any],
    weight_bytes: int | None,
    capability_for: Callable[[str], Capability | None],
) -> Needs:
    """`defaults` are what `arguments.default_arguments` gives; `model_config` is config.json.

    `capability_for` says what vLLM asks for a quantization method.
    """
    settings = {**defaults, **deployment.engine_args}
    stored = model_config.get("quantization_config") or model_config.get("compression_config") or {}
    named = settings.get("quantization") or stored.get("quant_method")
    method = str(named).lower() if named else None
    dtype = settings.get("dtype") or "auto"
    if weight_bytes is not None and any(
        value and (key in CHANGE_THE_SIZE or "offload" in key) for key, value in settings.items()
    ):
        weight_bytes = None
    elif weight_bytes is not None and _stored_dtype(model_config) == "float32":
        weight_bytes //= 2  # vLLM makes 16 bits of it unless a flag says otherwise
    return Needs(
        deployment=deployment.name,
        gpu_count=deployment.gpu_count * int(settings.get("pipeline_parallel_size") or 1),
        dtype=str(dtype).lower(),
        quantization=method,
        quantization_capability=_most(capability_for(method), SCHEMES.get(method))
        if method
        else None,
        kv_cache_dtype=str(settings.get("kv_cache_dtype") or "auto").lower(),
        weight_bytes=weight_bytes,
        gpu_memory_utilization=float(settings.get("gpu_memory_utilization") or 1.0),
    )


def check_compatibility(
    deployment: Deployment, defaults: Mapping[str, Any], checkpoint: Path, vllm: str
) -> None:
    """Raises EngineError where the deployment is sure to fail on this machine's GPUs."""
    config = checkpoint / "config.json"
    needs = requirements_for(
        deployment,
        defaults,
        json.loads(config.read_text()) if config.exists() else {},
        hardware.weight_bytes(checkpoint),
        hardware.required_capability,
    )
    with nvml.open_driver() as driver:
        gpus = hardware.list_gpus(driver, os.environ) if driver else None
        software = hardware.detect_software(vllm, driver)
    if reason := incompatibility(needs, gpus, software):
        raise EngineError(reason)


def _too_few(needs: Needs, gpus: Sequence[Gpu] | None) -> str | None:
    if gpus is None or len(gpus) >= needs.gpu_count:
        return None
    return (
        f"GPUs needed: {needs.gpu_count}, visible here: {len(gpus)}. Have the scheduler give as "
        "many as `gpu_count` says, and look at CUDA_VISIBLE_DEVICES."
    )


def _old_driver(software: Software) -> str | None:
    if software.cuda is None or software.driver_cuda is None:
        return None
    runtime = _version(software.cuda)[0]
    known = software.driver_cuda
    if runtime <= known[0]:
        return None
    needed = OLDEST_DRIVER.get(runtime)
    return (
        f"vLLM {software.vllm} came with CUDA {software.cuda}, and the driver "
        f"{software.driver or '(version unknown)'} knows CUDA up to {known[0]}.{known[1]}. Use an "
        f"environment built for CUDA {known[0]} (see workflow/envs/a100.in), or a node with a "
        f"driver {f'from {needed} on' if needed else f'for CUDA {runtime}'}."
    )


def _no_code(gpu: Gpu, capability: Capability, software: Software) -> str | None:
    oldest = next(oldest for vllm, oldest in OLDEST if _version(software.vllm) >= vllm)
    if capability < oldest:
        whose = f"vLLM {software.vllm} has code from {_format_capability(oldest)} on"
    elif not _runs(capability, software.architectures):
        whose = f"the installed torch has code for {', '.join(software.architectures)} only"
    else:
        return None
    # Newer GPUs than the software knows are as possible as older ones.
    remedy = (
        "Use the environment made for Volta (`make env-v100`)"
        if (7, 0) <= capability < TURING
        else "Use an environment made for that kind of GPU (workflow/envs)"
    )
    return f"{_named(gpu, capability)}, and {whose}. {remedy}, or another kind of GPU."


def _no_quantization(
    gpu: Gpu, capability: Capability, needs: Needs, software: Software
) -> str | None:
    wanted = needs.quantization_capability
    if wanted is None or capability >= wanted:
        return None
    return (
        f"quantization `{needs.quantization}` needs compute capability {_format_capability(wanted)} in vLLM "
        f"{software.vllm}, and {_named(gpu, capability)}. Take a checkpoint of another "
        f"quantization (GPTQ runs from 6.0 on) or a GPU of {_format_capability(wanted)} or newer."
    )


def _no_dtype(gpu: Gpu, capability: Capability, needs: Needs, software: Software) -> str | None:
    if needs.dtype == "bfloat16" and capability < AMPERE:
        return (
            f"dtype bfloat16 needs compute capability {_format_capability(AMPERE)}, and "
            f"{_named(gpu, capability)}. Set `engine_args: {{dtype: half}}`."
        )
    if (
        needs.kv_cache_dtype.startswith("fp8")
        and capability < TURING
        and _version(software.vllm) >= ONLY_TRITON_ON_VOLTA
    ):
        return (
            f"kv_cache_dtype {needs.kv_cache_dtype} needs compute capability {_format_capability(TURING)} in "
            f"vLLM {software.vllm}, and {_named(gpu, capability)}. Remove the argument."
        )
    return None


def _too_large(needs: Needs, gpus: Sequence[Gpu] | None) -> str | None:
    sizes = [gpu.memory_bytes for gpu in (gpus or [])[: needs.gpu_count]]
    known = [size for size in sizes if size is not None]
    if needs.weight_bytes is None or not known or len(known) < len(sizes):
        return None
    usable = min(known) * len(known) * needs.gpu_memory_utilization
    if needs.weight_bytes <= CLEARLY * usable:
        return None
    return (
        f"the weights have {needs.weight_bytes / _GIB:.1f} GiB, and vLLM may use "
        f"{usable / _GIB:.1f} GiB: {len(known)} GPUs of {min(known) / _GIB:.1f} GiB × "
        f"gpu_memory_utilization {needs.gpu_memory_utilization:g}. Raise `gpu_count`, or take "
        "larger GPUs or a checkpoint that is quantized (more)."
    )


def _runs(capability: Capability, architectures: Sequence[str]) -> bool:
    """Whether one of torch's `architectures` runs there; true where none is understood.

    Machine code (`sm_80`) runs within its major version on the same or a newer minor one,
    intermediate code (`compute_80`) on everything newer, and what has a letter on its own kind.
    """
    understood = [
        (kind, (int(number[:-1]), int(number[-1])), letter)
        for kind, number, letter in re.findall(
            r"^(sm|compute)_(\d{2,})([a-z]?)$", "\n".join(architectures), re.MULTILINE
        )
    ]
    return not understood or any(
        capability == built
        or (not letter and built <= capability and (kind == "compute" or built[0] == capability[0]))
        for kind, built, letter in understood
    )


def _stored_dtype(model_config: Mapping[str, Any]) -> str | None:
    """Of the checkpoint's weights; transformers has renamed the key."""
    return model_config.get("dtype") or model_config.get("torch_dtype")


def _most(*capabilities: Capability | None) -> Capability | None:
    return max((each for each in capabilities if each is not None), default=None)


def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = [*map(int, re.findall(r"\d+", text)), 0, 0]
    return major, minor


def _named(gpu: Gpu, capability: Capability) -> str:
    return f"{gpu.name} has compute capability {_format_capability(capability)}"


def _format_capability(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
