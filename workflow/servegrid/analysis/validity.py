"""Whether a measured cell is valid, from its raw rows and its record. Pure.

A cell that was not served has a verdict instead. The rules follow from what makes a figure say
something else than it seems to: other tokens than asked, a cache, a queue, a late client, a
machine that throttled itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from servegrid.analysis import stationarity
from servegrid.analysis.client_error import client_headroom
from servegrid.analysis.metrics import during, in_flight_mean, stationary
from servegrid.analysis.stationarity import window_of
from servegrid.records.verdict import OK
from servegrid.study.grid import Trial
from servegrid.telemetry.counters import PREEMPTIONS, PREFIX_HITS, Names, increase

LAG_SHARE, LAG_S = 0.05, 0.010
"""By which share of an answer's time, or by how much, requests may be sent late."""
IN_FLIGHT_SHARE = 0.95
"""Of the users of a closed loop, that are always waiting for an answer."""
WAITING_SHARE = 0.05
"""Of the users of a closed loop, that may wait for the server to begin with their requests."""
DRIFT = 0.10
"""By which share the same load may be served faster or slower in one allocation."""
CLIENT_CPU_SHARE = 0.7
"""More of one core than that, and the client may have been what was measured."""
DISTORTION_SHARE, DISTORTION_S, ITL_DISTORTION_S = 0.05, 0.010, 0.001
"""By which share of ttft and of the time between tokens, or by how much, the client may err."""
HEADROOM = 2.0
"""Times the chunks of a cell that the client must be able to take in."""
CLOCK_DRIFT_S = 0.001
"""So much may the offset between the kernel's stamps and our clock change during a load."""
SLOWED = 0x08 | 0x20 | 0x40 | 0x80
"""NVML's reasons that say a GPU was slowed down against its will: hardware slowdown, software and
hardware thermal slowdown, power brake (nvml.h, nvmlClocksEventReasons)."""


@dataclass(frozen=True)
class Evidence:
    """What the rules look at. Tables have at least the columns REQUEST_COLUMNS and
    TELEMETRY_COLUMNS, a row per request and per sample.
    """

    record: Mapping[str, Any]
    requests: pa.Table
    telemetry: pa.Table
    drift: float | None = None
    """The drift of its allocation's drift checks; None if it is unknown."""

    @property
    def trial(self) -> Trial:
        return Trial.from_spec(self.record["spec"])

    def counted(self, names: Names) -> float | None:
        """How much a counter of the server has grown; None where it has none."""
        return increase(self.record["metrics_before"], self.record["metrics_after"], names)


@dataclass(frozen=True)
class Validity:
    """Whether a cell is valid, which rules it breaks, and the evidence for each of them.

    All are None where the cell was not served.
    """

    valid: bool | None
    invalid_rules: list[str] | None
    invalid_evidence: list[str] | None


REQUEST_COLUMNS = (
    *stationarity.COLUMNS,
    *("first_token_ns", "chunk_tokens", "prompt_tokens", "completion_tokens", "requested_tokens"),
)
TELEMETRY_COLUMNS = ("time_ns", "throttle_reasons", "waiting")


def check_validity(evidence: Evidence) -> Validity:
    """Check the cell against all RULES; a cell that was not served has its verdict instead."""
    if evidence.record["verdict"] != OK:
        return Validity(None, None, None)
    found = {name: rule(evidence) for name, (_, rule) in RULES.items()}
    broken = {name: detail for name, detail in found.items() if detail}
    return Validity(not broken, list(broken), list(broken.values()))


def _tokens(evidence: Evidence) -> str | None:
    rows, input_len = evidence.requests, evidence.trial.workload.input_len
    prompts = pc.unique(rows["prompt_tokens"]).to_pylist()
    as_text = evidence.record["client"].get("prompt_form", "ids") != "ids"
    if as_text and (len(prompts) != 1 or prompts[0] < input_len):
        return f"prompt_tokens are {prompts}: not always as many more than {input_len}"
    if not as_text and prompts != [input_len]:
        return f"prompt_tokens are {prompts} and not {input_len}"
    asked = rows["requested_tokens"].to_pylist()
    chunks = map(sum, rows["chunk_tokens"].to_pylist())
    for what, found in (
        ("counted by the server", rows["completion_tokens"].to_pylist()),
        ("in its chunks", chunks),
    ):
        wrong = sum(one != other for one, other in zip(found, asked, strict=True))
        if wrong:
            return f"{wrong} of {len(asked)} answers have not the tokens asked for, as {what}"
    return None


def _no_steady_state(evidence: Evidence) -> str | None:
    workload = evidence.trial.workload
    if workload.protocol == "burst":
        return None
    window = window_of(evidence.requests, workload)
    return window if isinstance(window, str) else None


def _too_few_in_flight(evidence: Evidence) -> str | None:
    workload = evidence.trial.workload
    if workload.protocol != "closed_loop" or workload.concurrency is None or workload.think_time_s:
        return None
    mean = in_flight_mean(evidence.requests, stationary(evidence.requests, workload), None)
    if mean is None or mean >= IN_FLIGHT_SHARE * workload.concurrency:
        return None
    return f"{mean:.1f} requests on average and not {workload.concurrency}"


def _prefix_cache(evidence: Evidence) -> str | None:
    hits = evidence.counted(PREFIX_HITS)
    if not hits or evidence.record["engine"].get("prefix_caching"):
        return None
    # What a template puts before each prompt is the same every time, and may be kept.
    added = evidence.record["client"].get("prompt_tokens_added") or 0
    beyond = hits - added * evidence.requests.num_rows
    return f"{hits:.0f} tokens came from it" if beyond > 0 else None


def _preempted(evidence: Evidence) -> str | None:
    count = evidence.counted(PREEMPTIONS)
    return f"{count:.0f} times, for want of KV cache" if count else None


def _queued(evidence: Evidence) -> str | None:
    trial, workload = evidence.trial, evidence.trial.workload
    seats = evidence.record["engine"].get("max_num_seqs") or trial.deployment.max_num_seqs
    if workload.concurrency is None:
        return None
    if workload.concurrency > seats:
        return f"max_num_seqs {seats} is less than concurrency {workload.concurrency}"
    window = stationary(evidence.requests, workload)
    if workload.protocol != "closed_loop" or window is None:
        return None
    waiting = pc.mean(during(evidence.telemetry, window)["waiting"]).as_py()
    if waiting is None or waiting <= WAITING_SHARE * workload.concurrency:
        return None
    return f"{waiting:.1f} of {workload.concurrency} requests waited in the server on average"


def _sent_late(evidence: Evidence) -> str | None:
    """A burst is meant to come at once; an open loop's latencies hold the lag; users of a closed
    loop are away for it."""
    rows = evidence.requests
    protocol = evidence.trial.workload.protocol
    lags = pc.subtract(rows["sent_ns"], rows["scheduled_ns"])
    end = "done_ns" if protocol == "closed_loop" else "first_token_ns"
    answer = pc.quantile(pc.subtract(rows[end], rows["sent_ns"]), 0.5)[0].as_py() / 1e9
    lag = (pc.max(lags) if protocol == "burst" else pc.mean(lags)).as_py() / 1e9
    if lag <= max(LAG_SHARE * answer, LAG_S):
        return None
    what = "e2el" if protocol == "closed_loop" else "ttft"
    how = "up to" if protocol == "burst" else "on average"
    return f"{how} {1e3 * lag:.1f} ms, with a median {what} of {1e3 * answer:.0f} ms"


def _client_busy(evidence: Evidence) -> str | None:
    client = evidence.record["client"]
    start_ns, end_ns = client["window_ns"]
    share = client["cpu_s_busiest"] / ((end_ns - start_ns) / 1e9)
    return f"{share:.0%} of a core while measuring" if share > CLIENT_CPU_SHARE else None


def _distorted(evidence: Evidence) -> str | None:
    check, rows = evidence.record["self_check"], evidence.requests
    if check is None:
        return None
    if "error" in check:
        return f"what the client distorts is not known: {check['error']}"
    if check["lost"]:
        return f"{check['lost']} of {check['requests']} requests were lost in the self-check"
    ttft, itl = (
        pc.quantile(pc.subtract(rows[end], rows[start]), 0.5)[0].as_py() / 1e9 / tokens
        for start, end, tokens in (
            ("sent_ns", "first_token_ns", 1),
            ("first_token_ns", "done_ns", max(evidence.trial.workload.output_len - 1, 1)),
        )
    )
    for what, error, of, least in (
        ("arrivals", check["arrival_error_s_p99"], ttft, DISTORTION_S),
        ("times between tokens", check["itl_error_s_p99"], itl, ITL_DISTORTION_S),
    ):
        if error is not None and error > max(DISTORTION_SHARE * of, least):
            return f"1% of {what} were wrong by {1e3 * error:.1f} ms and more in the self-check"
    headroom = client_headroom(evidence.record)
    if headroom is not None and headroom < HEADROOM:
        return f"the client can take in only {headroom:.1f} times the chunks of this cell"
    return None


def _clock(evidence: Evidence) -> str | None:
    client = evidence.record["client"]
    before, after = client.get("clock_offset_before_ns"), client.get("clock_offset_after_ns")
    if before is None or after is None or abs(after - before) <= CLOCK_DRIFT_S * 1e9:
        return None
    return f"the system's clock moved by {abs(after - before) / 1e6:.1f} ms"


def _slowed(evidence: Evidence) -> str | None:
    reasons = [each for each in evidence.telemetry["throttle_reasons"].to_pylist() if each]
    slowed = sum(bool(each & SLOWED) for each in reasons)
    return f"in {slowed} samples of its GPUs" if slowed else None


def _drifted(evidence: Evidence) -> str | None:
    if evidence.drift is None or evidence.drift <= DRIFT:
        return None
    return f"the drift checks of its allocation differed by {evidence.drift:.0%}"


Rule = Callable[[Evidence], str | None]

RULES: Mapping[str, tuple[str, Rule]] = {
    "tokens": (
        "Every request has exactly the tokens asked for, by the server's count; where prompts are "
        "sent as text, the server adds the same number of tokens to each",
        _tokens,
    ),
    "no_steady_state": (
        "A steady or poisson load has a stationary part; without, no figure is given",
        _no_steady_state,
    ),
    "too_few_in_flight": (
        f"Without think time, at least {IN_FLIGHT_SHARE:.0%} of a steady load's concurrency is in "
        "flight on average",
        _too_few_in_flight,
    ),
    "prefix_cache": (
        "No prompt came from a cache, unless the study asks for one; what the server adds to each "
        "may",
        _prefix_cache,
    ),
    "preempted": ("The server has not preempted requests for want of memory", _preempted),
    "server_queueing": (
        "The engine works on as many requests at once as are sent; of a steady load, on average "
        f"no more than {WAITING_SHARE:.0%} wait in the server",
        _queued,
    ),
    "sent_late": (
        f"No request of a burst was sent later than {LAG_SHARE:.0%} of the median ttft; on "
        f"average, none of a poisson load, and of a steady load none later than {LAG_SHARE:.0%} of "
        f"the median e2el. {1e3 * LAG_S:.0f} ms are always allowed",
        _sent_late,
    ),
    "client_busy": (
        f"No process of the client used more than {CLIENT_CPU_SHARE:.0%} of a core",
        _client_busy,
    ),
    "client_timing_error": (
        "In the self-check on the node nothing was lost, 99% of arrivals were right to "
        f"{DISTORTION_SHARE:.0%} of the cell's median ttft or {1e3 * DISTORTION_S:.0f} ms, and "
        f"times between tokens to {DISTORTION_SHARE:.0%} of the cell's or "
        f"{1e3 * ITL_DISTORTION_S:.0f} ms; the client can take in {HEADROOM:g} times its chunks",
        _distorted,
    ),
    "clock_step": (f"The clock did not move by more than {1e3 * CLOCK_DRIFT_S:.0f} ms", _clock),
    "gpu_throttled": ("No GPU was slowed down by heat or power brake", _slowed),
    "drifted": (
        f"The drift checks of its allocation differed by at most {DRIFT:.0%} in output tokens/s",
        _drifted,
    ),
}
"""The rules: what must hold, and what speaks against it (None: nothing)."""
