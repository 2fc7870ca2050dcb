"""The roofline: the limits that memory bandwidth and arithmetic set for a deployment. Pure.

The model is that of Williams, Waterman and Patterson, "Roofline: an insightful visual performance
model for multicore architectures" (2009), applied to the two phases of a transformer.
"""

from __future__ import annotations

import math
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
    model has one expert, which all tokens use. Sizes are in bytes; `kv_bytes_per_token` covers all
    layers. `tied` says that the output layer is the input embedding. The rest limits how a model is
    placed: `layers`, `hidden` (size), `heads`, `kv_heads` (1 for latent attention, whose cache each
    GPU holds in full), and `max_context` in tokens. `sliding_layers` of the layers keep only the
    last `sliding_window` tokens. 0 stands for a number that is not known or does not apply.
    """

    params: float
    active_params: float
    embedding_params: float
    experts: int
    active_experts: int
    kv_bytes_per_token: float
    weight_bytes: float
    tied: bool = False
    layers: int = 0
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    max_context: int = 0
    sliding_window: int = 0
    sliding_layers: int = 0

    def kv_cache_bytes(self, tokens: float) -> float:
        """The bytes of KV cache of one sequence with `tokens` tokens, over all GPUs once."""
        if not self.sliding_layers:
            return tokens * self.kv_bytes_per_token
        sliding = self.sliding_layers / self.layers
        kept = sliding * min(tokens, self.sliding_window) + (1 - sliding) * tokens
        return kept * self.kv_bytes_per_token

    def read_bytes(self, tokens: float) -> float:
        """The bytes of weights that the GPUs read for a step with `tokens` tokens.

        With E experts of which each token uses k, n tokens use E·(1 - (1 - k/E)^n) on average, if
        they choose independently and with equal probability.
        """
        missed: float = (1 - self.active_experts / self.experts) ** tokens
        return self.weight_bytes * (1 - self.expert_share * missed)

    @property
    def expert_share(self) -> float:
        """The share of the parameters that is in experts; 0 for a dense model."""
        if self.experts == 1:
            return 0.0
        unused = self.experts - self.active_experts
        expert = (self.params - self.active_params) / unused
        return expert * self.experts / self.params


@dataclass(frozen=True)
class Hardware:
    """All GPUs of a deployment together: memory bandwidth in bytes/s, and 16-bit FLOP/s."""

    bandwidth: float
    flops: float

    def share(self, count: int) -> Hardware:
        """One of `count` equal parts."""
        return Hardware(self.bandwidth / count, self.flops / count)


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


@dataclass(frozen=True)
class Work:
    """What a burst needs at least: floating-point operations, and bytes that are read."""

    flop: float
    read: float


def burst_work(shape: ModelShape, concurrency: float, input_len: int, output_len: int) -> Work:
    """The least work of a burst until all its requests have ended.

    Arithmetic: two FLOP per parameter and token, without the input embedding; the output
    layer, which is as large, only for output tokens. Reading: the weights at least once per output
    token, without the input embedding in 16 bits, and with the experts of a single token, because
    equal prompts can use the same ones; and the KV cache of each prompt, once per output token
    after the first. It does not hold if prompts share their KV cache.
    """
    tokens = concurrency * (input_len + output_len - 1)
    # A tied matrix is counted once, and read as the output layer.
    tables = 1 if shape.tied else 2
    flop = 2 * (shape.active_params - tables * shape.embedding_params) * tokens
    flop += 2 * shape.embedding_params * concurrency * output_len
    weights = shape.read_bytes(1) - 2 * (tables - 1) * shape.embedding_params
    kv_cache = concurrency * (output_len - 1) * shape.kv_cache_bytes(input_len)
    return Work(flop, output_len * weights + kv_cache)


def burst_bound(
    shape: ModelShape, hardware: Hardware, concurrency: float, input_len: int, output_len: int
) -> float:
    """The seconds that no engine can undercut: until all requests of a burst have ended.

    Prefill, decoding, reading and arithmetic may all overlap, so the bound is the larger of the
    times of `burst_work`. It also holds for the mean response time of a closed loop with
    `concurrency` requests in flight: in that time, as many requests pass as a burst has.
    """
    work = burst_work(shape, concurrency, input_len, output_len)
    return max(work.flop / hardware.flops, work.read / hardware.bandwidth)


def model_shape(deployment: Deployment) -> ModelShape:
    """The shape of the deployment's model with its quantization and the type of its KV cache.

    Raises ConfigError if `data.models()` or `data.quantizations()` does not have it.
    """
    models, quantizations = data.models(), data.quantizations()
    if deployment.model not in models.index or deployment.quantization not in quantizations.index:
        raise ConfigError(
            f"deployment `{deployment.name}`: the shape of model `{deployment.model}` with "
            f"quantization `{deployment.quantization}` is not known. Use one of the models "
            f"{', '.join(models.index)} with one of the quantizations "
            f"{', '.join(quantizations.index)}."
        )
    row: dict[Any, Any] = models.loc[deployment.model].to_dict()
    params, embedding = row["params_b"] * 1e9, row["embedding_params_b"] * 1e9
    published = row.get(deployment.quantization, math.nan)
    return ModelShape(
        params=params,
        active_params=row["active_params_b"] * 1e9,
        embedding_params=embedding,
        experts=int(row["experts"]),
        active_experts=int(row["active_experts"]),
        kv_bytes_per_token=row["kv_kib_per_token"] * 1024 * kv_scale(deployment),
        weight_bytes=published * 1e9
        if published == published
        else estimate_weight_bytes(params, embedding, bool(row["tied"]), deployment.quantization),
        tied=bool(row["tied"]),
        **{key: int(row[key]) for key in _PLACEMENT},
        sliding_window=0 if math.isnan(row["sliding_window"]) else int(row["sliding_window"]),
    )


def estimate_weight_bytes(
    params: float, embedding_params: float, tied: bool, quantization: str
) -> float:
    """The bytes of weights from the bits per parameter of `data.quantizations()`.

    Engines for GPUs keep the embedding and the output layer in 16 bits.
    """
    bits: dict[Any, Any] = data.quantizations().loc[quantization].to_dict()
    tables = embedding_params * (1 if tied else 2)
    size: float = ((params - tables) * bits["bits"] + tables * bits["embedding_bits"]) / 8
    return size


def kv_scale(deployment: Deployment) -> float:
    """The size of a number in the KV cache relative to 16 bits: 0.5 for `kv_cache_dtype: fp8`."""
    dtype = str(deployment.engine_args.get("kv_cache_dtype") or "auto").lower()
    return 0.5 if dtype.startswith("fp8") else 1.0


def deployment_hardware(deployment: Deployment) -> Hardware:
    """The deployment's GPUs. Raises ConfigError if `data.gpus()` does not have them.

    The arithmetic of a model with 8-bit weights may run at the GPU's 8-bit rate.
    """
    gpus = data.gpus()
    if deployment.gpu not in gpus.index:
        raise ConfigError(
            f"deployment `{deployment.name}`: the speed of gpu `{deployment.gpu}` is not known. "
            f"Use one of {', '.join(gpus.index)}."
        )
    row: dict[Any, Any] = gpus.loc[deployment.gpu].to_dict()
    rates = [row["fp16_tflops"]] + [row["fp8_tflops"]] * (deployment.quantization == FP8)
    return Hardware(
        bandwidth=deployment.gpu_count * row["bandwidth_gb_s"] * 1e9,
        flops=deployment.gpu_count * max(rate for rate in rates if rate == rate) * 1e12,
    )


FP8 = "fp8"
_PLACEMENT = ("layers", "hidden", "heads", "kv_heads", "max_context", "sliding_layers")
