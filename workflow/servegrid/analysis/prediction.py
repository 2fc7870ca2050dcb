"""The expected duration of a burst, from the shapes of model and hardware. Pure.

A strict bound comes from `reference.roofline`. Here is what an engine really takes: a few physical
constants with log-normal priors, which are fitted to all deployments that are known. What is left
is the residual, a Gaussian process (`analysis.residuals`). docs/prediction.md explains the model,
how its structure was chosen and how far it holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from servegrid.errors import ConfigError
from servegrid.reference import data
from servegrid.reference.memory import Device, Placement, find_device, place
from servegrid.reference.roofline import ModelShape
from servegrid.study.grid import Deployment

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

OUTPUT_LEN = 100
"""The output length of the published bursts. With others, only the physics is known."""


class Prior(NamedTuple):
    """A constant's prior: median, and standard deviation of its logarithm."""

    median: float
    sd: float


PRIORS: Mapping[str, Prior] = {
    "launch": Prior(0.40e-3, 0.20),  # s per layer and step: the host launches kernels
    "expert_launch": Prior(2.3, 0.20),  # times that, with experts
    "bandwidth": Prior(0.70, 0.15),  # share of the bandwidth, for weights
    "kv_bandwidth": Prior(0.50, 0.40),  # the same for the KV cache
    "arithmetic": Prior(0.50, 0.15),  # share of the FLOP/s, with thousands of tokens at once
    "small_batch": Prior(1.3, 0.30),  # times slower with few tokens, beyond the memory's limit
    "idle_experts": Prior(0.8, 0.40),  # share of the idle experts' work that is done anyway
    "link": Prior(0.75, 0.50),  # share of the bandwidth between two GPUs
    "shared_link": Prior(0.3, 0.60),  # times that, between more than two GPUs on PCIe
    "sequence": Prior(0.10e-3, 0.60),  # s per sequence and step: scheduler, sampler, text
    "sharpness": Prior(2.0, 0.50),  # how sharply one limit takes over from another
}
"""The constants that all deployments share."""

DEVIATIONS: Mapping[str, Mapping[str, float]] = {
    "architecture": {"launch": 0.20, "arithmetic": 0.12, "kv_bandwidth": 0.20},
    "kernel": {"arithmetic": 0.08, "bandwidth": 0.08, "small_batch": 0.20},
}
"""Constants in which GPU architectures and quantization kernels differ, and the standard deviation
of the logarithm between them. One that was never seen has the common value (partial pooling)."""

PCIE = 64e9
"""A slower link, in bytes/s, is PCIe, which more than two GPUs share."""
DISCREPANCY = 0.20
"""The standard deviation of log(measured / modelled) that the fit assumes."""
WORTH = 20
"""Neighbouring cells err alike: a table counts as so many independent cells."""

Constants = Mapping[str, float]
"""The constants as standard normal scores by name; `launch@ampere` is a deviation."""


@dataclass(frozen=True)
class Traits:
    """What the speed of one copy of a deployment depends on. Sizes in bytes, rates per second.

    `bandwidth` and `flops` are those of all its GPUs together. `kv_pool_sequences(tokens)` follows
    from `placement`. `comm_bytes` is what the GPUs exchange per token.
    """

    architecture: str
    kernel: str
    small_batch_factor: float
    weights: float
    active_params: float
    params: float
    has_experts: bool
    kv_bytes: float
    layers: float
    gpus: float
    bandwidth: float
    flops: float
    comm_bytes: float
    link: float
    max_running: float
    copies: float
    placement: Placement


def find_traits(deployment: Deployment, shape: ModelShape | None, cores: int) -> Traits | None:
    """The traits of a deployment of a model; None if the model or the kind of GPU is unknown."""
    try:
        device = find_device(deployment.gpu)
    except ConfigError:
        return None
    if shape is None:
        return None
    return deployment_traits(deployment, place(deployment, shape, device), device, cores)


def deployment_traits(
    deployment: Deployment, placement: Placement, device: Device, cores: int = 1
) -> Traits:
    """The traits of a deployment on GPUs, or on `cores` cores of a CPU."""
    shape, sizes = placement.shape, deployment.parallelism
    tensor = sizes.tensor
    units = cores if deployment.gpu_count == 0 else tensor * sizes.pipeline
    quantizations = data.quantizations()
    known = deployment.quantization in quantizations.index
    row: dict[Any, Any] = quantizations.loc[deployment.quantization].to_dict() if known else {}
    return Traits(
        architecture=device.architecture,
        kernel=str(row.get("kernel", "unknown")),
        small_batch_factor=float(row.get("small_batch_factor", 1.0)),
        weights=shape.weight_bytes,
        active_params=shape.active_params,
        params=shape.params,
        has_experts=shape.experts > 1,
        kv_bytes=shape.kv_bytes_per_token,
        layers=shape.layers,
        gpus=units,
        bandwidth=units * device.bandwidth,
        flops=units * device.flops,
        # Two all-reduces of 16-bit activations per layer, each as a ring.
        comm_bytes=_ring_bytes(shape.layers, shape.hidden, tensor),
        link=device.link,
        max_running=deployment.max_num_seqs,
        copies=sizes.data,
        placement=placement,
    )


def _ring_bytes(layers: float, hidden: float, gpus: int) -> float:
    return 2 * layers * hidden * 2 * 2 * (gpus - 1) / gpus


@dataclass(frozen=True)
class Points:
    """Bursts: simultaneous requests, prompt tokens and output tokens, arrays of one length."""

    concurrency: Floats
    input_len: Floats
    output_len: Floats

    @classmethod
    def of(cls, concurrency: Any, input_len: Any, output_len: Any = OUTPUT_LEN) -> Points:
        """Points from sequences or numbers, which are repeated."""
        arrays = np.broadcast_arrays(
            *(np.asarray(each, dtype=float) for each in (concurrency, input_len, output_len))
        )
        return cls(*(np.atleast_1d(each) for each in arrays))

    def __len__(self) -> int:
        return len(self.concurrency)

    def take(self, positions: Sequence[int] | Indices) -> Points:
        """The points at these positions."""
        index = np.asarray(positions, dtype=np.int64)
        return Points(self.concurrency[index], self.input_len[index], self.output_len[index])


@dataclass(frozen=True)
class Bursts:
    """Measured bursts and their seconds, an array as long as `points`."""

    points: Points
    seconds: Floats


@dataclass(frozen=True)
class Table:
    """The measured bursts of one deployment: `seconds` is an array as long as `points`."""

    name: str
    traits: Traits
    points: Points
    seconds: Floats


class _Rows:
    """Rows of several deployments as arrays, so that one evaluation takes all of them."""

    def __init__(self, parts: Sequence[tuple[Traits, Points]]) -> None:
        sizes = [len(points) for _, points in parts]

        def spread(values: Sequence[Any]) -> Any:
            return np.repeat(np.asarray(values), sizes)

        self.traits = {
            name: spread([getattr(traits, name) for traits, _ in parts])
            for name in Traits.__dataclass_fields__
            if name != "placement"
        }
        per_copy = [np.ceil(points.concurrency / traits.copies) for traits, points in parts]
        self.n = np.concatenate(per_copy)
        self.p, self.out = (
            np.concatenate([getattr(points, name) for _, points in parts])
            for name in ("input_len", "output_len")
        )
        # What the KV cache does not hold, or the engine may not run, waits for the next wave.
        held = np.concatenate([_held(traits, points) for traits, points in parts])
        self.waves = np.maximum(1.0, self.n / np.minimum(held, self.traits["max_running"]))


def _held(traits: Traits, points: Points) -> Floats:
    """The sequences of each point that the KV cache of one copy holds."""
    placement, tokens = traits.placement, points.input_len + points.output_len
    if math.isinf(placement.kv_pool):
        return np.full(len(points), math.inf)
    lengths, index = np.unique(tokens, return_inverse=True)
    held = [placement.sequences(length) / placement.copies for length in lengths]
    each: Floats = np.maximum(np.asarray(held), 1e-9)[index]
    return each


class _Fit:
    """The names of the constants, and their values for rows."""

    def __init__(self, rows: _Rows) -> None:
        self.rows = rows
        self.own = {
            f"{constant}@{level}": (constant, sd, rows.traits[key] == level)
            for key, constants in DEVIATIONS.items()
            for level in sorted(set(rows.traits[key]))
            for constant, sd in constants.items()
        }
        self.names = [*PRIORS, *self.own]

    def values(self, scores: Constants) -> dict[str, Any]:
        logs: dict[str, Any] = {
            name: math.log(prior.median) + prior.sd * scores.get(name, 0.0)
            for name, prior in PRIORS.items()
        }
        for name, (constant, sd, where) in self.own.items():
            if score := scores.get(name, 0.0):
                logs[constant] = logs[constant] + sd * score * where
        return {name: np.exp(value) for name, value in logs.items()}


def _seconds(values: Mapping[str, Any], rows: _Rows) -> Floats:
    """The modelled duration of each row's burst.

    Prefill is limited by arithmetic and communication. A decoding step takes the launches of its
    kernels or the GPUs' work, whichever is more, with a soft transition; so do weights and
    arithmetic in it. The KV cache, communication and the host add to it.
    """
    of = rows.traits
    running, total = rows.n / rows.waves, rows.n
    work = of["active_params"] + values["idle_experts"] * of["has_experts"] * (
        of["params"] - of["active_params"]
    )
    arithmetic = 2 * work / (of["flops"] * values["arithmetic"])
    shared = (of["gpus"] > 2) & (of["link"] < PCIE)
    link = of["link"] * values["link"] * np.where(shared, values["shared_link"], 1.0)
    comm = of["comm_bytes"] / link
    weights = of["weights"] / (of["bandwidth"] * values["bandwidth"])
    context = running * (rows.p + rows.out / 2) * of["kv_bytes"]
    cache = context / (of["bandwidth"] * values["kv_bandwidth"])
    launch = (
        of["layers"] * values["launch"] * np.where(of["has_experts"], values["expert_launch"], 1.0)
    )
    small = values["small_batch"] * of["small_batch_factor"]
    power = 1 + values["sharpness"]
    device = _soft_maximum(weights, running * arithmetic * small, power) + cache + running * comm
    step = _soft_maximum(launch, device, power) + running * values["sequence"]
    seconds: Floats = total * rows.p * (arithmetic + comm) + rows.out * rows.waves * step
    return seconds


def _soft_maximum(first: Any, second: Any, power: Any) -> Any:
    return (first**power + second**power) ** (1 / power)


def burst_seconds(constants: Constants, traits: Traits, points: Points) -> Floats:
    """The expected seconds of each burst, without the residual."""
    fit = _Fit(_Rows([(traits, points)]))
    return _seconds(fit.values(constants), fit.rows)


def log_residuals(constants: Constants, table: Table) -> Floats:
    """log(measured / expected) of each cell of a table."""
    residual: Floats = np.log(table.seconds / burst_seconds(constants, table.traits, table.points))
    return residual


def fit_constants(tables: Sequence[Table]) -> dict[str, float]:
    """The most probable constants, given tables of deployments, with a robust loss."""
    from scipy.optimize import least_squares

    fit = _Fit(_Rows([(table.traits, table.points) for table in tables]))
    target = np.log(np.concatenate([table.seconds for table in tables]))
    sizes = [len(table.points) for table in tables]
    weight = np.repeat([1 / math.sqrt(max(1.0, size / WORTH)) for size in sizes], sizes)

    def residuals(scores: Floats) -> Floats:
        values = fit.values(dict(zip(fit.names, scores, strict=True)))
        errors = (np.log(_seconds(values, fit.rows)) - target) / DISCREPANCY * weight
        return np.concatenate([errors, scores])

    start = np.zeros(len(fit.names))
    found = least_squares(residuals, start, loss="soft_l1", f_scale=2.0, ftol=1e-4, xtol=1e-3)
    return {name: float(score) for name, score in zip(fit.names, found.x, strict=True)}
