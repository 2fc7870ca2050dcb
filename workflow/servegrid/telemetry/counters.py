"""The server's metrics under one name, for all supported versions of vLLM and llama.cpp. Pure.

vLLM has counters and histograms since its start, and gauges of the moment; llama.cpp has fewer.
A metric that a server does not have is None.
"""

from __future__ import annotations

from collections.abc import Mapping

Counters = Mapping[str, float] | None
"""A server's metrics by name, summed over their labels; None if it has no metrics."""

Names = tuple[str, ...]
"""Names of one metric in vLLM 0.10 to 0.32 and in llama.cpp; the first one that exists is read."""

RUNNING: Names = ("vllm:num_requests_running", "llamacpp:requests_processing")
WAITING: Names = ("vllm:num_requests_waiting", "llamacpp:requests_deferred")
KV_CACHE_USAGE: Names = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
PREEMPTIONS: Names = ("vllm:num_preemptions_total",)
PREFIX_HITS: Names = (
    "vllm:prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_hits_total",
    "llamacpp:prompt_tokens_cached_total",
)
PREFIX_QUERIES: Names = (
    "vllm:prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_queries_total",
)
DRAFTS: Names = ("vllm:spec_decode_num_drafts_total",)
DRAFT_TOKENS: Names = ("vllm:spec_decode_num_draft_tokens_total",)
ACCEPTED_TOKENS: Names = ("vllm:spec_decode_num_accepted_tokens_total",)
GAUGES: Names = (*RUNNING, *WAITING, *KV_CACHE_USAGE, *PREEMPTIONS)
TTFT: Names = ("vllm:time_to_first_token_seconds",)
ITL: Names = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
QUEUE: Names = ("vllm:request_queue_time_seconds",)
E2EL: Names = ("vllm:e2e_request_latency_seconds",)
FINISHED: Names = tuple(f"{name}_count" for name in E2EL)
PROMPT_TOKENS: Names = ("vllm:prompt_tokens_total", "llamacpp:prompt_tokens_total")
GENERATED_TOKENS: Names = ("vllm:generation_tokens_total", "llamacpp:tokens_predicted_total")


def gauge_columns(counters: Counters) -> dict[str, float]:
    """The columns of `columns.TELEMETRY` that come from the server, without missing metrics."""
    values = {
        "running": _value(counters, RUNNING),
        "waiting": _value(counters, WAITING),
        "kv_cache_usage": _value(counters, KV_CACHE_USAGE),
        "preemptions": _value(counters, PREEMPTIONS),
    }
    return {name: value for name, value in values.items() if value is not None}


def has_settled(counters: Counters, finished: int, since: Counters) -> bool:
    """Whether the server is idle and has counted `finished` more requests than in `since`.

    True if the server does not report it.
    """
    if _value(counters, RUNNING) or _value(counters, WAITING):
        return False
    counted = increase(since, counters, FINISHED)
    return counted is None or counted >= finished


def increase(before: Counters, after: Counters, names: Names) -> float | None:
    """By how much a counter grew; None if it is missing, or was reset in between."""
    first, last = _value(before, names), _value(after, names)
    if first is None or last is None or last < first:
        return None
    return last - first


def _value(counters: Counters, names: Names) -> float | None:
    return next((counters[name] for name in names if name in counters), None) if counters else None
