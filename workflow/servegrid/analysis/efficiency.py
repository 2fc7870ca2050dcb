"""How close cells come to their bound, and to the prediction of this package. Pure.

Only the tables of the package are used, not the checkpoint or earlier results, so the same records
give the same values on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from servegrid.analysis.prediction import Points, deployment_traits
from servegrid.analysis.predictor import load_calibration, make_predictor
from servegrid.errors import ConfigError
from servegrid.reference.memory import find_device, place
from servegrid.reference.roofline import (
    Hardware,
    ModelShape,
    burst_bound,
    burst_work,
    deployment_hardware,
    model_shape,
)
from servegrid.study.deployment import CPU, Deployment
from servegrid.study.grid import Trial, Workload

COLUMNS = (
    *("bound_s_per_100_tokens", "measured_over_bound"),
    *("achieved_bandwidth_gb_s", "achieved_tflops", "predicted_over_measured"),
)
"""The columns of `columns.CELLS` that `add_efficiency` fills."""


def find_hardware(deployment: Deployment) -> Hardware | None:
    """The rates that bound a deployment. None if there is no strict bound.

    There is none for a CPU, for a GPU that `data.gpus()` does not have, and with speculative
    decoding.
    """
    arguments = deployment.engine_args
    # vLLM's `speculative_config`, llama.cpp's `speculative.types`
    drafts = any(key.startswith("speculative") and each for key, each in arguments.items())
    if not deployment.gpu_count or drafts:
        return None
    try:
        return deployment_hardware(deployment)
    except ConfigError:
        return None


def cell_bound(
    deployment: Deployment,
    shape: ModelShape,
    hardware: Hardware | None,
    workload: Workload,
    concurrency: float,
) -> float | None:
    """The seconds per 100 tokens that no engine can undercut; None if there is no strict bound.

    `hardware` comes from `find_hardware`. There is no bound if equal prompts share a prefix cache.
    Times of an emulated engine are taken without its scale. With several replicas, it is the bound
    of the busiest one: it has its share of the GPUs, and at least its share of the requests.
    """
    prefix_len = 0 if workload.source is None else workload.source.prefix_len
    are_alike = workload.prompts == "identical" or prefix_len > 0
    shared = are_alike and deployment.engine_args.get("enable_prefix_caching")
    if hardware is None or shared or not workload.has_fixed_lengths:
        return None
    length, count = workload.output_len, _independent_replicas(deployment, shape)
    one, requests = hardware.share(count), max(concurrency / count, min(concurrency, 1.0))
    return 100 * burst_bound(shape, one, requests, workload.input_len, length) / length


def _independent_replicas(deployment: Deployment, shape: ModelShape) -> int:
    """The replicas that share nothing. Those of a model with experts share the experts in vLLM."""
    return deployment.replicas if shape.experts == 1 else 1


def add_efficiency(
    trials: Sequence[Trial], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of `columns.CELLS` with COLUMNS, in the same order.

    A value is None if the cell was not served, if a table of the package lacks its model or GPU, or
    if there is no strict bound (see `cell_bound`).
    """
    by_deployment: dict[str, list[int]] = {}
    for position, trial in enumerate(trials):
        by_deployment.setdefault(trial.deployment.name, []).append(position)
    found: list[dict[str, Any]] = [{**row, **dict.fromkeys(COLUMNS)} for row in rows]
    for positions in by_deployment.values():
        served = [at for at in positions if rows[at]["seconds_per_100_tokens"] is not None]
        _fill(
            trials[positions[0]].deployment,
            [trials[at].workload for at in served],
            [found[at] for at in served],
        )
    return found


def _fill(
    deployment: Deployment, workloads: Sequence[Workload], rows: Sequence[dict[str, Any]]
) -> None:
    try:
        shape, device = model_shape(deployment), find_device(deployment.gpu)
        placement = place(deployment, shape, device)
    except ConfigError:
        return
    if not rows or placement.kv_pool <= 0:
        return
    loads = [_in_flight(workload, row) for workload, row in zip(workloads, rows, strict=True)]
    hardware = find_hardware(deployment)
    for load, workload, row in zip(loads, workloads, rows, strict=True):
        bound = cell_bound(deployment, shape, hardware, workload, load)
        if bound is not None:
            busy = min(_independent_replicas(deployment, shape), max(load, 1.0))
            row |= _against_bound(bound, shape, workload, load, row, busy)
    if deployment.gpu == CPU:
        return  # the number of its cores is not recorded
    traits = deployment_traits(deployment, placement, device)
    predictor = make_predictor(traits, deployment.engine, load_calibration())
    lengths = [(workload.input_len, workload.output_len) for workload in workloads]
    points = Points.of(np.maximum(1.0, loads), *np.transpose(lengths))
    seconds = predictor.predict(points).seconds
    for expected, workload, row in zip(seconds, workloads, rows, strict=True):
        if not workload.has_fixed_lengths:
            continue
        measured = row["seconds_per_100_tokens"] / (row["time_scale"] or 1.0)
        row["predicted_over_measured"] = float(100 * expected / workload.output_len / measured)


def _in_flight(workload: Workload, row: Mapping[str, Any]) -> float:
    """The requests in flight: those of the workload, or the measured mean."""
    if workload.concurrency is not None and not workload.think_time_s:
        return float(workload.concurrency)
    return float(row["in_flight_mean"] or 1.0)


def _against_bound(
    bound: float,
    shape: ModelShape,
    workload: Workload,
    load: float,
    row: Mapping[str, Any],
    busy: float,
) -> dict[str, float]:
    """The columns about the bound. Times of an emulated engine are taken without its scale.

    `busy` is the number of replicas with requests: each reads the weights for itself.
    """
    # The tokens of a response that stopped early are fewer than the bound is for.
    if not row.get("output_len_exact", True):
        return {"bound_s_per_100_tokens": bound}
    measured = row["seconds_per_100_tokens"] / (row["time_scale"] or 1.0)
    seconds = measured * workload.output_len / 100
    work = burst_work(shape, load / busy, workload.input_len, workload.output_len)
    return {
        "bound_s_per_100_tokens": bound,
        "measured_over_bound": measured / bound,
        "achieved_bandwidth_gb_s": busy * work.read / seconds / 1e9,
        "achieved_tflops": busy * work.flop / seconds / 1e12,
    }
