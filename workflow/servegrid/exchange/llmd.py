"""Formats a trial as a Benchmark Report 0.2 of llm-d. Pure.

The keys are those that the package `llmd-benchmark-report` 0.2.1 checks. Unknown values are left
out. The metrics are those of the table of cells: of the stationary part, or of the whole burst.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from servegrid import __version__
from servegrid.analysis.metrics import allocation_id, measured_workload
from servegrid.analysis.titles import EARLY_STOP
from servegrid.records.columns import PERCENTILES
from servegrid.study.deployment import EMULATED, Deployment, digest_json
from servegrid.study.grid import Trial, Workload
from servegrid.study.source import Source

VERSION = "0.2.1"


def format_report(record: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The report of one trial; `row` is its row of `columns.CELLS`, with None for null."""
    trial = Trial.from_spec(record["spec"])
    allocation = allocation_id(record["environment"])
    report: dict[str, Any] = _without_nulls(
        {
            "version": VERSION,
            "run": {
                "uid": digest_json([trial.spec, allocation]),
                "eid": digest_json(allocation),
                "time": {
                    "start": record["client"].get("started_at"),
                    "duration": _format_duration(row["makespan_s"]),
                },
                "description": f"{trial.id}: {_describe_validity(row)}",
            },
            "scenario": {
                "stack": [_format_engine(trial.deployment, record["engine"], row)],
                "load": _format_load(measured_workload(record), row["origin"]),
            },
            "results": {"request_performance": {"aggregate": _format_metrics(trial.workload, row)}},
        }
    )
    return report


def _format_engine(
    deployment: Deployment, engine: Mapping[str, Any], row: Mapping[str, Any]
) -> dict[str, Any]:
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
                "parallelism": _format_parallelism(deployment, engine),
            },
        },
        "native": {"config": deployment.spec},
    }


def _format_parallelism(deployment: Deployment, engine: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM has recorded; for other engines, all GPUs are taken for tensor parallel."""
    copies = engine.get("data_parallel_size")
    return {
        "tp": engine.get("tensor_parallel_size") or deployment.parallelism.tensor,
        "pp": engine.get("pipeline_parallel_size"),
        "dp": copies,
        "dp_local": copies,
    }


def _format_load(workload: Workload, origin: str) -> dict[str, Any]:
    """llm-d calls a workload a load."""
    return {
        "metadata": {"cfg_id": digest_json(workload.spec), "description": workload.protocol},
        "standardized": {
            "tool": origin,
            "tool_version": __version__,
            "source": _prompt_source(workload.source or Source()),
            "input_seq_len": _format_lengths(workload, workload.input_len, workload.max_input_len),
            "output_seq_len": _format_lengths(
                workload, workload.output_len, workload.max_output_len
            ),
            "rate_qps": workload.request_rate,
            "concurrency": workload.concurrency,
        },
        "native": {"config": workload.spec},
    }


def _prompt_source(source: Source) -> str:
    """`random` in llm-d means tokens drawn from the vocabulary, `sampled` means from data.

    Texts of the corpus and of files are data. Of a trace with blocks, only the blocks are known.
    """
    has_blocks = source.kind == "trace" and source.file is not None and source.file.shares_blocks
    return "random" if source.kind == "random" or has_blocks else "sampled"


def _format_lengths(workload: Workload, mean: int, longest: int) -> dict[str, Any]:
    """The distribution of lengths: fixed, uniform as `output_spread` says, or up to a maximum.

    The texts of a file have at most the workload's lengths.
    """
    has_texts = workload.source is not None and workload.source.kind == "file"
    if longest == mean and not has_texts:
        return {"distribution": "fixed", "value": mean}
    if workload.has_fixed_lengths:
        lowest = 2 * mean - longest
        return {"distribution": "uniform", "value": mean, "min": lowest, "max": longest}
    return {"distribution": "other", "value": mean, "max": longest}


def _format_metrics(workload: Workload, row: Mapping[str, Any]) -> dict[str, Any]:
    window, served = row["window_s"], row["requests_in_window"]
    rate = served / window if window and served is not None else None
    return {
        "requests": {
            "total": row["requests"],
            "failures": row["failed_requests"],
            "input_length": {"units": "count", "mean": _input_length(workload, row)},
            "output_length": {"units": "count", "mean": _output_length(workload, row)},
        },
        "latency": {
            "time_to_first_token": _format_latency("ttft", "s", row),
            "time_per_output_token": _format_latency("tpot", "s/token", row),
            "inter_token_latency": _format_latency("itl", "s/token", row),
            "request_latency": _format_latency("e2el", "s", row),
        },
        "throughput": {
            "output_token_rate": _format_mean("tokens/s", row["output_tokens_per_s"]),
            "request_rate": _format_mean("queries/s", rate),
        },
    }


def _input_length(workload: Workload, row: Mapping[str, Any]) -> float | None:
    """The mean of what was sent, if prompts differ in length."""
    if workload.has_fixed_lengths:
        return workload.input_len
    mean: float | None = row["prompt_tokens_mean"]
    return mean


def _output_length(workload: Workload, row: Mapping[str, Any]) -> float | None:
    """The mean of what came, if that may differ from what was requested on average."""
    if row["output_len_exact"] and workload.has_fixed_lengths:
        return workload.output_len
    mean: float | None = row["completion_tokens_mean"]
    return mean


def _format_latency(name: str, units: str, row: Mapping[str, Any]) -> dict[str, Any] | None:
    if row[f"{name}_s_mean"] is None:
        return None
    percentiles = {f"p{percentile}": row[f"{name}_s_p{percentile}"] for percentile in PERCENTILES}
    return {"units": units, "mean": row[f"{name}_s_mean"], **percentiles}


def _format_mean(units: str, value: float | None) -> dict[str, Any] | None:
    return None if value is None else {"units": units, "mean": value}


def _describe_validity(row: Mapping[str, Any]) -> str:
    mark = "EMULATED, no hardware was measured; " if row["engine"] == EMULATED else ""
    if not row["output_len_exact"]:
        mark += f"{EARLY_STOP}; "
    if row["valid"]:
        return f"{mark}valid"
    if row["valid"] is None:
        return f"{mark}not served: {row['verdict_detail'] or row['verdict']}"
    broken = zip(row["invalid_rules"], row["invalid_evidence"], strict=True)
    reasons = "; ".join(f"{rule}: {evidence}" for rule, evidence in broken)
    return f"{mark}not valid: {reasons}"


def _format_duration(seconds: float | None) -> str | None:
    """An ISO 8601 duration."""
    return None if seconds is None else f"PT{seconds:.6f}S"


def _without_nulls(value: Any) -> Any:
    """`value` without nulls and without mappings that are empty then."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    kept = {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return {key: item for key, item in kept.items() if item != {}}
