"""Which deployments are refused before a start on GPUs, and which are not. Needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.deployments import SMALL_VLLM
from servegrid.engines import compatibility, hardware
from servegrid.engines.hardware import Capability, Gpu, Software
from servegrid.errors import EngineError, NotServableError
from servegrid.node import nvml
from servegrid.reference.checkpoint import weight_bytes

GIB = 1 << 30
V100 = Gpu("Tesla V100-PCIE-16GB", (7, 0), 16 * GIB)
T4 = Gpu("Tesla T4", (7, 5), 15 * GIB)
A100 = Gpu("NVIDIA A100-PCIE-40GB", (8, 0), 40 * GIB)
L40S = Gpu("NVIDIA L40S", (8, 9), 45 * GIB)
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79 * GIB)

FOR_V100 = Software(
    vllm="0.10.1.1",
    cuda="12.6",
    architectures=("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"),
    driver="550.54.15",
    driver_cuda=(12, 4),
)
FOR_A100 = Software(
    vllm="0.32.0",
    cuda="13.0",
    architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
    driver="580.65.06",
    driver_cuda=(13, 0),
)
LAST_FOR_V100 = replace(FOR_V100, vllm="0.19.1", cuda="12.8")

DEPLOYMENT = replace(
    SMALL_VLLM,
    name="mistral-7b_fp16_vllm_1xgpu",
    model="mistral-7b",
    quantization="fp16",
    gpu="v100-16gb",
    gpu_count=1,
)
DEFAULTS = {"gpu_memory_utilization": 0.9}
# vLLM 0.10.1.1; from 0.16 on, the methods that only Marlin implements need 7.5.
CAPABILITIES: Mapping[str, Capability] = {
    "awq": (7, 5),
    "gptq": (6, 0),
    "gptq_marlin": (8, 0),
    "fp8": (8, 0),
    "compressed-tensors": (7, 0),
}


def needs(
    config: Mapping[str, Any] | None = None,
    weights: float | None = 13.5,
    gpu_count: int = 1,
    capabilities: Mapping[str, Capability] = CAPABILITIES,
    nodes: int = 1,
    **arguments: Any,
) -> compatibility.Requirements:
    """The requirements of a deployment with these `engine_args` and `weights` GiB of weights."""
    deployment = replace(DEPLOYMENT, gpu_count=gpu_count, engine_args=arguments)
    size = None if weights is None else int(weights * GIB)
    return compatibility.requirements_for(
        deployment, DEFAULTS, config or {}, size, capabilities.get, nodes
    )


def quantized(method: str) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, "bits": 4}, "torch_dtype": "float16"}


def test_each_of_several_nodes_needs_its_share() -> None:
    # Two nodes with two A100 each: a node may use 2 × 40 GiB × 0.9 = 72 GiB.
    fits, too_large = (needs(weights=each, gpu_count=4, nodes=2) for each in (140, 170))
    assert compatibility.incompatibility(fits, [A100, A100], FOR_A100) is None
    assert "GPUs needed: 2, visible here: 1" in str(
        compatibility.incompatibility(fits, [A100], FOR_A100)
    )
    assert "the weights take 85.0 GiB, but vLLM may use only 72.0 GiB" in str(
        compatibility.incompatibility(too_large, [A100, A100], FOR_A100)
    )


@pytest.mark.parametrize(
    ("needed", "gpus", "software"),
    [
        (needs(dtype="half"), [V100], FOR_V100),
        (needs({"torch_dtype": "bfloat16"}), [V100], FOR_V100),  # vLLM turns it into float16
        (needs({"torch_dtype": "bfloat16"}, dtype="auto"), [T4], FOR_A100),
        (needs(dtype="bfloat16"), [A100], FOR_A100),
        (needs(quantized("gptq"), 11), [V100], FOR_V100),
        (needs(quantized("gptq"), 11), [V100], LAST_FOR_V100),
        (needs(quantized("awq"), 4), [T4], FOR_V100),
        (needs(quantized("awq"), 11), [A100], FOR_A100),
        (needs(quantized("fp8"), 7), [A100], FOR_V100),  # Marlin computes with fp8 weights only
        (needs(quantized("fp8"), 7), [H100], FOR_A100),
        (needs(quantized("of tomorrow"), 7), [V100], FOR_V100),
        (needs(kv_cache_dtype="fp8"), [A100], FOR_A100),
        (needs(kv_cache_dtype="fp8"), [V100], FOR_V100),  # vLLM's V0 engine converts it
        (needs(), [L40S], FOR_A100),  # code for 8.6 runs on it
        (needs(weights=41.5, gpu_count=2), [A100, A100], FOR_A100),
        (needs(weights=100, gpu_count=4, pipeline_parallel_size=2), [A100] * 4, FOR_A100),
        (  # Experts are shared by all ranks.
            needs({"num_local_experts": 8}, 100, gpu_count=4, data_parallel_size=2),
            [A100] * 4,
            FOR_A100,
        ),
        (needs(weights=13.5), [A100, V100], FOR_A100),  # the second is not used
        (needs({"dtype": "float32"}, weights=27), [V100], FOR_V100),  # halved while loading
        (needs(weights=100, cpu_offload_gb=90), [A100], FOR_A100),
        (needs(weights=100, quantization="fp8"), [H100], FOR_A100),
        (needs(weights=None), [A100], FOR_A100),
        (needs(), [replace(V100, capability=None)], FOR_A100),
        (needs(weights=100), [replace(A100, memory_bytes=None)], FOR_A100),
        (needs(gpu_count=4), None, FOR_A100),  # cannot be listed
        # An older driver runs newer minor versions of CUDA.
        (needs(), [A100], replace(FOR_A100, cuda="13.2")),
        (needs(), [A100], replace(FOR_A100, driver=None, driver_cuda=None)),
        (needs(), [A100], replace(FOR_A100, architectures=())),
        (needs(), [A100], replace(FOR_A100, architectures=("gfx90a",))),
    ],
)
def test_a_deployment_that_may_run_is_accepted(
    needed: compatibility.Requirements, gpus: list[Gpu] | None, software: Software
) -> None:
    assert compatibility.incompatibility(needed, gpus, software) is None


@pytest.mark.parametrize(
    ("needed", "gpus", "software", "parts"),
    [
        (
            needs(gpu_count=2),
            [V100],
            FOR_V100,
            ["GPUs needed: 2, visible here: 1", "CUDA_VISIBLE_DEVICES"],
        ),
        (
            needs(gpu_count=2, pipeline_parallel_size=2),
            [V100],
            FOR_V100,
            ["GPUs needed: 2, visible here: 1"],
        ),
        (needs(gpu_count=4, data_parallel_size=2), [A100] * 2, FOR_A100, ["GPUs needed: 4"]),
        (  # Each of the two copies has 2 × 40 × 0.9 GiB.
            needs(weights=100, gpu_count=4, data_parallel_size=2),
            [A100] * 4,
            FOR_A100,
            ["the weights take 100.0 GiB", "may use only 72.0 GiB: 2 GPUs"],
        ),
        (
            needs(),
            [A100],
            replace(FOR_A100, driver="550.54.15", driver_cuda=(12, 4)),
            [
                "CUDA 13.0",
                "driver 550.54.15 supports CUDA only up to 12.4",
                "580 or newer",
                "a100.in",
            ],
        ),
        (
            needs(),
            [V100],
            FOR_A100,
            ["V100-PCIE-16GB has compute capability 7.0", "only 7.5 and newer", "`make env-v100`"],
        ),
        (
            needs(),
            [V100],
            replace(FOR_A100, vllm="0.20.0"),
            ["vLLM 0.20.0 supports only 7.5 and newer"],
        ),
        (
            needs(),
            [V100],
            replace(LAST_FOR_V100, architectures=("sm_75", "sm_80")),
            ["torch supports only sm_75, sm_80. ", "`make env-v100`"],
        ),
        (
            needs(),
            [replace(H100, name="NVIDIA B200", capability=(10, 0))],
            FOR_V100,
            ["NVIDIA B200 has compute capability 10.0", "sm_90. ", "for this kind of GPU"],
        ),
        (
            needs(),
            [A100],
            replace(FOR_V100, architectures=("sm_86", "sm_90a")),
            ["8.0, but the installed torch"],
        ),
        (
            needs(quantized("awq"), 4),
            [V100],
            FOR_V100,
            [
                "quantization `awq` needs compute capability 7.5 in vLLM 0.10.1.1",
                "GPTQ",
                "or newer",
            ],
        ),
        (needs(quantized("AWQ"), 4), [V100], LAST_FOR_V100, ["quantization `awq`"]),
        (
            needs(quantized("gptq"), 4, quantization="gptq_marlin"),
            [T4],
            FOR_V100,
            ["quantization `gptq_marlin` needs compute capability 8.0"],
        ),
        (needs(quantized("fp8"), 7), [V100], FOR_V100, ["`fp8` needs compute capability 8.0"]),
        (
            needs(quantized("compressed-tensors"), 7),
            [V100],
            FOR_V100,
            ["`compressed-tensors` needs compute capability 7.5"],
        ),
        (
            needs(dtype="bfloat16"),
            [V100],
            FOR_V100,
            ["dtype bfloat16 needs compute capability 8.0", "`engine_args: {dtype: half}`"],
        ),
        (needs(dtype="bfloat16", gpu_count=2), [A100, T4], FOR_A100, ["Tesla T4"]),
        (
            needs(kv_cache_dtype="fp8_e5m2"),
            [V100],
            LAST_FOR_V100,
            ["kv_cache_dtype fp8_e5m2 needs compute capability 7.5", "Remove this argument"],
        ),
        (
            needs(weights=41.5),
            [V100],
            FOR_V100,
            ["weights take 41.5 GiB", "14.4 GiB", "utilization 0.9", "Raise `gpu_count`"],
        ),
        (needs({"dtype": "float32"}, weights=40), [V100], FOR_V100, ["weights take 20.0 GiB"]),
    ],
)
def test_an_incompatibility_is_described_in_one_line(
    needed: compatibility.Requirements, gpus: list[Gpu], software: Software, parts: list[str]
) -> None:
    reason = compatibility.incompatibility(needed, gpus, software)
    assert reason
    assert reason.startswith("deployment `mistral-7b_fp16_vllm_1xgpu`: ")
    assert "\n" not in reason
    for part in parts:
        assert part in reason


def test_only_weights_that_vllm_loads_are_counted(tmp_path: Path) -> None:
    assert weight_bytes(tmp_path) is None
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"x" * 7)
    (tmp_path / "training_args.bin").write_bytes(b"x" * 100)
    assert weight_bytes(tmp_path) == 7
    (tmp_path / "consolidated.safetensors").write_bytes(b"x" * 50)
    assert weight_bytes(tmp_path) == 50
    for name, size in {"model-1": 20, "model-2": 31}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * size)
    assert weight_bytes(tmp_path) == 51
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_bytes(tmp_path) == 31


class NotSupportedError(Exception):
    value = 3


class Nvml:
    """NVML with two GPUs; the second supports few queries."""

    NVMLError = NotSupportedError
    NVML_ERROR_NO_PERMISSION = 4
    nvmlDeviceGetCount = staticmethod(lambda: 2)
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
    nvmlDeviceGetUUID = staticmethod("GPU-{}".format)
    nvmlDeviceGetName = staticmethod(lambda gpu: [V100, T4][gpu].name)
    nvmlSystemGetCudaDriverVersion_v2 = staticmethod(lambda: 12040)
    nvmlSystemGetDriverVersion = staticmethod(lambda: "550.54.15")

    @staticmethod
    def nvmlDeviceGetCudaComputeCapability(gpu: int) -> list[int]:
        if gpu:
            raise NotSupportedError
        return [7, 0]

    @staticmethod
    def nvmlDeviceGetMemoryInfo(gpu: int) -> SimpleNamespace:
        if gpu:
            raise NotSupportedError
        return SimpleNamespace(total=16 * GIB)


SECOND = Gpu("Tesla T4", None, None)


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        (None, [V100, SECOND]),
        ("1,0", [SECOND, V100]),
        ("GPU-1", [SECOND]),
        ("", []),
        ("MIG-2a1c", None),
    ],
)
def test_only_gpus_that_cuda_sees_are_listed(named: str | None, seen: list[Gpu] | None) -> None:
    environment = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    assert hardware.list_gpus(Nvml, environment) == seen


def test_gpus_that_nvml_cannot_open_make_the_list_unknown() -> None:
    class Forbidden(Nvml):
        @staticmethod
        def nvmlDeviceGetHandleByIndex(index: int) -> int:
            raise NotSupportedError

    assert hardware.list_gpus(Forbidden, {}) is None


def test_the_driver_version_is_read_if_there_is_a_driver() -> None:
    software = hardware.detect_software("0.32.0", Nvml)
    assert (software.driver, software.driver_cuda) == ("550.54.15", (12, 4))
    software = hardware.detect_software("0.32.0", None)
    assert (software.vllm, software.driver, software.driver_cuda) == ("0.32.0", None, None)


class FakeDriver:
    def __enter__(self) -> type[Nvml]:
        return Nvml

    def __exit__(self, *error: object) -> None:
        pass


def test_an_incompatible_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(quantized("awq")))
    monkeypatch.setattr(hardware, "list_gpus", lambda nvml, environment: [V100])
    monkeypatch.setattr(hardware, "detect_software", lambda vllm, nvml: FOR_V100)
    monkeypatch.setattr(hardware, "required_capability", CAPABILITIES.get)
    monkeypatch.setattr(nvml, "open_driver", FakeDriver)
    with pytest.raises(EngineError, match="quantization `awq` needs"):
        compatibility.check_compatibility(DEPLOYMENT, DEFAULTS, tmp_path, "0.10.1.1")
    (tmp_path / "config.json").write_text(json.dumps(quantized("gptq")))
    compatibility.check_compatibility(DEPLOYMENT, DEFAULTS, tmp_path, "0.10.1.1")


@pytest.mark.parametrize(
    ("needed", "gpus", "software", "verdict"),
    [
        (needs(weights=41.5), [V100], FOR_V100, "oom_at_start"),
        (needs(dtype="bfloat16"), [V100], FOR_V100, "unsupported"),
        (needs(gpu_count=2), [A100], FOR_A100, None),  # the allocation has too few
        (needs(), [V100], FOR_A100, None),  # another environment has a vLLM for it
    ],
)
def test_only_what_another_allocation_cannot_correct_is_a_result(
    needed: compatibility.Requirements,
    gpus: list[Gpu],
    software: Software,
    verdict: str | None,
) -> None:
    error = compatibility.find_incompatibility(needed, gpus, software)
    assert error is not None
    found = error.verdict if isinstance(error, NotServableError) else None
    assert found == verdict
