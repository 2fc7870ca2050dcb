"""Facts about this node for an engine: GPUs, driver and CUDA.

A fact that cannot be read is None; nothing is guessed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from servegrid.node.nvml import visible_gpus

Capability = tuple[int, int]
"""NVIDIA's compute capability: 7.0 is Volta, 7.5 Turing, 8.0 Ampere, 9.0 Hopper."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that the engine sees."""

    name: str
    capability: Capability | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Software:
    """Versions of the software between the model and the GPUs.

    `architectures` are those that torch has code for (`sm_80`); empty if torch does not list them.
    `driver_cuda` is the newest CUDA version that the driver supports.
    """

    vllm: str
    cuda: str | None
    architectures: tuple[str, ...]
    driver: str | None
    driver_cuda: tuple[int, int] | None


def list_gpus(nvml: Any, environment: Mapping[str, str]) -> list[Gpu] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES allows; None if NVML cannot list them.

    NVML does not list MIG devices under the names used in CUDA_VISIBLE_DEVICES.
    """
    if "MIG" in environment.get("CUDA_VISIBLE_DEVICES", ""):
        return None
    try:
        handles = visible_gpus(nvml, environment).values()
    except nvml.NVMLError:
        return None
    if None in handles:
        return None
    return [_gpu(nvml, handle) for handle in handles]


def detect_software(vllm: str, nvml: Any) -> Software:
    """The software that this process uses; `nvml` is None if there is no driver."""
    import torch

    def read(name: str) -> Any:
        with contextlib.suppress(*((nvml.NVMLError, AttributeError) if nvml else ())):
            return getattr(nvml, name)() if nvml else None
        return None

    cuda = read("nvmlSystemGetCudaDriverVersion_v2")
    driver = read("nvmlSystemGetDriverVersion")
    return Software(
        vllm=vllm,
        cuda=torch.version.cuda,
        # vLLM makes torch ask NVML here, so this does not initialise CUDA in this process.
        architectures=tuple(torch.cuda.get_arch_list()),
        driver=_text(driver),
        driver_cuda=None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
    )


def required_capability(method: str) -> Capability | None:
    """The compute capability that the installed vLLM needs for a quantization method.

    None if vLLM does not say. `modelopt` names several methods; vLLM chooses one when it reads the
    checkpoint.
    """
    from vllm.model_executor.layers.quantization import get_quantization_config

    if method.startswith("modelopt"):
        return None
    try:
        needed = get_quantization_config(method).get_min_capability()
    except (ValueError, ImportError, NotImplementedError):
        return None
    return None if needed < 0 else divmod(needed, 10)


def _gpu(nvml: Any, handle: Any) -> Gpu:
    def read(name: str) -> Any:
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            return getattr(nvml, name)(handle)
        return None

    capability = read("nvmlDeviceGetCudaComputeCapability")
    memory = read("nvmlDeviceGetMemoryInfo")
    return Gpu(
        name=_text(read("nvmlDeviceGetName")) or "the GPU",
        capability=capability and (capability[0], capability[1]),
        memory_bytes=memory and memory.total,
    )


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
