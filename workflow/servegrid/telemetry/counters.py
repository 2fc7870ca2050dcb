"""What the metrics of a server mean, by whatever name it has them. Pure.

vLLM has counters and histograms since it came up, and gauges that hold for a moment; llama.cpp
has fewer of them. What a server does not tell is None.
"""

from __future__ import annotations

from collections.abc import Mapping

Counters = Mapping[str, float] | None
"""A server's metrics by name, summed over their labels; None where it has none."""

Names = tuple[str, ...]
"""What the same metric is called by vLLM from 0.10 to 0.32 and by llama.cpp; the first counts."""

RUNNING: Names = ("vllm:num_requests_running", "llamacpp:requests_processing")
WAITING: Names = ("vllm:num_requests_waiting", "llamacpp:requests_deferred")
KV_CACHE_USE: Names = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
PREEMPTIONS: Names = ("vllm:num_preemptions_total",)
PREFIX_HITS: Names = (
    "vllm:prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_hits_total",
    "llamacpp:prompt_tokens_cached_total",
)
GAUGES: Names = (*RUNNING, *WAITING, *KV_CACHE_USE, *PREEMPTIONS)
TTFT: Names = ("vllm:time_to_first_token_seconds",)
ITL: Names = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
QUEUE: Names = ("vllm:request_queue_time_seconds",)
E2EL: Names = ("vllm:e2e_request_latency_seconds",)


def gauges_of(counters: Counters) -> dict[str, float]:
    """The columns of `columns.TELEMETRY` that the server tells, without those that it does not."""
    told = {
        "running": _value(counters, RUNNING),
        "waiting": _value(counters, WAITING),
        "kv_cache_usage": _value(counters, KV_CACHE_USE),
        "preemptions": _value(counters, PREEMPTIONS),
    }
    return {name: value for name, value in told.items() if value is not None}


def has_settled(counters: Counters, finished: int, since: Counters) -> bool:
    """Whether no request is left and `finished` more than at `since` have been counted.

    True where the server does not tell.
    """
    if _value(counters, RUNNING) or _value(counters, WAITING):
        return False
    counted = grown(since, counters, tuple(f"{name}_count" for name in E2EL))
    return counted is None or counted >= finished


def grown(before: Counters, after: Counters, names: Names) -> float | None:
    """By how much a counter has grown; None where it is not known, or began anew in between."""
    first, last = _value(before, names), _value(after, names)
    if first is None or last is None or last < first:
        return None
    return last - first


def _value(counters: Counters, names: Names) -> float | None:
    return next((counters[name] for name in names if name in counters), None) if counters else None
