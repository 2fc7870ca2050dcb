"""The columns of the table of cells, and the percentiles that it publishes."""

from __future__ import annotations

import pyarrow as pa

from servegrid.records.columns.column import Column

PERCENTILES = {50: 1, 90: 64, 95: 130, 99: 662}
"""The published percentiles, and the minimum number of samples for each.

With n samples, the probability that fewer than two of them lie above the true quantile q is
q^n + n (1 - q) q^(n - 1). The minimum is the smallest n for which this is at most 1%. MLPerf
Inference requires the same for its early stopping."""


def _latencies(name: str, meaning: str) -> list[Column]:
    """Columns for the mean and the percentiles of one latency."""
    return [
        Column(f"{name}_s_mean", pa.float64(), "s", f"{meaning}; mean"),
        *(
            Column(
                f"{name}_s_p{percentile}",
                pa.float64(),
                "s",
                f"{name}, {percentile}th percentile; null with fewer than {minimum} samples"
                if minimum > 1
                else f"{name}, median",
            )
            for percentile, minimum in PERCENTILES.items()
        ),
    ]


TEXTS = pa.list_(pa.field("element", pa.string()))
"""A list of texts; Parquet calls its items so."""

CELLS = (
    Column("deployment", pa.string(), "", "Name of the deployment"),
    Column("model", pa.string(), "", "Name of the model"),
    Column("quantization", pa.string(), "", "Number format of the weights"),
    Column("gpu", pa.string(), "", "Kind of GPU, or `cpu`"),
    Column("gpu_count", pa.int32(), "", "GPUs of the deployment, with all its replicas"),
    Column(
        "replicas",
        pa.int32(),
        "",
        "Copies of the model in the deployment, among which it divides the requests; null in older "
        "tables",
    ),
    Column("engine", pa.string(), "", "Engine that served the model"),
    Column("engine_version", pa.string(), "", "Version of the engine"),
    Column(
        "origin",
        pa.string(),
        "",
        "Load client that measured the trial: `servegrid`, or the tool it was imported from",
    ),
    Column(
        "time_scale",
        pa.float64(),
        "",
        "Factor by which an emulated engine scales all times; null for a real engine",
    ),
    Column("allocation", pa.string(), "", "Allocation that measured the trial, and its start time"),
    Column(
        "protocol",
        pa.string(),
        "",
        "`burst`, `closed_loop`, `poisson`, `gamma`, `profile` or `trace`; imported also "
        "`constant`",
    ),
    Column(
        "concurrency",
        pa.int32(),
        "requests",
        "Simultaneous requests (burst) or users (closed_loop); null for open loops",
    ),
    Column(
        "request_rate",
        pa.float64(),
        "requests/s",
        "Mean request rate of an open loop; null for other protocols",
    ),
    Column(
        "input_len",
        pa.int32(),
        "tokens",
        "Prompt length: the mean over the requests; for conversations, that of one turn; for a "
        "`file`, the longest one allowed",
    ),
    Column(
        "output_len",
        pa.int32(),
        "tokens",
        "Output length: the mean over the requests; for a `file`, the longest one allowed",
    ),
    Column(
        "output_spread",
        pa.float64(),
        "0 to 1",
        "Output lengths vary uniformly around output_len by up to this fraction",
    ),
    Column(
        "output_len_exact",
        pa.bool_(),
        "",
        "False if the study allows the endpoint's responses to stop early, with fewer tokens than "
        "output_len; times per token and rates then come from the tokens that came. Null if "
        "imported",
    ),
    Column("prompts", pa.string(), "", "`distinct`, or `identical` in all requests"),
    Column(
        "think_time_s",
        pa.float64(),
        "s",
        "Mean time between a response and the same user's next request",
    ),
    Column("trial", pa.int32(), "", "Number of the trial of this cell in its bring-up, from 1"),
    Column("bring_up", pa.int32(), "", "Number of the bring-up that the study asks for, from 1"),
    Column(
        "verdict",
        pa.string(),
        "",
        "How the workload was served (`ok`, `queued`, `preempted`), or why it was not",
    ),
    Column("verdict_detail", pa.string(), "", "Evidence for the verdict; null if ok"),
    Column(
        "verdict_evidence",
        pa.string(),
        "",
        "The numbers and names in verdict_detail as JSON, for example `preemptions`, "
        "`waiting_share`, `kv_needed_gib` or `by` (the trial that dominates this one); null if "
        "there are none",
    ),
    Column(
        "valid",
        pa.bool_(),
        "",
        "True if no rule of validity is broken; null if the workload was not served",
    ),
    Column(
        "invalid_rules",
        TEXTS,
        "",
        "Rules of validity that are broken; empty if valid, null if the workload was not served",
    ),
    Column(
        "invalid_evidence",
        TEXTS,
        "",
        "Evidence for each of invalid_rules, in the same order",
    ),
    Column(
        "allocation_drift",
        pa.float64(),
        "",
        "Drift checks of the allocation: (highest - lowest) / median of their "
        "output_tokens_per_s; null with fewer than two drift checks",
    ),
    Column("requests", pa.int32(), "requests", "Requests sent"),
    Column("failed_requests", pa.int32(), "requests", "Requests that failed"),
    Column(
        "makespan_s",
        pa.float64(),
        "s",
        "Time from the due time of the first request to the end of the last; for a burst, the sum "
        "over its waves",
    ),
    Column(
        "completion_tokens_mean",
        pa.float64(),
        "tokens",
        "Output tokens of a response, by the server's count: mean over requests_in_window",
    ),
    Column(
        "seconds_per_100_tokens",
        pa.float64(),
        "s",
        "Latency as in Bendi-Ouis et al. (2024): makespan of a wave (burst), else mean e2el, "
        "divided by output_len, times 100; null if the workload was not served. If "
        "output_len_exact is false, or if `source` sets the lengths, divided by "
        "completion_tokens_mean. If it is false, the time to first token is then shared by fewer "
        "tokens, and a wave ends with its longest response, so the value is higher than with exact "
        "lengths",
    ),
    Column(
        "bound_s_per_100_tokens",
        pa.float64(),
        "s",
        "Seconds per 100 tokens that no engine can undercut, by the roofline, with the model and "
        "the GPUs of servegrid's tables; null if these lack the model or the GPU, on a CPU, and "
        "if prompts share a prefix cache",
    ),
    Column(
        "measured_over_bound",
        pa.float64(),
        "",
        "seconds_per_100_tokens / bound_s_per_100_tokens; null if outputs may stop early",
    ),
    Column(
        "achieved_bandwidth_gb_s",
        pa.float64(),
        "GB/s",
        "The bytes that the workload has to read at least (weights and KV cache) / its time, over "
        "all GPUs",
    ),
    Column(
        "achieved_tflops",
        pa.float64(),
        "TFLOP/s",
        "The operations that the workload needs at least / its time, over all GPUs",
    ),
    Column(
        "predicted_over_measured",
        pa.float64(),
        "",
        "Seconds that servegrid predicts from published tables / measured seconds; null if its "
        "tables lack the model or the GPU, and on a CPU",
    ),
    Column(
        "window_s",
        pa.float64(),
        "s",
        "Length of the window that the metrics are computed from: the makespan (burst, profile, "
        "trace), else the stationary part; null if there is none",
    ),
    Column(
        "requests_in_window",
        pa.int32(),
        "requests",
        "Requests from which the latencies are computed: those that succeeded and, unless burst, "
        "ended in the window",
    ),
    Column("in_flight_mean", pa.float64(), "requests", "Requests in flight, mean over the window"),
    *_latencies(
        "ttft",
        "Time to first token: from sending the request (open loops: from its due time) to the "
        "first token",
    ),
    *_latencies(
        "ttft_from_sent",
        "Time to first token from sending the request; differs from ttft for open loops only",
    ),
    *_latencies(
        "tpot",
        "Time per output token after the first: (e2el - ttft) / (tokens - 1), with the tokens that "
        "came, by the server's count and without a reasoning that the server keeps to itself; a "
        "response of one token has none",
    ),
    *_latencies(
        "itl",
        "Inter-token latency: time between two chunks with tokens, divided by the tokens of the "
        "later chunk. Requests with more than 1.1 tokens per chunk are left out if only the total "
        "of their tokens is known",
    ),
    *_latencies(
        "itl_per_chunk",
        "Time between two chunks with tokens, not divided by their tokens: what `vllm bench` "
        "calls itl",
    ),
    Column(
        "itl_max_s_p50",
        pa.float64(),
        "s",
        "The longest inter-token latency of each request: median over the requests",
    ),
    *_latencies(
        "e2el",
        "End-to-end latency: from sending the request (open loops: from its due time) to the last "
        "token",
    ),
    Column(
        "coalesced_chunk_fraction",
        pa.float64(),
        "0 to 1",
        "Fraction of the chunks with tokens that were read together with the previous chunk and "
        "have the same time stamp. With speculative decoding, llama.cpp sends the tokens of a step "
        "at one time, in one chunk each",
    ),
    Column(
        "output_tokens_per_s",
        pa.float64(),
        "tokens/s",
        "Output tokens of all users that arrived in the window / window_s",
    ),
    Column(
        "output_tokens_per_s_per_user",
        pa.float64(),
        "tokens/s",
        "output_tokens_per_s / concurrency (with think time: / in_flight_mean): the token rate of "
        "one user, including the time to first token; null for open loops",
    ),
    Column(
        "goodput_requests_per_s",
        pa.float64(),
        "requests/s",
        "Requests that met the SLO of the study, each by itself / window_s. A response that "
        "stopped early counts as one request; its token rate is that of the tokens that came. If "
        "the study has several SLO classes, this is for the first; the table `slo` has all",
    ),
    Column(
        "slo_attainment",
        pa.float64(),
        "0 to 1",
        "Fraction: requests that met the SLO / requests that ended in the window or failed. If the "
        "study has several SLO classes, this is for the first; the table `slo` has all",
    ),
    Column(
        "memory_peak_bytes",
        pa.int64(),
        "bytes",
        "Peak memory: the sum over all GPUs, or over the engine's processes if there is no GPU",
    ),
    Column(
        "power_w_mean",
        pa.float64(),
        "W",
        "Mean power of all GPUs, from their energy counters; null if the counters' first and last "
        "step are less than energy_needs_s apart. From power samples if a GPU has no counter",
    ),
    Column(
        "energy_needs_s",
        pa.float64(),
        "s",
        "Time from the first to the last step of the energy counters that makes them exact to 2%, "
        "because a step is detected up to one sample late",
    ),
    Column(
        "power_disagreement",
        pa.float64(),
        "",
        "Power from samples / power from energy counters - 1; null if one of them is unknown",
    ),
    Column(
        "power_suspect",
        pa.bool_(),
        "",
        "True if power_disagreement is above 10% or below -10%. Then use power and energy "
        "with care. Null if power_disagreement is null",
    ),
    Column(
        "energy_j_per_output_token",
        pa.float64(),
        "J/token",
        "power_w_mean / output_tokens_per_s",
    ),
    Column("gpu_utilization_mean", pa.float64(), "0 to 1", "Mean utilization of all GPUs"),
    Column("gpu_temperature_c_max", pa.int32(), "°C", "Highest temperature of all GPUs"),
    Column("sm_clock_mhz_min", pa.int32(), "MHz", "Lowest multiprocessor clock of all GPUs"),
    Column("sm_clock_mhz_max", pa.int32(), "MHz", "Highest multiprocessor clock of all GPUs"),
    Column(
        "server_ttft_s_mean",
        pa.float64(),
        "s",
        "Time to first token, measured by the server, mean over all requests",
    ),
    Column(
        "server_itl_s_mean",
        pa.float64(),
        "s",
        "Inter-token latency, measured by the server, mean over all requests; with speculative "
        "decoding, vLLM measures the time of a step, which can have several tokens",
    ),
    Column(
        "server_queue_s_mean",
        pa.float64(),
        "s",
        "Time in the server's queue, measured by the server, mean over all requests",
    ),
    Column(
        "server_e2el_s_mean",
        pa.float64(),
        "s",
        "End-to-end latency, measured by the server, mean over all requests",
    ),
    Column(
        "ttft_client_overhead_s",
        pa.float64(),
        "s",
        "Time from sending a request to its first token, mean over all requests, minus "
        "server_ttft_s_mean, i.e. the time of network, HTTP and client; null if the server saw a "
        "different number of requests",
    ),
    Column(
        "running_mean",
        pa.float64(),
        "requests",
        "Requests running in the server, mean over the samples in the window",
    ),
    Column(
        "waiting_mean",
        pa.float64(),
        "requests",
        "Requests in the server's queue, mean over the samples in the window",
    ),
    Column(
        "waiting_max",
        pa.int32(),
        "requests",
        "Requests in the server's queue, maximum in the window",
    ),
    Column(
        "kv_cache_usage_max",
        pa.float64(),
        "0 to 1",
        "Fraction of the server's KV cache in use, maximum in the window",
    ),
    Column("preemptions", pa.int64(), "", "Preemptions during the workload"),
    Column(
        "prefix_hit_tokens",
        pa.int64(),
        "tokens",
        "Prompt tokens that the server found in its prefix cache",
    ),
    Column(
        "client_arrival_error_s_p99",
        pa.float64(),
        "s",
        "Client timing error in the calibration: time stamp of a chunk minus the time at which "
        "the mock server sent it; 99th percentile",
    ),
    Column(
        "client_ttft_error_s_p50",
        pa.float64(),
        "s",
        "Client timing error in the calibration: ttft minus the mock server's; median. It "
        "includes the time in which the mock server reads all simultaneous requests",
    ),
    Column(
        "client_itl_error_s_p99",
        pa.float64(),
        "s",
        "Client timing error in the calibration: itl minus the mock server's; 99th percentile",
    ),
    Column(
        "client_headroom",
        pa.float64(),
        "",
        "Chunks/s that the client can receive according to the calibration / chunks/s of this "
        "trial",
    ),
    Column("spec_digest", pa.string(), "", "Digest of the trial's specification"),
    Column(
        "burstiness",
        pa.float64(),
        "",
        "Shape of the gamma-distributed times between arrivals; null for other protocols",
    ),
    Column(
        "rate_fraction",
        pa.float64(),
        "",
        "request_rate / rate at saturation, with `request_rate: sweep`; otherwise null",
    ),
    Column(
        "source",
        pa.string(),
        "",
        "Where prompts and lengths come from: `text`, `random`, `file` or `trace`, and the first "
        "digits of the file's SHA-256; for conversations, also their turns; null if imported",
    ),
    Column(
        "prompt_tokens_mean",
        pa.float64(),
        "tokens",
        "Prompt tokens of a request, by the server's count: mean over requests_in_window",
    ),
    Column(
        "prefix_hit_rate",
        pa.float64(),
        "0 to 1",
        "Prompt tokens from the server's prefix cache / all prompt tokens that it looked up; null "
        "if the server does not report it",
    ),
    Column(
        "expected_prefix_hit_rate",
        pa.float64(),
        "0 to 1",
        "The hit rate of an unlimited prefix cache, from the starts that prompts share; null if "
        "prefix caching is off",
    ),
    *_latencies(
        "ttfo",
        "Time to first output token, as AIPerf calls it: as ttft, but to the first token of the "
        "answer, after the reasoning. Equal to ttft without a reasoning; null for completions. "
        "responses_without_answer have none",
    ),
    Column(
        "reasoning_tokens_mean",
        pa.float64(),
        "tokens",
        "Reasoning tokens of a response, by the server's count or by the chunks: mean over the "
        "requests in the window that report them. completion_tokens_mean includes them",
    ),
    Column(
        "responses_without_answer",
        pa.int32(),
        "requests",
        "Requests in the window whose response ended within the reasoning; null if no reasoning "
        "tokens are known",
    ),
    Column(
        "spec_decode_acceptance_rate",
        pa.float64(),
        "0 to 1",
        "Speculative decoding: accepted draft tokens / draft tokens, by the server's counters; "
        "null if it drafted none or does not report it",
    ),
    Column(
        "spec_decode_acceptance_length",
        pa.float64(),
        "tokens",
        "Speculative decoding: mean tokens of a step that had a draft, which is 1 + accepted "
        "draft tokens / drafts; null for llama.cpp, which does not count drafts",
    ),
    Column(
        "lora",
        pa.string(),
        "",
        "LoRA adapters that the requests name in turn, separated by commas; null if none",
    ),
)
"""One row per cell and trial, for cells and for drift checks."""
