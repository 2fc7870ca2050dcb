"""The roofline: no deployment can be faster than its memory and its arithmetic allow.

The model is that of Williams, Waterman and Patterson, "Roofline: an insightful visual performance
model for multicore architectures" (2009), applied to a transformer's two phases. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from servegrid.errors import ConfigError
from servegrid.reference import data
from servegrid.study.grid import Deployment


@dataclass(frozen=True)
class Shape:
    """What of a model decides its speed. A dense model has one expert, which all tokens use.

    `params` and `active_params` are numbers of parameters: all, and those one token uses.
    """

    params: float
    active_params: float
    experts: int
    active_experts: int
    kv_bytes_per_token: float
    weight_bytes: float

    def read_bytes(self, tokens: float) -> float:
        """Bytes of weights that `tokens` tokens in one step make the GPUs read.

        Of E experts of which each token picks k, n tokens hit E·(1 - (1 - k/E)^n) on average,
        if they pick independently and evenly.
        """
        if self.experts == 1:
            return self.weight_bytes
        unused = self.experts - self.active_experts
        expert = (self.params - self.active_params) / unused
        missed: float = (1 - self.active_experts / self.experts) ** tokens
        return self.weight_bytes * (1 - expert * self.experts * missed / self.params)


@dataclass(frozen=True)
class Hardware:
    """All GPUs of a deployment together: bytes/s of their memory, FLOP/s in 16 bits."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Bound:
    """The least time in seconds: until the first token, and for each further one."""

    ttft_s: float
    itl_s: float

    def e2el_s(self, output_len: int) -> float:
        return self.ttft_s + (output_len - 1) * self.itl_s


def bound(shape: Shape, hardware: Hardware, concurrency: float, input_len: int) -> Bound:
    """The bound for `concurrency` requests at once with prompts of `input_len` tokens.

    Two FLOP per parameter and token. Prefill works on all prompts at once and reads the weights
    at least once; a decoding step reads the weights that its tokens need and every request's
    KV cache (the prompt's; what is generated is left out, as it only adds).
    """
    per_token = 2 * shape.active_params
    prompts = concurrency * input_len
    ttft = max(prompts * per_token / hardware.flops, shape.read_bytes(prompts) / hardware.bandwidth)
    read = shape.read_bytes(concurrency) + prompts * shape.kv_bytes_per_token
    itl = max(read / hardware.bandwidth, concurrency * per_token / hardware.flops)
    return Bound(ttft, itl)


def shape_of(deployment: Deployment) -> Shape:
    """Raises ConfigError where the model or its quantisation is not in `reference.models()`."""
    models = data.models()
    known = [name for name in models.columns if name not in _NOT_QUANTIZATIONS]
    if deployment.model not in models.index or deployment.quantization not in known:
        raise ConfigError(
            f"deployment `{deployment.name}`: the shape of model `{deployment.model}` in "
            f"`{deployment.quantization}` is not known. Known are {', '.join(models.index)} "
            f"in {', '.join(known)}."
        )
    row: dict[Any, Any] = models.loc[deployment.model].to_dict()
    return Shape(
        params=row["params_b"] * 1e9,
        active_params=row["active_params_b"] * 1e9,
        experts=int(row["experts"]),
        active_experts=int(row["active_experts"]),
        kv_bytes_per_token=row["kv_kib_per_token"] * 1024,
        weight_bytes=row[deployment.quantization] * 1e9,
    )


def hardware_of(deployment: Deployment) -> Hardware:
    """Raises ConfigError where the kind of GPU is not in `reference.gpus()`."""
    gpus = data.gpus()
    if deployment.gpu not in gpus.index:
        raise ConfigError(
            f"deployment `{deployment.name}`: what gpu `{deployment.gpu}` can do is not known. "
            f"Known are {', '.join(gpus.index)}."
        )
    row: dict[Any, Any] = gpus.loc[deployment.gpu].to_dict()
    return Hardware(
        bandwidth=deployment.gpu_count * row["bandwidth_gb_s"] * 1e9,
        flops=deployment.gpu_count * row["fp16_tflops"] * 1e12,
    )


_NOT_QUANTIZATIONS = {
    *("params_b", "active_params_b", "experts", "active_experts", "kv_kib_per_token"),
}
