"""The roofline: the limits that memory bandwidth and arithmetic set for a deployment. Pure.

The model is that of Williams, Waterman and Patterson, "Roofline: an insightful visual performance
model for multicore architectures" (2009), applied to the two phases of a transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from servegrid.errors import ConfigError
from servegrid.reference import data
from servegrid.study.grid import Deployment


@dataclass(frozen=True)
class ModelShape:
    """The properties of a model that limit its speed.

    `params` is the number of parameters, `active_params` the number that one token uses,
    `embedding_params` the number in the input embedding, of which a token uses one row. A dense
    model has one expert, which all tokens use. Sizes are in bytes.
    """

    params: float
    active_params: float
    embedding_params: float
    experts: int
    active_experts: int
    kv_bytes_per_token: float
    weight_bytes: float

    def read_bytes(self, tokens: float) -> float:
        """The bytes of weights that the GPUs read for a step with `tokens` tokens.

        With E experts of which each token uses k, n tokens use E·(1 - (1 - k/E)^n) on average, if
        they choose independently and with equal probability.
        """
        if self.experts == 1:
            return self.weight_bytes
        unused = self.experts - self.active_experts
        expert = (self.params - self.active_params) / unused
        missed: float = (1 - self.active_experts / self.experts) ** tokens
        return self.weight_bytes * (1 - expert * self.experts * missed / self.params)


@dataclass(frozen=True)
class Hardware:
    """All GPUs of a deployment together: memory bandwidth in bytes/s, and 16-bit FLOP/s."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Latencies:
    """The latencies of one request in seconds: time to first token and inter-token latency."""

    ttft_s: float
    itl_s: float

    def e2el_s(self, output_len: int) -> float:
        """The end-to-end latency in seconds with `output_len` output tokens."""
        return self.ttft_s + (output_len - 1) * self.itl_s


def latency_bound(
    shape: ModelShape, hardware: Hardware, concurrency: float, input_len: int
) -> Latencies:
    """The roofline's latencies of `concurrency` requests with prompts of `input_len` tokens.

    Each parameter costs two FLOP per token. Prefill processes all prompts together and reads the
    weights at least once. A decoding step reads the weights that its tokens use, and the KV cache
    of every request. Only the prompt's KV cache counts; the generated tokens add to it. This is not
    a strict bound: tokens can use fewer experts than on average, and phases can overlap. See
    `burst_bound`.
    """
    flop_per_token = 2 * shape.active_params
    prompt_tokens = concurrency * input_len
    ttft = max(
        prompt_tokens * flop_per_token / hardware.flops,
        shape.read_bytes(prompt_tokens) / hardware.bandwidth,
    )
    read = shape.read_bytes(concurrency) + prompt_tokens * shape.kv_bytes_per_token
    itl = max(read / hardware.bandwidth, concurrency * flop_per_token / hardware.flops)
    return Latencies(ttft, itl)


def burst_bound(
    shape: ModelShape, hardware: Hardware, concurrency: float, input_len: int, output_len: int
) -> float:
    """The seconds that no engine can undercut: until all requests of a burst have ended.

    Prefill, decoding, reading and arithmetic may all overlap, so the bound is the larger of two
    sums. Arithmetic: two FLOP per parameter and token, without the input embedding; the output
    layer, which is as large, only for output tokens. Reading: the weights at least once per output
    token, without the input embedding in 16 bits, and with the experts of a single token, because
    equal prompts can use the same ones; and the KV cache of each prompt in 16 bits, once per output
    token after the first. It does not hold if prompts share their KV cache.
    """
    tokens = concurrency * (input_len + output_len - 1)
    flop = 2 * (shape.active_params - 2 * shape.embedding_params) * tokens
    flop += 2 * shape.embedding_params * concurrency * output_len
    weights = shape.read_bytes(1) - 2 * shape.embedding_params
    kv_cache = concurrency * (output_len - 1) * input_len * shape.kv_bytes_per_token
    return max(
        flop / hardware.flops,
        (output_len * weights + kv_cache) / hardware.bandwidth,
    )


def model_shape(deployment: Deployment) -> ModelShape:
    """The shape of the deployment's model with its quantization.

    Raises ConfigError if `data.models()` does not have it.
    """
    models = data.models()
    quantizations = [name for name in models.columns if name not in _OTHER_COLUMNS]
    if deployment.model not in models.index or deployment.quantization not in quantizations:
        raise ConfigError(
            f"deployment `{deployment.name}`: the shape of model `{deployment.model}` with "
            f"quantization `{deployment.quantization}` is not known. Use one of the models "
            f"{', '.join(models.index)} with one of the quantizations {', '.join(quantizations)}."
        )
    row: dict[Any, Any] = models.loc[deployment.model].to_dict()
    return ModelShape(
        params=row["params_b"] * 1e9,
        active_params=row["active_params_b"] * 1e9,
        embedding_params=row["embedding_params_b"] * 1e9,
        experts=int(row["experts"]),
        active_experts=int(row["active_experts"]),
        kv_bytes_per_token=row["kv_kib_per_token"] * 1024,
        weight_bytes=row[deployment.quantization] * 1e9,
    )


def deployment_hardware(deployment: Deployment) -> Hardware:
    """The deployment's GPUs. Raises ConfigError if `data.gpus()` does not have them."""
    gpus = data.gpus()
    if deployment.gpu not in gpus.index:
        raise ConfigError(
            f"deployment `{deployment.name}`: the speed of gpu `{deployment.gpu}` is not known. "
            f"Use one of {', '.join(gpus.index)}."
        )
    row: dict[Any, Any] = gpus.loc[deployment.gpu].to_dict()
    return Hardware(
        bandwidth=deployment.gpu_count * row["bandwidth_gb_s"] * 1e9,
        flops=deployment.gpu_count * row["fp16_tflops"] * 1e12,
    )


_OTHER_COLUMNS = {
    *("params_b", "active_params_b", "embedding_params_b"),
    *("experts", "active_experts", "kv_kib_per_token"),
}
"""The columns of `data.models()` that are not the weights with a quantization."""
