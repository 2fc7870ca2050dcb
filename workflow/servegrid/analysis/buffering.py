"""Finds out whether something between the server and the client held the tokens back. Pure.

A gateway or proxy may buffer an event stream and send it on in large pieces, or all at once. Then
the tokens' arrival times are those of the gateway: ttft is close to e2el, and most inter-token
latencies are 0. The end of the response and the number of tokens stay right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from servegrid.records.parquet import column_or_null
from servegrid.study.deployment import EMULATED

REQUEST_COLUMNS = ("sent_ns", "token_ns", "completion_tokens", "error", "accepted_draft_tokens")
"""The columns of `columns.REQUESTS` that `describe_buffering` needs. Older records lack the last
one."""

MAX_COALESCED = 0.25
"""The fraction of the chunks that may be read together with the previous one. From one half on,
even the median inter-token latency can be 0."""
MIN_CHUNK_S = 0.001
"""Chunks that follow each other faster may share a read: the client's times are not finer."""
MIN_TOKENS = 16
"""A server may send fewer tokens than this in one chunk on purpose (speculative decoding)."""
MAX_WHOLE = 0.5
"""The fraction of the responses that may arrive in a single read."""


def held_back(record: Mapping[str, Any], requests: pa.Table) -> str | None:
    """The evidence that a trial's responses were held back, from its record and its requests.

    An emulated engine has no gateway in front of it. With a small time scale, its chunks follow
    faster than a busy machine reads them.
    """
    return None if record["engine"].get("engine") == EMULATED else describe_buffering(requests)


def describe_buffering(requests: pa.Table) -> str | None:
    """The evidence that responses were held back; None if their tokens came as they were made.

    `requests` has one row per request, with at least REQUEST_COLUMNS. Failed ones do not count.
    """
    has_tokens = pc.greater(pc.list_value_length(requests["token_ns"]), 0)
    served = requests.filter(pc.and_(pc.is_null(requests["error"]), has_tokens))
    if not served.num_rows:
        return None
    stamps = served["token_ns"].combine_chunks()
    chunks = pc.list_value_length(stamps).to_numpy()
    times = stamps.flatten().to_numpy()
    ends = np.cumsum(chunks)
    starts = ends - chunks
    sent = served["sent_ns"].to_numpy()
    seconds = (times[ends - 1] - sent) / 1e9
    if float(np.median(seconds / chunks)) < MIN_CHUNK_S:
        return None
    repeated = np.diff(times, prepend=times[0] - 1) == 0
    repeated[starts] = False
    coalesced = max(int(repeated.sum()) - _sent_with_others(served), 0) / times.size
    if coalesced > MAX_COALESCED:
        return f"{coalesced:.0%} of the chunks with tokens were read together with the previous one"
    tokens = served["completion_tokens"].to_numpy()
    whole = (times[ends - 1] == times[starts]) & (tokens >= MIN_TOKENS)
    if whole.mean() > MAX_WHOLE:
        return f"{whole.sum()} of {len(whole)} responses arrived in one piece"
    return None


def _sent_with_others(requests: pa.Table) -> int:
    """The tokens that llama.cpp sent at the time of others, because they are of one step.

    With speculative decoding, the model accepts several drafted tokens in one step. llama.cpp sends
    each in a chunk of its own, right after the previous one.
    """
    return pc.sum(column_or_null(requests, "accepted_draft_tokens")).as_py() or 0
