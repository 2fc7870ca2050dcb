"""The deployments that tests start from. `dataclasses.replace` changes what a test is about."""

from __future__ import annotations

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

DEMO_VLLM = Deployment(
    name="smollm2-135m-instruct_bf16_vllm_cpu",
    model="smollm2-135m-instruct",
    checkpoint="demo:smollm2-135m-instruct",
    tokenizer="demo:smollm2-135m-instruct",
    quantization="bf16",
    engine="vllm",
    gpu="cpu",
    gpu_count=0,
    max_model_len=512,
    max_num_seqs=8,
)
"""The demo's model, which vLLM and llama.cpp can start on any machine."""
