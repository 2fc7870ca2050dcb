"""The verdict of a trial: how its workload was served, or why it was not, with the evidence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

OK, QUEUED, PREEMPTED = "ok", "queued", "preempted"
OOM_AT_START, OOM, SERVER_DIED = "oom_at_start", "oom", "server_died"
HTTP_ERROR, TIMEOUT, WRONG_TOKENS = "http_error", "timeout", "wrong_tokens"
UNSUPPORTED, NOT_RUN = "unsupported", "not_run"

MAX_WAITING_SHARE = 0.05
"""Requests may spend this share of their time in the server's queue before they count as queued."""
MIN_FAILED_SHARE = 0.5
"""From this share of failed requests on, an HTTP error or a timeout shows that a load is too heavy.
Fewer can have another cause, such as one lost connection."""

VERDICTS = {
    OK: "Every response has exactly the requested number of tokens; if output_len_exact is false, "
    "at least one and at most the requested number",
    QUEUED: "Served as `ok`, but by the server's own counters the requests spent more than "
    f"{MAX_WAITING_SHARE:.0%} of their time in its queue",
    PREEMPTED: "Served as `ok`, but the server preempted requests, because its KV cache was full",
    HTTP_ERROR: "Requests failed: no connection, an HTTP error or an incomplete response",
    TIMEOUT: "Requests exceeded `timeout_s` or `idle_timeout_s`",
    WRONG_TOKENS: "The server reported a different number of tokens than requested, or none; if "
    "output_len_exact is false, more than requested, or none",
    OOM: "The engine ran out of memory during the workload, by its own message",
    SERVER_DIED: "The engine died during the workload, and again after a restart",
    OOM_AT_START: "The engine cannot start: the weights, or the KV cache of one request, do not "
    "fit into the memory",
    UNSUPPORTED: "The model, the GPU or the engine cannot do this, whatever the load: for example "
    "prompt and output are longer than max_model_len",
    NOT_RUN: "The workload was not tried. verdict_detail says why: it is `dominated by` a lighter "
    "workload that was not served, or `not needed by the search` (`grid: frontier`). Its record "
    "has no requests",
}
"""The verdicts and their meanings."""

SERVED = frozenset({OK, QUEUED, PREEMPTED})
"""The verdicts of workloads that were served: they have metrics."""

_VERDICT_OF_ERROR = {
    "timeout": TIMEOUT,
    "stalled": TIMEOUT,
    "usage_missing": WRONG_TOKENS,
    "wrong_prompt_tokens": WRONG_TOKENS,
    "wrong_completion_tokens": WRONG_TOKENS,
}
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory", re.IGNORECASE)
_GIB = r"([\d.]+) GiB"
_MEMORY_FIGURES = {
    "tried_gib": rf"[Tt]ried to allocate {_GIB}",
    "total_gib": rf"total capacity of {_GIB}",
    "free_gib": rf"of which {_GIB} is free",
    "kv_needed_gib": rf"\(?{_GIB} KV\s+cache is needed",
    "kv_available_gib": rf"available KV cache memory \({_GIB}\)",
    "max_model_len": r"max seq len \((\d+)\)",
    "kv_capacity_tokens": r"stored in KV cache \((\d+)\)",
}
"""Numbers in the memory errors of torch and of vLLM 0.10 to 0.32."""


@dataclass(frozen=True)
class Verdict:
    """One of VERDICTS. `detail` is a text for people, `evidence` has its numbers and names.

    `detail` is None and `evidence` is empty if the verdict is `ok`. The evidence of `not_run` has a
    `reason`; further keys depend on it.
    """

    name: str
    detail: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """The three keys of a trial's record."""
        return {
            "verdict": self.name,
            "verdict_detail": self.detail,
            "verdict_evidence": dict(self.evidence),
        }


def was_served(verdict: str) -> bool:
    """Whether a workload with this verdict was served, so that it has metrics."""
    return verdict in SERVED


def shows_overload(verdict: str, evidence: Mapping[str, Any]) -> bool:
    """Whether a record with this verdict shows that no heavier load can be served, either.

    Wrong tokens do not depend on the load, and a load that was not tried shows nothing.
    """
    if verdict in (HTTP_ERROR, TIMEOUT):
        return bool(evidence.get("failed_share", 0.0) >= MIN_FAILED_SHARE)
    return verdict in (OOM, SERVER_DIED, OOM_AT_START, UNSUPPORTED)


def decide_verdict(
    errors: Iterable[str | None],
    engine_alive: bool,
    strain: Mapping[str, float] | None = None,
    death: str | None = None,
) -> Verdict:
    """The verdict about a workload that was tried.

    `errors` has one entry per request: None if it succeeded, else `kind: detail`. The most
    frequent verdict of a request decides; if two are equally frequent, the earlier one does.
    `strain` are numbers of the server's own metrics, see `telemetry.strain`. `death` is what the
    engine logged when it died. If it or a request says so, the engine ran out of memory.
    """
    outcomes = list(errors)
    failures = [error for error in outcomes if error is not None]
    if engine_alive and not failures:
        return _decide_served(strain or {})
    detail = _describe(failures, len(outcomes))
    evidence: dict[str, Any] = {"failed_share": round(len(failures) / max(1, len(outcomes)), 4)}
    evidence |= {key: value for key, value in (strain or {}).items() if value}
    memory = next((text for text in (death, *failures) if text and is_out_of_memory(text)), None)
    if memory is not None:
        cause = "; ".join(filter(None, (detail, death if memory is death else None)))
        return Verdict(OOM, cause, evidence | memory_figures(memory))
    if not engine_alive:
        cause = "; ".join(filter(None, (detail or "the engine process has ended", death)))
        return Verdict(SERVER_DIED, cause, evidence)
    kinds = Counter(
        _VERDICT_OF_ERROR.get(error.partition(":")[0], HTTP_ERROR) for error in failures
    )
    return Verdict(kinds.most_common(1)[0][0], detail, evidence)


def is_out_of_memory(text: str) -> bool:
    """Whether an engine's message says that its memory was exhausted."""
    return _OUT_OF_MEMORY.search(text) is not None


def memory_figures(text: str) -> dict[str, float]:
    """The numbers in a memory error of torch or vLLM: GiB, and tokens.

    >>> memory_figures("CUDA out of memory. Tried to allocate 2.50 GiB.")
    {'tried_gib': 2.5}
    """
    found = {name: re.search(pattern, text) for name, pattern in _MEMORY_FIGURES.items()}
    return {name: float(match[1]) for name, match in found.items() if match}


def _decide_served(strain: Mapping[str, float]) -> Verdict:
    known = {key: value for key, value in strain.items() if value}
    if count := strain.get("preemptions"):
        return Verdict(PREEMPTED, f"the server preempted requests {count:.0f} times", known)
    share = strain.get("waiting_share", 0.0)
    if share > MAX_WAITING_SHARE:
        detail = f"requests spent {share:.0%} of their time in the server's queue"
        if most := strain.get("waiting_max"):
            detail += f"; up to {most:.0f} waited"
        return Verdict(QUEUED, detail, known)
    return Verdict(OK)


def _describe(failures: list[str], requests: int) -> str | None:
    if not failures:
        return None
    error, _ = Counter(failures).most_common(1)[0]
    return f"{len(failures)} of {requests} requests failed, most often: {error}"
