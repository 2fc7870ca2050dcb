"""The columns of a cell that come from the server's own metrics. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from servegrid.records.parquet import column_or_null
from servegrid.telemetry.counters import (
    ACCEPTED_TOKENS,
    DRAFT_TOKENS,
    DRAFTS,
    E2EL,
    ITL,
    PREEMPTIONS,
    PREFIX_HITS,
    PREFIX_QUERIES,
    QUEUE,
    TTFT,
    Counters,
    Names,
    increase,
)

REQUEST_COLUMNS = ("sent_ns", "first_token_ns")
"""The columns of `columns.REQUESTS` that `server_columns` needs."""

TELEMETRY_COLUMNS = ("running", "waiting", "kv_cache_usage")
"""The columns of `columns.TELEMETRY` that `server_columns` needs."""


def server_columns(
    record: Mapping[str, Any], requests: pa.Table, telemetry: pa.Table
) -> dict[str, float | None]:
    """The columns of `columns.CELLS` that come from the server. Times are in seconds.

    `requests` are all requests of the workload, because the server's histograms cover all of them;
    with at least REQUEST_COLUMNS. `telemetry` are the samples in the cell's window, with at least
    TELEMETRY_COLUMNS.
    """
    before, after = record["metrics_before"], record["metrics_after"]
    ttft, ttft_count = _histogram_mean(before, after, TTFT)
    return {
        "server_ttft_s_mean": ttft,
        "server_itl_s_mean": _histogram_mean(before, after, ITL)[0],
        "server_queue_s_mean": _histogram_mean(before, after, QUEUE)[0],
        "server_e2el_s_mean": _histogram_mean(before, after, E2EL)[0],
        "ttft_client_overhead_s": _client_overhead_s(requests, ttft, ttft_count),
        "running_mean": pc.mean(telemetry["running"]).as_py(),
        "waiting_mean": pc.mean(telemetry["waiting"]).as_py(),
        "waiting_max": pc.max(telemetry["waiting"]).as_py(),
        "kv_cache_usage_max": pc.max(telemetry["kv_cache_usage"]).as_py(),
        "preemptions": increase(before, after, PREEMPTIONS),
        "prefix_hit_tokens": increase(before, after, PREFIX_HITS),
    }


def prefix_columns(record: Mapping[str, Any], requests: pa.Table) -> dict[str, float | None]:
    """The hit rate of the server's prefix cache, and that of a cache without a limit.

    The server's counters decide; without them, the cached tokens in the usage of the responses.
    """
    before, after = record["metrics_before"], record["metrics_after"]
    prompts = pc.sum(requests["prompt_tokens"]).as_py()
    hits = increase(before, after, PREFIX_HITS)
    looked_up = increase(before, after, PREFIX_QUERIES) or prompts
    if hits is None:
        hits, looked_up = pc.sum(column_or_null(requests, "cached_tokens")).as_py(), prompts
    expected = expected_hits(record, requests)
    return {
        "prefix_hit_rate": None if hits is None or not looked_up else hits / looked_up,
        "expected_prefix_hit_rate": None if expected is None or not prompts else expected / prompts,
    }


def speculation_columns(record: Mapping[str, Any], requests: pa.Table) -> dict[str, float | None]:
    """How many drafted tokens the model accepted, by the definitions of `vllm bench serve`.

    Each draft is one step of the model, which adds one token of its own to the accepted ones. The
    server's counters decide; without them, llama.cpp's counts in the responses.
    """
    drafts, drafted, accepted = (
        increase(record["metrics_before"], record["metrics_after"], names)
        for names in (DRAFTS, DRAFT_TOKENS, ACCEPTED_TOKENS)
    )
    if drafted is None:
        drafted, accepted = (
            pc.sum(column_or_null(requests, name)).as_py()
            for name in ("draft_tokens", "accepted_draft_tokens")
        )
    if accepted is None:
        return {"spec_decode_acceptance_rate": None, "spec_decode_acceptance_length": None}
    return {
        "spec_decode_acceptance_rate": accepted / drafted if drafted else None,
        "spec_decode_acceptance_length": 1 + accepted / drafts if drafts else None,
    }


def expected_hits(record: Mapping[str, Any], requests: pa.Table) -> int | None:
    """The prompt tokens that a prefix cache without a limit has: whole blocks of the shared starts.

    The last token of a prompt is always computed, because the first output token follows from it.
    None if prefix caching is off, or if the record does not say what prompts share.
    """
    if not record["engine"].get("prefix_caching") or "shared_tokens" not in requests.column_names:
        return None
    block: int = record["engine"].get("kv_block_tokens") or 1
    rows = zip(
        requests["shared_tokens"].to_pylist(), requests["prompt_tokens"].to_pylist(), strict=True
    )
    known: list[int] = [
        min(shared, prompt - 1) for shared, prompt in rows if shared is not None and prompt
    ]
    return sum(tokens // block * block for tokens in known)


def _histogram_mean(
    before: Counters, after: Counters, names: Names
) -> tuple[float | None, float | None]:
    """The mean and the number of the values that a histogram received since `before`."""
    total = increase(before, after, tuple(f"{name}_sum" for name in names))
    count = increase(before, after, tuple(f"{name}_count" for name in names))
    return (None if total is None or not count else total / count), count


def _client_overhead_s(
    requests: pa.Table, server_ttft: float | None, server_count: float | None
) -> float | None:
    """The client's mean time to first token minus the server's.

    None if the server counted a different number of first tokens than the client.
    """
    ttft = pc.drop_null(pc.subtract(requests["first_token_ns"], requests["sent_ns"])).to_numpy()
    if server_ttft is None or server_count != len(ttft):
        return None
    return float(np.mean(ttft) / 1e9 - server_ttft)
