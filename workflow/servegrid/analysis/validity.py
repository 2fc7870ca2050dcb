"""Decides whether a measured cell is valid, from its raw rows and its record. Pure.

A cell that was not served has a verdict instead. Each rule excludes one reason for a misleading
value, such as a wrong token count, a cache, a queue, a late client, or a throttled GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from servegrid.analysis import buffering, stationarity
from servegrid.analysis.client_error import client_headroom
from servegrid.analysis.metrics import in_flight_mean, samples_in, stationary_window
from servegrid.analysis.server_metrics import expected_hits
from servegrid.analysis.stationarity import find_window
from servegrid.records.parquet import column_or_null
from servegrid.records.verdict import was_served
from servegrid.study.grid import Trial
from servegrid.telemetry.counters import (
    FINISHED,
    GENERATED_TOKENS,
    PREEMPTIONS,
    PREFIX_HITS,
    PROMPT_TOKENS,
    Names,
    increase,
)

MAX_LATENESS, MIN_LATENESS_S = 0.05, 0.010
"""Requests may be sent late by this fraction of the latency, and always by this many seconds."""
MIN_IN_FLIGHT = 0.95
"""The fraction of a closed loop's concurrency that must be in flight, as a mean."""
MAX_WAITING = 0.05
"""The fraction of a closed loop's concurrency that may wait in the server's queue, as a mean."""
MAX_FOREIGN_LOAD = 0.01
"""The fraction by which the server may have worked more than for this cell."""
MAX_UNEXPECTED_HITS = 0.02
"""The fraction of the prompt tokens that may come from the prefix cache unexpectedly."""
MAX_DRIFT = 0.10
"""The drift that the drift checks of an allocation may show."""
MAX_CLIENT_CPU = 0.7
"""The share of a core that a client process may use. With more, the client may be the limit."""
MAX_TIMING_ERROR, MIN_ARRIVAL_ERROR_S, MIN_ITL_ERROR_S = 0.05, 0.010, 0.001
"""The client's arrival times may be wrong by this fraction of ttft, its inter-token latencies by
this fraction of itl; this many seconds are always allowed."""
MIN_HEADROOM = 2.0
"""How many times the chunks of the cell the client must be able to receive."""
MAX_CLOCK_STEP_S = 0.001
"""The change that the offset between the kernel's and the client's clock may show."""
THROTTLED = 0x08 | 0x20 | 0x40 | 0x80
"""NVML's reasons for a GPU that is slowed down: hardware slowdown, software thermal slowdown,
hardware thermal slowdown, power brake (nvml.h, nvmlClocksEventReasons)."""


@dataclass(frozen=True)
class Evidence:
    """The input of the rules: the record, and tables with one row per request and per sample.

    The tables have at least the columns REQUEST_COLUMNS and TELEMETRY_COLUMNS. `drift` is the drift
    of the allocation's drift checks; None if it is unknown.
    """

    record: Mapping[str, Any]
    requests: pa.Table
    telemetry: pa.Table
    drift: float | None = None

    @property
    def trial(self) -> Trial:
        """The trial that was measured."""
        return Trial.from_spec(self.record["spec"])

    def counter_increase(self, names: Names) -> float | None:
        """The increase of a counter of the server; None if the server does not have it."""
        return increase(self.record["metrics_before"], self.record["metrics_after"], names)


@dataclass(frozen=True)
class Validity:
    """Whether a cell is valid, the rules that it breaks, and the evidence for each of them.

    All are None if the cell was not served.
    """

    valid: bool | None
    invalid_rules: list[str] | None
    invalid_evidence: list[str] | None


REQUEST_COLUMNS = (
    *stationarity.REQUEST_COLUMNS,
    *buffering.REQUEST_COLUMNS,
    *("first_token_ns", "chunk_tokens", "prompt_tokens", "completion_tokens", "requested_tokens"),
    *("sent_tokens", "shared_tokens", "reasoning_tokens"),
)
"""The columns of `columns.REQUESTS` that the rules need."""
TELEMETRY_COLUMNS = ("time_ns", "throttle_reasons", "waiting")
"""The columns of `columns.TELEMETRY` that the rules need."""


def check_validity(evidence: Evidence) -> Validity:
    """Check all RULES. A cell that was not served is neither valid nor invalid."""
    if not was_served(evidence.record["verdict"]):
        return Validity(None, None, None)
    details = {name: rule.check(evidence) for name, rule in RULES.items()}
    broken = {name: detail for name, detail in details.items() if detail}
    return Validity(not broken, list(broken), list(broken.values()))


def _check_tokens(evidence: Evidence) -> str | None:
    rows = evidence.requests
    if (wrong_prompts := _check_prompt_tokens(evidence)) is not None:
        return wrong_prompts
    counted, requested = (
        rows[name].to_pylist() for name in ("completion_tokens", "requested_tokens")
    )
    exact = evidence.trial.deployment.output_len_exact
    in_chunks = list(map(sum, rows["chunk_tokens"].to_pylist()))
    for counts, expected, may_be_fewer, source in (
        (counted, requested, not exact, "by the server's count"),
        (in_chunks, requested if exact else counted, False, "by the count of the chunks"),
    ):
        wrong = sum(
            not (0 < one <= other if may_be_fewer else one == other)
            for one, other in zip(counts, expected, strict=True)
        )
        if wrong:
            return f"{wrong} of {len(counts)} responses have a wrong number of tokens, {source}"
    thought = column_or_null(rows, "reasoning_tokens").to_pylist()
    wrong = sum((part or 0) > whole for part, whole in zip(thought, counted, strict=True))
    if wrong:
        return f"{wrong} of {len(counted)} responses have more reasoning tokens than output tokens"
    return None


def _check_prompt_tokens(evidence: Evidence) -> str | None:
    rows, workload = evidence.requests, evidence.trial.workload
    as_text = evidence.record["client"].get("prompt_form", "ids") != "ids"
    if not workload.has_fixed_lengths:
        return _check_sent_tokens(rows, as_text)
    prompts, input_len = pc.unique(rows["prompt_tokens"]).to_pylist(), workload.input_len
    if as_text and (len(prompts) != 1 or prompts[0] < input_len):
        return f"prompt_tokens are {prompts}, expected one value of at least {input_len}"
    if not as_text and prompts != [input_len]:
        return f"prompt_tokens are {prompts}, expected {input_len}"
    return None


def _check_sent_tokens(rows: pa.Table, as_text: bool) -> str | None:
    """Prompts of different lengths: each has the tokens that were sent; as text, at least these."""
    counted, sent = (rows[name].to_pylist() for name in ("prompt_tokens", "sent_tokens"))
    wrong = [
        (one, other)
        for one, other in zip(counted, sent, strict=True)
        if one is None or other is None or one < other or (one > other and not as_text)
    ]
    if not wrong:
        return None
    least = "at least " if as_text else ""
    return (
        f"{len(wrong)} of {len(sent)} prompts have a wrong number of tokens: the server counted "
        f"{wrong[0][0]}, expected {least}{wrong[0][1]}"
    )


def _check_steady_state(evidence: Evidence) -> str | None:
    workload = evidence.trial.workload
    if not workload.has_stationary_part:
        return None
    window = find_window(evidence.requests, workload)
    return window if isinstance(window, str) else None


def _check_in_flight(evidence: Evidence) -> str | None:
    workload = evidence.trial.workload
    if workload.protocol != "closed_loop" or workload.concurrency is None or workload.think_time_s:
        return None
    window = stationary_window(evidence.requests, workload)
    mean = in_flight_mean(evidence.requests, window, None)
    if mean is None or mean >= MIN_IN_FLIGHT * workload.concurrency:
        return None
    return f"on average, {mean:.1f} requests were in flight, at concurrency {workload.concurrency}"


def _check_prefix_cache(evidence: Evidence) -> str | None:
    hits = evidence.counter_increase(PREFIX_HITS)
    if not hits:
        return None
    # The server may cache what its template adds, because that is the same for every prompt.
    added = evidence.record["client"].get("prompt_tokens_added") or 0
    more = hits - added * evidence.requests.num_rows
    if evidence.record["engine"].get("prefix_caching"):
        expected = expected_hits(evidence.record, evidence.requests)
        total = pc.sum(evidence.requests["prompt_tokens"]).as_py() or 0
        if expected is None or more <= expected + MAX_UNEXPECTED_HITS * total:
            return None
        return (
            f"{hits:.0f} prompt tokens came from the prefix cache, but prompts share only "
            f"{expected}"
        )
    return f"{hits:.0f} prompt tokens came from the prefix cache" if more > 0 else None


def _check_preemptions(evidence: Evidence) -> str | None:
    count = evidence.counter_increase(PREEMPTIONS)
    return f"{count:.0f} preemptions" if count else None


def _check_queue(evidence: Evidence) -> str | None:
    trial, workload = evidence.trial, evidence.trial.workload
    max_num_seqs = evidence.record["engine"].get("max_num_seqs") or trial.deployment.max_num_seqs
    if workload.concurrency is None:
        return None
    copies = evidence.record["engine"].get("data_parallel_size") or 1
    if workload.concurrency > max_num_seqs * copies:
        of_each = f" of each of {copies} replicas" if copies > 1 else ""
        return (
            f"max_num_seqs {max_num_seqs}{of_each} is less than concurrency {workload.concurrency}"
        )
    window = stationary_window(evidence.requests, workload)
    if workload.protocol != "closed_loop" or window is None:
        return None
    waiting = pc.mean(samples_in(evidence.telemetry, window)["waiting"]).as_py()
    if waiting is None or waiting <= MAX_WAITING * workload.concurrency:
        return None
    return f"on average, {waiting:.1f} of {workload.concurrency} requests waited in the server"


def _check_foreign_load(evidence: Evidence) -> str | None:
    """Requests of others count when they end, and their tokens already before."""
    rows = evidence.requests
    for own, names, what in (
        (rows.num_rows, FINISHED, "finished {:.0f} requests"),
        (pc.sum(rows["prompt_tokens"]).as_py(), PROMPT_TOKENS, "processed {:.0f} prompt tokens"),
        (pc.sum(rows["completion_tokens"]).as_py(), GENERATED_TOKENS, "generated {:.0f} tokens"),
    ):
        counted = evidence.counter_increase(names)
        if own and counted is not None and counted > own * (1 + MAX_FOREIGN_LOAD):
            return f"the server {what.format(counted)}, but only {own} were for this cell"
    return None


def _check_lateness(evidence: Evidence) -> str | None:
    """A burst must be simultaneous, so its maximum counts. The latencies of poisson include the
    lateness. A late user of a closed loop is missing from the load."""
    rows = evidence.requests
    protocol = evidence.trial.workload.protocol
    lateness = pc.subtract(rows["sent_ns"], rows["scheduled_ns"])
    end = "done_ns" if protocol == "closed_loop" else "first_token_ns"
    latency_s = pc.quantile(pc.subtract(rows[end], rows["sent_ns"]), 0.5)[0].as_py() / 1e9
    late_s = (pc.max(lateness) if protocol == "burst" else pc.mean(lateness)).as_py() / 1e9
    if late_s <= max(MAX_LATENESS * latency_s, MIN_LATENESS_S):
        return None
    how = "up to" if protocol == "burst" else "on average"
    name = "e2el" if protocol == "closed_loop" else "ttft"
    return (
        f"requests were sent {how} {1e3 * late_s:.1f} ms late, with a median {name} of "
        f"{1e3 * latency_s:.0f} ms"
    )


def _check_client_cpu(evidence: Evidence) -> str | None:
    client = evidence.record["client"]
    start_ns, end_ns = client["window_ns"]
    share = client["cpu_s_busiest"] / ((end_ns - start_ns) / 1e9)
    return f"a client process used {share:.0%} of a core" if share > MAX_CLIENT_CPU else None


def _check_timing_error(evidence: Evidence) -> str | None:
    calibration, rows = evidence.record["calibration"], evidence.requests
    if calibration is None:
        return None
    if "error" in calibration:
        return f"the calibration failed: {calibration['error']}"
    if calibration["lost"]:
        return f"{calibration['lost']} of {calibration['requests']} calibration requests failed"
    # As many as requested, or fewer if responses may stop early.
    tokens = pc.mean(rows["completion_tokens"]).as_py()
    ttft, itl = (
        pc.quantile(pc.subtract(rows[end], rows[start]), 0.5)[0].as_py() / 1e9 / gaps
        for start, end, gaps in (
            ("sent_ns", "first_token_ns", 1),
            ("first_token_ns", "done_ns", max(tokens - 1, 1)),
        )
    )
    for name, error, latency, minimum in (
        ("arrival times", calibration["arrival_error_s_p99"], ttft, MIN_ARRIVAL_ERROR_S),
        ("inter-token latencies", calibration["itl_error_s_p99"], itl, MIN_ITL_ERROR_S),
    ):
        if error is not None and error > max(MAX_TIMING_ERROR * latency, minimum):
            return f"1% of the {name} in the calibration are wrong by {1e3 * error:.1f} ms or more"
    headroom = client_headroom(evidence.record)
    if headroom is not None and headroom < MIN_HEADROOM:
        return f"the client can receive only {headroom:.1f} times the chunks/s of this cell"
    return None


def _check_buffering(evidence: Evidence) -> str | None:
    return buffering.held_back(evidence.record, evidence.requests)


def _check_clock(evidence: Evidence) -> str | None:
    client = evidence.record["client"]
    before, after = client.get("clock_offset_before_ns"), client.get("clock_offset_after_ns")
    if before is None or after is None or abs(after - before) <= MAX_CLOCK_STEP_S * 1e9:
        return None
    return f"the system clock moved by {abs(after - before) / 1e6:.1f} ms"


def _check_throttling(evidence: Evidence) -> str | None:
    samples = [each for each in evidence.telemetry["throttle_reasons"].to_pylist() if each]
    throttled = sum(bool(reasons & THROTTLED) for reasons in samples)
    return f"GPUs were throttled in {throttled} samples" if throttled else None


def _check_network(evidence: Evidence) -> str | None:
    wanted, engine = evidence.trial.deployment.network, evidence.record["engine"]
    if wanted is None or "nodes" not in engine:
        return None
    links = (engine.get("network") or {}).get("links")
    if not links:
        return f"it is not known which network the nodes used; the study demands {wanted}"
    used = [
        f"{link['transport']} ({link['interface'] or 'unknown interface'})"
        for link in links
        if link["transport"] != wanted
    ]
    return f"the nodes used {', '.join(dict.fromkeys(used))}, not {wanted} only" if used else None


def _check_drift(evidence: Evidence) -> str | None:
    if evidence.drift is None or evidence.drift <= MAX_DRIFT:
        return None
    return f"output tokens/s of the drift checks differ by {evidence.drift:.0%}"


class Rule(NamedTuple):
    """What must hold, and a check that returns the evidence against it, or None."""

    requirement: str
    check: Callable[[Evidence], str | None]


RULES: Mapping[str, Rule] = {
    "tokens": Rule(
        "Every request has exactly the requested number of prompt and output tokens, by the "
        "server's count. If prompts are sent as text, the server may add tokens: the same number "
        "to every prompt, unless prompts differ in length. If output_len_exact is false, a "
        "response may have fewer output tokens, but at least one. Reasoning tokens are part of the "
        "output tokens",
        _check_tokens,
    ),
    "no_steady_state": Rule(
        "A closed_loop, poisson or gamma workload has a stationary part. Without it, it has no "
        "metrics",
        _check_steady_state,
    ),
    "too_few_in_flight": Rule(
        f"In a closed loop without think time, at least {MIN_IN_FLIGHT:.0%} of the concurrency is "
        "in flight on average",
        _check_in_flight,
    ),
    "prefix_cache": Rule(
        "Unless the study enables it, no prompt token came from the prefix cache. Tokens that the "
        "server adds to every prompt may come from the cache. If the study enables it and says "
        "which prompts share a start, at most "
        f"{MAX_UNEXPECTED_HITS:.0%} of the prompt tokens came from it beyond these",
        _check_prefix_cache,
    ),
    "preempted": Rule("The server did not preempt any request", _check_preemptions),
    "server_queueing": Rule(
        "The engine can run as many requests at the same time as the concurrency. In a closed "
        f"loop, at most {MAX_WAITING:.0%} of the concurrency waits in the server's queue on "
        "average",
        _check_queue,
    ),
    "foreign_load": Rule(
        "The server worked for this cell only: by its counters, it finished at most "
        f"{MAX_FOREIGN_LOAD:.0%} more requests and processed and generated at most "
        f"{MAX_FOREIGN_LOAD:.0%} more tokens",
        _check_foreign_load,
    ),
    "sent_late": Rule(
        f"The client sends on time. The limit is {MAX_LATENESS:.0%} of the median ttft "
        f"(closed_loop: e2el), but at least {1e3 * MIN_LATENESS_S:.0f} ms. It holds for every "
        "request of a burst, and for the mean over the requests of the other protocols",
        _check_lateness,
    ),
    "client_busy": Rule(
        f"No process of the client used more than {MAX_CLIENT_CPU:.0%} of a core",
        _check_client_cpu,
    ),
    "client_timing_error": Rule(
        "No request of the node's calibration failed. 99% of its arrival times are correct within "
        f"{MAX_TIMING_ERROR:.0%} of the cell's median ttft (at least "
        f"{1e3 * MIN_ARRIVAL_ERROR_S:.0f} ms), and 99% of its inter-token latencies within "
        f"{MAX_TIMING_ERROR:.0%} of the cell's (at least {1e3 * MIN_ITL_ERROR_S:.0f} ms). The "
        f"client can receive {MIN_HEADROOM:g} times the chunks/s of the cell",
        _check_timing_error,
    ),
    "buffered": Rule(
        "Nothing between the server and the client holds tokens back: at most "
        f"{buffering.MAX_COALESCED:.0%} of the chunks are read together with the previous one, "
        "without those of accepted draft tokens, which llama.cpp sends at one time "
        f"(unless they follow each other within {1e3 * buffering.MIN_CHUNK_S:.0f} ms), and at most "
        f"{buffering.MAX_WHOLE:.0%} of the responses arrive in one piece with "
        f"{buffering.MIN_TOKENS} or more tokens. Otherwise the cell has no ttft, tpot and itl; "
        "e2el and tokens/s stay",
        _check_buffering,
    ),
    "clock_step": Rule(
        f"The system clock did not move by more than {1e3 * MAX_CLOCK_STEP_S:.0f} ms",
        _check_clock,
    ),
    "gpu_throttled": Rule(
        "No GPU was throttled by a hardware, thermal or power brake slowdown", _check_throttling
    ),
    "drifted": Rule(
        f"The output tokens/s of the allocation's drift checks differ by at most {MAX_DRIFT:.0%}",
        _check_drift,
    ),
    "wrong_network": Rule(
        "If the deployment has the key `network`, an engine on several nodes used this network "
        "between them, and no other one",
        _check_network,
    ),
}
"""The rules of validity by name."""
