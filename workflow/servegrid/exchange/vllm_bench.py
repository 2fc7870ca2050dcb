"""Reads and writes the results of `vllm bench serve`. Pure.

Keys and definitions come from vLLM 0.32, `vllm/benchmarks/serve.py`: percentiles over all
successful requests, inter-token latencies between chunks, throughput from the first request's
start to the last request's end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from servegrid.analysis.metrics import MAX_TOKENS_PER_CHUNK, measured_workload, time_scale
from servegrid.analysis.slo import Slo
from servegrid.errors import ExchangeError
from servegrid.exchange.imported import (
    ImportedResult,
    assign_users,
    closed_protocol,
    has_enough_samples,
    limit_notes,
    mean_lengths,
    nothing_to_import,
    to_ns,
)
from servegrid.records.tokens import split_tokens
from servegrid.study.deployment import EMULATED
from servegrid.study.grid import OPEN_LOOPS, Protocol, Trial

ORIGIN = "vllm bench serve"
KEYS = ("model_id", "num_prompts", "request_rate", "completed", "duration", "output_throughput")
"""The keys that identify such a file."""
FAILURE_KEYS = ("error_type", "error", "serve_overrides", "bench_overrides")
"""The keys of the file that `vllm bench sweep` writes about a run that failed."""
_DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors")
_DATE = "%Y%m%d-%H%M%S"
_LATENCIES = ("ttft", "tpot", "itl", "e2el")


def parse_result(result: Mapping[str, Any], source: str) -> ImportedResult:
    """One result: from its requests if it was saved with `--save-detailed`, else from its metrics.

    In the second case the throughput covers the whole run. Raises ExchangeError, which names
    `source` and the key, for example if its request rate rose during the run.
    """
    if not isinstance(result["model_id"], str):
        raise ExchangeError(
            f"{source}: `model_id` is {result['model_id']!r} and not the name of a model. Check "
            "that the client finished writing the file."
        )
    protocol, concurrency, rate = _parse_load(result, source)
    burstiness = float(result["burstiness"]) if protocol == "gamma" else None
    detailed = all(result.get(key) for key in _DETAILS)
    requests, metrics = None, {}
    if detailed:
        requests = _request_rows(result, source, protocol in OPEN_LOOPS)
        served = [row for row in requests if row["error"] is None]
        input_len, output_len, notes = mean_lengths(
            [row["prompt_tokens"] for row in served],
            [row["completion_tokens"] for row in served],
            source,
        )
        if protocol in OPEN_LOOPS:
            notes += limit_notes(requests, result.get("max_concurrency"))
    else:
        input_len, output_len, notes = _lengths_from_totals(result, source)
        metrics = _parse_metrics(result, protocol, concurrency)
    return ImportedResult(
        source=source,
        origin=ORIGIN,
        model=str(result["model_id"]),
        started=str(result.get("date", "")),
        protocol=protocol,
        concurrency=concurrency,
        request_rate=rate,
        input_len=input_len,
        output_len=output_len,
        requests=requests,
        metrics=metrics | _parse_speculation(result),
        notes=notes,
        # Equal rates of different burstiness are different cells.
        parameters=_sweep_parameters(result) | ({"burstiness": burstiness} if burstiness else {}),
        burstiness=burstiness,
    )


def refuse_failure(failure: Mapping[str, Any], source: str) -> ImportedResult:
    """Raise ExchangeError: `vllm bench sweep --continue-on-error` describes a failed run here."""
    raise ExchangeError(
        f"{source}: this run of vllm bench sweep failed ({failure['error_type']}: "
        f"{failure['error']}). Repeat the sweep, which runs only what is missing."
    )


def _parse_load(
    result: Mapping[str, Any], source: str
) -> tuple[Protocol, int | None, float | None]:
    """Protocol, concurrency and request rate. A burstiness of infinity means equal intervals.

    Any other burstiness is the shape of gamma-distributed intervals, as in servegrid.
    """
    if result.get("ramp_up_strategy"):
        raise ExchangeError(
            f"{source}: its request rate rose during the run (ramp_up_strategy "
            f"{result['ramp_up_strategy']}), so it has no stationary part. Import a result without "
            "a ramp-up."
        )
    rate, burstiness = float(result["request_rate"]), float(result.get("burstiness", 1.0))
    if math.isinf(rate):
        limit = result.get("max_concurrency")
        return *closed_protocol(limit, int(result["num_prompts"])), None
    if burstiness == 1:
        return "poisson", None, rate
    if math.isinf(burstiness):
        return "constant", None, rate
    if burstiness > 0:
        return "gamma", None, rate
    raise ExchangeError(
        f"{source}: burstiness is {result['burstiness']}, but it must be more than 0. "
        "Run vllm bench serve again."
    )


def _parse_speculation(result: Mapping[str, Any]) -> dict[str, Any]:
    """How many drafted tokens were accepted, if the server drafts. The file has the rate in %."""
    if "spec_decode_acceptance_rate" not in result:
        return {}
    return {
        "spec_decode_acceptance_rate": float(result["spec_decode_acceptance_rate"]) / 100,
        "spec_decode_acceptance_length": float(result["spec_decode_acceptance_length"]),
    }


def _sweep_parameters(result: Mapping[str, Any]) -> dict[str, Any]:
    """What `vllm bench sweep` adds: the number of the run, then parameters of server and client."""
    names = list(result)
    first = names.index("run_number") if "run_number" in result else len(names)
    return {name: result[name] for name in names[first:]}


def _request_rows(result: Mapping[str, Any], source: str, open_loop: bool) -> list[dict[str, Any]]:
    lists = {key: result[key] for key in _DETAILS}
    if len({len(values) for values in lists.values()}) != 1:
        lengths = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
        raise ExchangeError(
            f"{source}: its lists have different lengths: {lengths}. Run vllm bench serve again."
        )
    count = len(lists["ttfts"])
    lists["latencies"] = result.get("latencies") or [None] * count  # not in older versions
    lists["queue_times"] = result.get("queue_times") or [0.0] * count
    rows = [
        _request_row({key: values[index] for key, values in lists.items()}, open_loop)
        for index in range(count)
    ]
    return assign_users(rows)


def _request_row(request: Mapping[str, Any], open_loop: bool) -> dict[str, Any]:
    start, ttft, output = request["start_times"], request["ttfts"], request["output_lens"]
    arrivals = itertools.accumulate([ttft, *request["itls"]])
    token_ns = [to_ns(start + arrival) for arrival in arrivals] if ttft else []
    end = token_ns[-1] if token_ns else to_ns(start)
    if request["latencies"]:
        end = max(end, to_ns(start + request["latencies"]))
    error = request["errors"]
    return {
        "wave": 0,
        "scheduled_ns": to_ns(start - request["queue_times"]) if open_loop else to_ns(start),
        "sent_ns": to_ns(start),
        "first_token_ns": token_ns[0] if token_ns else None,
        "token_ns": token_ns,
        "chunk_tokens": split_tokens(output, len(token_ns)) if token_ns else [],
        "chunk_tokens_estimated": len(token_ns) != output,
        "done_ns": end,
        "error": f"http_error: {error}" if error else None,
        "prompt_tokens": request["input_lens"],
        "completion_tokens": None if error else output,
        "requested_tokens": None if error else output,
    }


def _lengths_from_totals(result: Mapping[str, Any], source: str) -> tuple[int, int, list[str]]:
    completed = result["completed"]
    totals = [result.get(key) for key in ("total_input_tokens", "total_output_tokens")]
    if not completed or None in totals:
        raise nothing_to_import(source)
    prompt, output = (round(total / completed) for total in totals if total is not None)
    note = "saved without --save-detailed: metrics of the whole run, as the client computed them"
    return prompt, output, [note, "input_len and output_len are means"]


def _parse_metrics(
    result: Mapping[str, Any], protocol: str, concurrency: int | None
) -> dict[str, Any]:
    """Columns of `columns.CELLS` from the client's own metrics."""
    completed, duration = int(result["completed"]), float(result["duration"])
    tokens_per_s = float(result["output_throughput"])
    tokens = int(result["total_output_tokens"])
    gaps = tokens - completed
    e2el = result.get("mean_e2el_ms")
    seconds = duration if protocol == "burst" else None if e2el is None else e2el / 1e3
    metrics: dict[str, Any] = {
        "requests": int(result["num_prompts"]),
        "failed_requests": int(result.get("failed", result["num_prompts"] - completed)),
        "makespan_s": duration,
        "window_s": duration,
        "requests_in_window": completed,
        "output_tokens_per_s": tokens_per_s,
        "output_tokens_per_s_per_user": tokens_per_s / concurrency if concurrency else None,
        "seconds_per_100_tokens": 100 * seconds * completed / tokens
        if seconds and tokens
        else None,
    }
    for name in _LATENCIES:
        samples = gaps if name == "itl" else completed
        values = {"mean": result.get(f"mean_{name}_ms"), "p50": result.get(f"median_{name}_ms")}
        for percentile in (90, 95, 99):
            enough = has_enough_samples(percentile, samples)
            values[f"p{percentile}"] = result.get(f"p{percentile}_{name}_ms") if enough else None
        metrics |= {
            f"{name}_s_{statistic}": None if value is None else value / 1e3
            for statistic, value in values.items()
        }
    return metrics


def format_result(
    record: Mapping[str, Any],
    cell: Mapping[str, Any],
    requests: pa.Table,
    classes: Mapping[str, Slo],
) -> dict[str, Any]:
    """A trial like `vllm bench serve --save-detailed` would save it, but without texts.

    `cell` is its row of `columns.CELLS`, with None for null. `requests` has the columns of
    `columns.REQUESTS`. The key `servegrid` says what vLLM's keys cannot: whether the trial is
    valid, whether it is emulated, and whether its outputs have the exact length. It also has the
    attainment and the goodput of each SLO class; `request_goodput` is that of the first. Goodput
    counts the requests that meet the SLO, with latencies from sending on, as vLLM counts them;
    those of an emulated engine in real time.
    Raises ExchangeError if no request was sent.
    """
    trial = Trial.from_spec(record["spec"])
    workload, deployment = measured_workload(record), trial.deployment
    rows = [row for row in requests.to_pylist() if row["sent_ns"] is not None]
    if not rows:
        raise ExchangeError(f"{trial.id}: no request was sent, so there is nothing to export.")
    duration = (max(row["done_ns"] for row in rows) - min(row["sent_ns"] for row in rows)) / 1e9
    served = [row for row in rows if row["error"] is None]
    prompts = sum(row["prompt_tokens"] or workload.input_len for row in served)
    tokens = sum(row["completion_tokens"] for row in served)
    good = {name: _count_good(slo, served, time_scale(record)) for name, slo in classes.items()}
    backend = "openai-chat" if deployment.is_chat else "openai"
    return {
        "date": datetime.fromisoformat(record["client"]["started_at"]).strftime(_DATE),
        "endpoint_type": backend,
        "backend": backend,
        "label": trial.id,
        "servegrid": {
            "version": record.get("servegrid"),
            "valid": cell["valid"],
            "invalid_rules": cell["invalid_rules"],
            "emulated": cell["engine"] == EMULATED,
            "time_scale": cell["time_scale"],
            "output_len_exact": cell["output_len_exact"],
            "slo": {
                name: {
                    **{key: limit for key, limit in asdict(slo).items() if limit is not None},
                    "slo_attainment": good[name] / len(rows),
                    "request_goodput": good[name] / duration,
                }
                for name, slo in classes.items()
            },
        },
        "model_id": deployment.checkpoint or deployment.model,
        "tokenizer_id": deployment.tokenizer or deployment.checkpoint,
        "num_prompts": len(rows),
        "request_rate": "inf" if workload.request_rate is None else workload.request_rate,
        "burstiness": workload.burstiness or 1.0,
        "max_concurrency": workload.concurrency,
        "duration": duration,
        "completed": len(served),
        "failed": len(rows) - len(served),
        "total_input_tokens": prompts,
        "total_output_tokens": tokens,
        "request_throughput": len(served) / duration,
        "request_goodput": next(iter(good.values())) / duration,
        "output_throughput": tokens / duration,
        "total_token_throughput": (prompts + tokens) / duration,
        "input_lens": [row["prompt_tokens"] or workload.input_len for row in rows],
        "output_lens": [0 if row["error"] else row["completion_tokens"] for row in rows],
        "ttfts": [0.0 if row["error"] else _ttft(row) for row in rows],
        "itls": [[] if row["error"] else _gaps(row) for row in rows],
        "latencies": [0.0 if row["error"] else _latency(row) for row in rows],
        "start_times": [row["sent_ns"] / 1e9 for row in rows],
        "errors": [row["error"] or "" for row in rows],
        **_statistics("ttft", [_ttft(row) for row in served]),
        **_statistics("tpot", [_tpot(row) for row in served if row["completion_tokens"] > 1]),
        **_statistics("itl", [gap for row in served for gap in _gaps(row)]),
        **_statistics("e2el", [_latency(row) for row in served]),
    }


def _count_good(slo: Slo, served: Sequence[Mapping[str, Any]], scale: float) -> int:
    """The number of served requests that meet the SLO."""
    return sum(
        bool(
            slo.is_met(
                _ttft(row) / scale,
                _latency(row) / scale,
                row["completion_tokens"],
                max(_itls(row), default=math.nan) / scale,
            )
        )
        for row in served
    )


def _itls(row: Mapping[str, Any]) -> list[float]:
    """Inter-token latencies in s: the gaps between chunks, divided among the tokens of each.

    If it is not known how many tokens each has, all of a gap counts, as in `metrics`.
    """
    chunks = MAX_TOKENS_PER_CHUNK * len(row["token_ns"])
    if row["chunk_tokens_estimated"] and row["completion_tokens"] > chunks:
        return _gaps(row)
    return [gap / tokens for gap, tokens in zip(_gaps(row), row["chunk_tokens"][1:], strict=True)]


def _ttft(row: Mapping[str, Any]) -> float:
    return float(row["first_token_ns"] - row["sent_ns"]) / 1e9


def _latency(row: Mapping[str, Any]) -> float:
    return float(row["token_ns"][-1] - row["sent_ns"]) / 1e9


def _tpot(row: Mapping[str, Any]) -> float:
    return (_latency(row) - _ttft(row)) / float(row["completion_tokens"] - 1)


def _gaps(row: Mapping[str, Any]) -> list[float]:
    return [float(gap) / 1e9 for gap in np.diff(row["token_ns"])]


def _statistics(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, population standard deviation and 99th percentile; empty without values."""
    if not seconds:
        return {}
    values = np.array(seconds) * 1e3
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        f"p99_{name}_ms": float(np.percentile(values, 99)),
    }
