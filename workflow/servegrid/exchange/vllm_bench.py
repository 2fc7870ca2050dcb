"""What `vllm bench serve` saves, read and written. Pure.

Keys and definitions are those of vLLM 0.32, `vllm/benchmarks/serve.py`: percentiles over all
requests that succeeded, between-chunk times as they are, over the time from the first request
sent to the last one's end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from servegrid.errors import ExchangeError
from servegrid.exchange.foreign import Foreign, closed, lengths_of, ns, percentile_known, with_users
from servegrid.records.tokens import shared_out
from servegrid.study.grid import Protocol, Trial

ORIGIN = "vllm bench serve"
KEYS = ("model_id", "num_prompts", "request_rate", "completed", "duration", "output_throughput")
"""By which a file of it is known."""
_DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors")
_DATE = "%Y%m%d-%H%M%S"
_LATENCIES = ("ttft", "tpot", "itl", "e2el")


def read(result: Mapping[str, Any], source: str) -> Foreign:
    """The load of one result. Raises ExchangeError, naming `source` and the key.

    With `--save-detailed` from its requests, else from its own figures: then the throughput is
    that of the whole load. An open loop is taken only as a Poisson process.
    """
    rate = float(result["request_rate"])
    if math.isfinite(rate) and result.get("burstiness", 1.0) != 1.0:
        raise ExchangeError(
            f"{source}: burstiness is {result['burstiness']}; servegrid knows a rate only as a "
            "Poisson process, which is burstiness 1."
        )
    protocol: Protocol = "poisson"
    concurrency, limit = None, result.get("max_concurrency")
    if math.isinf(rate):
        protocol, concurrency = closed(limit, int(result["num_prompts"]))
    detailed = all(result.get(key) for key in _DETAILS)
    if detailed:
        requests = _requests(result, source, protocol == "poisson")
        served = [row for row in requests if row["error"] is None]
        lengths, notes = lengths_of(
            [row["prompt_tokens"] for row in served],
            [row["completion_tokens"] for row in served],
            source,
        )
    else:
        requests, (lengths, notes) = None, _mean_lengths(result, source)
    return Foreign(
        source=source,
        origin=ORIGIN,
        model=str(result["model_id"]),
        measured=str(result.get("date", "")),
        protocol=protocol,
        concurrency=concurrency,
        request_rate=rate if protocol == "poisson" else None,
        lengths=lengths,
        requests=requests,
        figures={} if detailed else _figures(result, protocol, concurrency, lengths[1]),
        notes=notes,
    )


def _requests(result: Mapping[str, Any], source: str, open_loop: bool) -> list[dict[str, Any]]:
    lists = {key: result[key] for key in _DETAILS}
    if len({len(each) for each in lists.values()}) != 1:
        told = ", ".join(f"{key} {len(each)}" for key, each in lists.items())
        raise ExchangeError(f"{source}: its lists are of different lengths: {told}.")
    count = len(lists["ttfts"])
    lists["latencies"] = result.get("latencies") or [None] * count  # not in older versions
    lists["queue_times"] = result.get("queue_times") or [0.0] * count
    rows = [
        _request({key: each[place] for key, each in lists.items()}, open_loop)
        for place in range(count)
    ]
    return with_users(rows)


def _request(told: Mapping[str, Any], open_loop: bool) -> dict[str, Any]:
    start, ttft, output = told["start_times"], told["ttfts"], told["output_lens"]
    arrivals = itertools.accumulate([ttft, *told["itls"]])
    stamps = [ns(start + at) for at in arrivals] if ttft else []
    end = stamps[-1] if stamps else ns(start)
    if told["latencies"]:
        end = max(end, ns(start + told["latencies"]))
    error = told["errors"]
    return {
        "wave": 0,
        "scheduled_ns": ns(start - told["queue_times"]) if open_loop else ns(start),
        "sent_ns": ns(start),
        "first_token_ns": stamps[0] if stamps else None,
        "token_ns": stamps,
        "chunk_tokens": shared_out(output, len(stamps)) if stamps else [],
        "chunk_tokens_estimated": len(stamps) != output,
        "done_ns": end,
        "error": f"http_error: {error}" if error else None,
        "prompt_tokens": told["input_lens"],
        "completion_tokens": None if error else output,
        "asked_tokens": None if error else output,
    }


def _mean_lengths(result: Mapping[str, Any], source: str) -> tuple[tuple[int, int], list[str]]:
    completed = result["completed"]
    totals = [result.get(key) for key in ("total_input_tokens", "total_output_tokens")]
    if not completed or None in totals:
        raise ExchangeError(f"{source}: no request of it succeeded; there is nothing to import.")
    prompt, output = (round(total / completed) for total in totals if total is not None)
    note = "saved without --save-detailed: figures of the whole load as the client gave them"
    return (prompt, output), [note, "lengths are means"]


def _figures(
    result: Mapping[str, Any], protocol: str, concurrency: int | None, output_len: int
) -> dict[str, Any]:
    completed, duration = int(result["completed"]), float(result["duration"])
    speed = float(result["output_throughput"])
    gaps = int(result["total_output_tokens"]) - completed
    e2el = result.get("mean_e2el_ms")
    seconds = duration if protocol == "burst" else None if e2el is None else e2el / 1e3
    figures: dict[str, Any] = {
        "requests": int(result["num_prompts"]),
        "failed_requests": int(result.get("failed", result["num_prompts"] - completed)),
        "makespan_s": duration,
        "window_s": duration,
        "requests_in_window": completed,
        "output_tokens_per_s": speed,
        "output_tokens_per_s_per_user": None if concurrency is None else speed / concurrency,
        "seconds_per_100_tokens": None if seconds is None else seconds / output_len * 100,
    }
    for name in _LATENCIES:
        samples = gaps if name == "itl" else completed
        told = {"mean": result.get(f"mean_{name}_ms"), "p50": result.get(f"median_{name}_ms")}
        for percentile in (90, 95, 99):
            known = percentile_known(percentile, samples)
            told[f"p{percentile}"] = result.get(f"p{percentile}_{name}_ms") if known else None
        figures |= {
            f"{name}_s_{which}": None if value is None else value / 1e3
            for which, value in told.items()
        }
    return figures


def written(record: Mapping[str, Any], requests: pa.Table) -> dict[str, Any]:
    """The result that it would have saved of a trial, with its details but without texts.

    `requests` has the columns of `columns.REQUESTS`; texts are not kept. Raises ExchangeError
    where no request was sent.
    """
    trial = Trial.from_spec(record["spec"])
    workload, deployment = trial.workload, trial.deployment
    rows = [row for row in requests.to_pylist() if row["sent_ns"] is not None]
    if not rows:
        raise ExchangeError(f"{trial.id}: no request of it was sent; there is nothing to export.")
    duration = (max(row["done_ns"] for row in rows) - min(row["sent_ns"] for row in rows)) / 1e9
    served = [row for row in rows if row["error"] is None]
    prompts = sum(row["prompt_tokens"] or workload.input_len for row in served)
    tokens = sum(row["completion_tokens"] for row in served)
    api = record["engine"].get("api")
    backend = "openai-chat" if api == "chat" else "openai"
    return {
        "date": datetime.fromisoformat(record["client"]["started_at"]).strftime(_DATE),
        "endpoint_type": backend,
        "backend": backend,
        "label": trial.id,
        "model_id": deployment.checkpoint or deployment.model,
        "tokenizer_id": deployment.tokenizer or deployment.checkpoint,
        "num_prompts": len(rows),
        "request_rate": "inf" if workload.request_rate is None else workload.request_rate,
        "burstiness": 1.0,
        "max_concurrency": workload.concurrency,
        "duration": duration,
        "completed": len(served),
        "failed": len(rows) - len(served),
        "total_input_tokens": prompts,
        "total_output_tokens": tokens,
        "request_throughput": len(served) / duration,
        "request_goodput": None,
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


def _ttft(row: Mapping[str, Any]) -> float:
    return float(row["first_token_ns"] - row["sent_ns"]) / 1e9


def _latency(row: Mapping[str, Any]) -> float:
    return float(row["token_ns"][-1] - row["sent_ns"]) / 1e9


def _tpot(row: Mapping[str, Any]) -> float:
    return (_latency(row) - _ttft(row)) / float(row["completion_tokens"] - 1)


def _gaps(row: Mapping[str, Any]) -> list[float]:
    return [float(gap) / 1e9 for gap in np.diff(row["token_ns"])]


def _statistics(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, population's standard deviation and 99th percentile; nothing of nothing."""
    if not seconds:
        return {}
    values = np.array(seconds) * 1e3
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        f"p99_{name}_ms": float(np.percentile(values, 99)),
    }
