"""The verdict of a trial: `ok`, or why the workload was not served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

OK = "ok"
SERVER_DIED = "server_died"
NOT_RUN = "not_run"

VERDICTS = {
    OK: "Every response has exactly the requested number of tokens; if output_len_exact is false, "
    "at least one and at most the requested number",
    "http_error": "Requests failed: no connection, an HTTP error or an incomplete response",
    "timeout": "Requests exceeded `timeout_s` or `idle_timeout_s`",
    "wrong_tokens": "The server reported a different number of tokens than requested, or none; if "
    "output_len_exact is false, more than requested, or none",
    SERVER_DIED: "The engine died during the workload, and again after a restart",
    NOT_RUN: "The cell was not tried; the detail says why. Its record has no requests",
}
"""The verdicts and their meanings."""

_VERDICT_OF_ERROR = {
    "timeout": "timeout",
    "stalled": "timeout",
    "usage_missing": "wrong_tokens",
    "wrong_prompt_tokens": "wrong_tokens",
    "wrong_completion_tokens": "wrong_tokens",
}


def decide_verdict(errors: Iterable[str | None], engine_alive: bool) -> tuple[str, str | None]:
    """The verdict and its evidence, which is None for `ok`.

    `errors` has one entry per request: None if it succeeded, else `kind: detail`. The most
    frequent verdict of a request decides; if two are equally frequent, the earlier one does.
    """
    outcomes = list(errors)
    failures = [error for error in outcomes if error is not None]
    if not engine_alive:
        return SERVER_DIED, _evidence(failures, len(outcomes)) or "the engine process has ended"
    if not failures:
        return OK, None
    kinds = Counter(
        _VERDICT_OF_ERROR.get(error.partition(":")[0], "http_error") for error in failures
    )
    return kinds.most_common(1)[0][0], _evidence(failures, len(outcomes))


def _evidence(failures: list[str], requests: int) -> str | None:
    if not failures:
        return None
    error, _ = Counter(failures).most_common(1)[0]
    return f"{len(failures)} of {requests} requests failed, most often: {error}"
