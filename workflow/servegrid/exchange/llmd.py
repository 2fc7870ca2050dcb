"""A trial as a Benchmark Report 0.2 of llm-d. Pure.

Field by field as the package `llmd-benchmark-report` 0.2.1 checks it; what is not known is left
out. The figures are servegrid's own, of the part of the load that the table of cells is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from servegrid import __version__
from servegrid.analysis.metrics import allocation_of
from servegrid.analysis.titles import EMULATED
from servegrid.records.columns import PERCENTILES
from servegrid.study.deployment import Deployment, digest_of
from servegrid.study.grid import Trial, Workload

VERSION = "0.2.1"


def report(record: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The report of one trial; `row` is its row of `columns.CELLS`, with None for null."""
    trial = Trial.from_spec(record["spec"])
    uid = digest_of([trial.spec, allocation_of(record["environment"])])
    found: dict[str, Any] = _told(
        {
            "version": VERSION,
            "run": {
                "uid": uid,
                "eid": digest_of(allocation_of(record["environment"])),
                "time": {
                    "start": record["client"].get("started_at"),
                    "duration": _duration(row["makespan_s"]),
                },
                "description": f"{trial.id}: {_belief(row)}",
            },
            "scenario": {
                "stack": [_engine(trial.deployment, row)],
                "workload": _load(trial.workload, row["origin"]),
            },
            "results": {"request_performance": {"aggregate": _aggregate(trial.workload, row)}},
        }
    )
    return found


def _engine(deployment: Deployment, row: Mapping[str, Any]) -> dict[str, Any]:
    on_gpus = deployment.gpu != "cpu"
    return {
        "metadata": {"label": deployment.name, "cfg_id": deployment.digest},
        "standardized": {
            "kind": "inference_engine",
            "tool": row["engine"] or "unknown",
            "tool_version": row["engine_version"] or "unknown",
            "role": "replica",
            "replicas": 1,
            "model": {"name": deployment.checkpoint or deployment.model},
            "accelerator": {
                "model": deployment.gpu,
                "count": deployment.gpu_count if on_gpus else 0,
                "parallelism": {"tp": deployment.gpu_count if on_gpus else 1},
            },
        },
        "native": {"config": deployment.spec},
    }


def _load(workload: Workload, origin: str) -> dict[str, Any]:
    spread = workload.longest_output - workload.output_len
    output = {"distribution": "fixed", "value": workload.output_len}
    if spread:
        limits = {"min": workload.output_len - spread, "max": workload.output_len + spread}
        output = {"distribution": "uniform", "value": workload.output_len, **limits}
    return {
        "metadata": {"cfg_id": digest_of(vars(workload)), "description": workload.protocol},
        "standardized": {
            "tool": origin,
            "tool_version": __version__,
            "source": "random",
            "input_seq_len": {"distribution": "fixed", "value": workload.input_len},
            "output_seq_len": output,
            "rate_qps": workload.request_rate,
            "concurrency": workload.concurrency,
        },
        "native": {"config": dict(vars(workload))},
    }


def _aggregate(workload: Workload, row: Mapping[str, Any]) -> dict[str, Any]:
    window, served = row["window_s"], row["requests_in_window"]
    rate = served / window if window and served is not None else None
    return {
        "requests": {
            "total": row["requests"],
            "failures": row["failed_requests"],
            "input_length": {"units": "count", "mean": workload.input_len},
            "output_length": {"units": "count", "mean": workload.output_len},
        },
        "latency": {
            "time_to_first_token": _latency("ttft", "s", row),
            "time_per_output_token": _latency("tpot", "s/token", row),
            "inter_token_latency": _latency("itl", "s/token", row),
            "request_latency": _latency("e2el", "s", row),
        },
        "throughput": {
            "output_token_rate": _mean("tokens/s", row["output_tokens_per_s"]),
            "request_rate": _mean("queries/s", rate),
        },
    }


def _latency(name: str, units: str, row: Mapping[str, Any]) -> dict[str, Any] | None:
    if row[f"{name}_s_mean"] is None:
        return None
    percentiles = {f"p{each}": row[f"{name}_s_p{each}"] for each in PERCENTILES}
    return {"units": units, "mean": row[f"{name}_s_mean"], **percentiles}


def _mean(units: str, value: float | None) -> dict[str, Any] | None:
    return None if value is None else {"units": units, "mean": value}


def _belief(row: Mapping[str, Any]) -> str:
    emulated = "EMULATED, no hardware was measured; " if row["engine"] == EMULATED else ""
    if row["valid"]:
        return f"{emulated}valid"
    broken = (
        zip(row["invalid_rules"], row["invalid_evidence"], strict=True)
        if row["valid"] is not None
        else ()
    )
    why = "; ".join(f"{rule}: {evidence}" for rule, evidence in broken)
    why = why or row["verdict_detail"] or row["verdict"]
    return f"{emulated}not to be believed: {why}"


def _duration(seconds: float | None) -> str | None:
    """As ISO 8601 writes it."""
    return None if seconds is None else f"PT{seconds:.6f}S"


def _told(value: Any) -> Any:
    """`value` without what is null, and without mappings that nothing is left of."""
    if not isinstance(value, Mapping):
        return [_told(each) for each in value] if isinstance(value, list) else value
    found = {key: _told(each) for key, each in value.items() if each is not None}
    return {key: each for key, each in found.items() if each != {}}
