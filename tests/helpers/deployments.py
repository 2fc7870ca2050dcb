"""The deployments that tests start from. `dataclasses.replace` changes what a test is about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from servegrid.study.deployment import Deployment

SMALL_VLLM = Deployment(
    name="small_bf16_vllm_cpu",
    model="small",
    checkpoint="org/small",
    tokenizer="org/small",
    quantization="bf16",
    engine="vllm",
    gpu="cpu",
    gpu_count=0,
    max_model_len=1024,
    max_num_seqs=16,
)
"""Not a real model: no engine can start it."""

DEMO_VLLM = replace(
    SMALL_VLLM,
    name="smollm2-135m-instruct_fp32_vllm_cpu",
    model="smollm2-135m-instruct",
    quantization="fp32",  # without AVX-512, bfloat16 takes several times as long
    checkpoint="demo:smollm2-135m-instruct",
    tokenizer="demo:smollm2-135m-instruct",
    max_model_len=512,
    max_num_seqs=8,
    engine_args={"dtype": "float32"},
)
"""The demo's model, which vLLM and llama.cpp can start on any machine."""

DEMO_ENTRY: dict[str, Any] = {
    "name": "d",
    "model": DEMO_VLLM.model,
    "checkpoint": DEMO_VLLM.checkpoint,
    "quantization": DEMO_VLLM.quantization,
    "engine": "vllm",
    "gpu": "cpu",
    "engine_args": {"dtype": "float32"},
}
"""The same as a study has it, without the lengths that it allows."""

EMULATED_ENTRY: dict[str, Any] = {
    "model": "mistral-7b",
    "checkpoint": "mistralai/Mistral-7B-Instruct-v0.2",
    "quantization": "fp16",
    "engine": "emulated",
    "gpu": "v100-16gb",
    "gpu_count": 2,
    "max_model_len": 4096,
    "engine_args": {"timing": "inria-2024", "time_scale": 0.001},
}
"""A deployment as a study has it. The emulated engine needs no model and no GPU."""

EXTERNAL_ENTRY: dict[str, Any] = {
    "model": "mistral-7b",
    "tokenizer": "models/mistral-7b",
    "quantization": "fp16",
    "engine": "external",
    "gpu": "a100-40gb",
    "gpu_count": 2,
    "max_model_len": 4096,
    "max_num_seqs": 64,
    "endpoint": {"url": "http://sirocco14:30000/v1", "model": "default", "engine": "sglang"},
}
"""A deployment as a study has it, of a server that somebody else has started."""
