"""Whether a measured cell may be believed, told from its raw rows and its record. Pure.

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

from servegrid.grid import Trial
from servegrid.verdict import OK

LAG_SHARE, LAG_S = 0.05, 0.010
"""A request may be sent late by this share of the median time to first token, or by so much."""
CLIENT_CPU_SHARE = 0.7
"""More of one core than that, and the client may have been what was measured."""
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

    @property
    def trial(self) -> Trial:
        return Trial.from_spec(self.record["spec"])

    def counted(self, name: str) -> float | None:
        """How much a counter of the server has grown; None where it has none."""
        before, after = self.record["metrics_before"], self.record["metrics_after"]
        if not before or not after or name not in before or name not in after:
            return None
        return float(after[name] - before[name])


REQUEST_COLUMNS = (
    *("sent_ns", "first_token_ns", "scheduled_ns", "chunk_tokens"),
    *("prompt_tokens", "completion_tokens"),
)
TELEMETRY_COLUMNS = ("throttle_reasons",)


def certificate(evidence: Evidence) -> tuple[bool | None, str | None]:
    """Whether the cell may be believed, and which rules speak against it, with their evidence.

    Both are null where the cell was not served: its verdict says why.
    """
    if evidence.record["verdict"] != OK:
        return None, None
    found = {name: rule(evidence) for name, (_, rule) in RULES.items()}
    broken = [f"{name}: {detail}" for name, detail in found.items() if detail]
    return not broken, "; ".join(broken) or None


def _tokens(evidence: Evidence) -> str | None:
    load, rows = evidence.trial.load, evidence.requests
    for column, asked in (
        ("prompt_tokens", load.input_len),
        ("completion_tokens", load.output_len),
    ):
        found = pc.unique(rows[column]).to_pylist()
        if found != [asked]:
            return f"{column} are {found} and not {asked}"
    chunks = [sum(each) for each in rows["chunk_tokens"].to_pylist()]
    if set(chunks) != {load.output_len}:
        return f"chunks carry {min(chunks)} to {max(chunks)} tokens and not {load.output_len}"
    return None


def _prefix_cache(evidence: Evidence) -> str | None:
    hits = evidence.counted("vllm:prefix_cache_hits_total")
    asked = evidence.record["engine"].get("prefix_caching")
    return f"{hits:.0f} tokens came from it" if hits and not asked else None


def _preempted(evidence: Evidence) -> str | None:
    count = evidence.counted("vllm:num_preemptions_total")
    return f"{count:.0f} times, for want of KV cache" if count else None


def _queued(evidence: Evidence) -> str | None:
    trial = evidence.trial
    seats = evidence.record["engine"].get("max_num_seqs") or trial.deployment.max_num_seqs
    if trial.load.concurrency <= seats:
        return None
    return f"max_num_seqs {seats} is less than concurrency {trial.load.concurrency}"


def _sent_late(evidence: Evidence) -> str | None:
    rows = evidence.requests
    lag = pc.max(pc.subtract(rows["sent_ns"], rows["scheduled_ns"])).as_py() / 1e9
    ttft = pc.quantile(pc.subtract(rows["first_token_ns"], rows["sent_ns"]), 0.5)[0].as_py() / 1e9
    limit = max(LAG_SHARE * ttft, LAG_S)
    if lag <= limit:
        return None
    return f"up to {1e3 * lag:.1f} ms, with a median ttft of {1e3 * ttft:.0f} ms"


def _client_busy(evidence: Evidence) -> str | None:
    client = evidence.record["client"]
    start_ns, end_ns = client["window_ns"]
    share = client["cpu_s"] / ((end_ns - start_ns) / 1e9)
    return f"{share:.0%} of a core while measuring" if share > CLIENT_CPU_SHARE else None


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


Rule = Callable[[Evidence], str | None]

RULES: Mapping[str, tuple[str, Rule]] = {
    "tokens": ("Every request has exactly the tokens asked for, by the server's count", _tokens),
    "prefix_cache": ("No prompt came from a cache, unless the study asks for one", _prefix_cache),
    "preempted": ("The server has not preempted requests for want of memory", _preempted),
    "queued": ("The engine works on as many requests at once as are sent", _queued),
    "sent_late": (
        f"No request was sent later than {LAG_SHARE:.0%} of the median ttft, or "
        f"{1e3 * LAG_S:.0f} ms",
        _sent_late,
    ),
    "client_busy": (f"The client used at most {CLIENT_CPU_SHARE:.0%} of a core", _client_busy),
    "clock": (f"The clock did not move by more than {1e3 * CLOCK_DRIFT_S:.0f} ms", _clock),
    "slowed": ("No GPU was slowed down by heat or power brake", _slowed),
}
"""The rules: what must hold, and what speaks against it (None: nothing)."""
