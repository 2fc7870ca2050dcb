"""The columns of the raw records: one row per request, one row per sample."""

from __future__ import annotations

import pyarrow as pa

from servegrid.records.columns.column import Column

_TIME = "ns of CLOCK_MONOTONIC"

REQUESTS = (
    Column("request_id", pa.string(), "", "Sent as X-Request-Id; unique within the trial"),
    Column("user", pa.int32(), "", "Number of the user that sent it, from 0"),
    Column("wave", pa.int32(), "", "The wave of a burst, from 0; 0 for other protocols"),
    Column("scheduled_ns", pa.int64(), _TIME, "Time when the request was due"),
    Column("sent_ns", pa.int64(), _TIME, "Time when its first byte was passed to the kernel"),
    Column("first_token_ns", pa.int64(), _TIME, "Arrival of the first chunk with tokens"),
    Column("token_ns", pa.list_(pa.int64()), _TIME, "Arrival of each chunk with tokens"),
    Column("chunk_tokens", pa.list_(pa.int32()), "tokens", "Tokens in each of these chunks"),
    Column(
        "chunk_tokens_estimated",
        pa.bool_(),
        "",
        "True if the server reported no usage per chunk: chunk_tokens is then the final count, "
        "split evenly among the chunks",
    ),
    Column("done_ns", pa.int64(), _TIME, "Time when the response ended or the request failed"),
    Column("status", pa.int32(), "", "HTTP status; null without a response"),
    Column("error", pa.string(), "", "`kind: detail` of the failure; null if it succeeded"),
    Column("prompt_tokens", pa.int32(), "tokens", "Prompt tokens, as the server counted them"),
    Column("completion_tokens", pa.int32(), "tokens", "Output tokens, as the server counted them"),
    Column("requested_tokens", pa.int32(), "tokens", "Output tokens that were requested"),
    Column("sent_tokens", pa.int32(), "tokens", "Prompt tokens that were sent"),
    Column(
        "shared_tokens",
        pa.int32(),
        "tokens",
        "Tokens at the start of the prompt that an earlier request also had: the most that an "
        "unlimited prefix cache can supply",
    ),
    Column(
        "cached_tokens",
        pa.int32(),
        "tokens",
        "Prompt tokens from the server's prefix cache, by the usage of its response; null if the "
        "usage does not say",
    ),
    Column(
        "first_output_token_ns",
        pa.int64(),
        _TIME,
        "Arrival of the first chunk with tokens of the answer, not of the reasoning; null if none "
        "came, and for completions, which do not tell the two apart",
    ),
    Column(
        "reasoning_tokens",
        pa.int32(),
        "tokens",
        "Output tokens of the reasoning, as the server counted them, or the tokens of the chunks "
        "with reasoning; null if neither is known. completion_tokens includes them",
    ),
    Column(
        "reasoning_tokens_estimated",
        pa.bool_(),
        "",
        "True if the server did not count reasoning_tokens, so that they come from the chunks",
    ),
    Column(
        "draft_tokens",
        pa.int32(),
        "tokens",
        "Tokens that speculative decoding drafted for this response, as llama.cpp counts them; "
        "null if the response does not say",
    ),
    Column(
        "accepted_draft_tokens",
        pa.int32(),
        "tokens",
        "Those of draft_tokens that the model accepted",
    ),
    Column(
        "adapter", pa.string(), "", "LoRA adapter that the request named; null if it named none"
    ),
    Column(
        "conversation",
        pa.int32(),
        "",
        "Number of the conversation that the request is a turn of, from 0; null without `turns`",
    ),
    Column(
        "turn",
        pa.int32(),
        "",
        "Which of the user's turns in the conversation it is, from 1; null without `turns`",
    ),
)
"""One row per request."""

TELEMETRY = (
    Column("time_ns", pa.int64(), _TIME, "Time of the sample"),
    Column(
        "device",
        pa.string(),
        "",
        "`engine` for the processes of the engine, `engine.1` for those on its second node, and so "
        "on; else the UUID of the GPU, or its index if the UUID is not known",
    ),
    Column(
        "memory_bytes",
        pa.int64(),
        "bytes",
        "GPU: memory in use, without the part that the driver reserves if NVML reports it. "
        "`engine`: anonymous and shared memory of all processes, plus the mapped files of the "
        "process that maps most",
    ),
    Column("cpu_s", pa.float64(), "s", "CPU time of the engine's processes so far"),
    Column(
        "utilization", pa.float64(), "0 to 1", "Fraction of time with a kernel running on the GPU"
    ),
    Column(
        "power_w",
        pa.float64(),
        "W",
        "Power of the GPU: the instantaneous value if the driver reports it, else its average",
    ),
    Column("energy_j", pa.float64(), "J", "Energy counter of the GPU"),
    Column("sm_clock_mhz", pa.int32(), "MHz", "Clock of the GPU's multiprocessors"),
    Column("memory_clock_mhz", pa.int32(), "MHz", "Clock of the GPU's memory"),
    Column("temperature_c", pa.int32(), "°C", "Temperature of the GPU"),
    Column("throttle_reasons", pa.int64(), "bit mask", "NVML's reasons for reduced clocks"),
    Column(
        "running",
        pa.int32(),
        "requests",
        "Requests running in the server. This column and the next three are sampled about once per "
        "second and are null in between",
    ),
    Column("waiting", pa.int32(), "requests", "Requests in the server's queue"),
    Column("kv_cache_usage", pa.float64(), "0 to 1", "Fraction of the server's KV cache in use"),
    Column("preemptions", pa.int64(), "", "Preemptions since the server started"),
)
"""One row per device and sample. Unknown is null, never 0."""
