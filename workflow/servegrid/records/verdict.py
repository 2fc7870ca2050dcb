"""How a cell ended: `ok`, or why it could not be served, from what its requests met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

OK = "ok"
SERVER_DIED = "server_died"

VERDICTS = {
    OK: "Every request was answered with exactly the tokens asked for",
    "http_error": "The server refused requests or broke off its answers",
    "timeout": "Requests were not answered within the load's limits",
    "wrong_tokens": "The server did not process the tokens asked for",
    SERVER_DIED: "The engine died under the load, twice, and had to be brought up again",
}
"""The verdicts and their meanings."""

_OF_KIND = {
    "timeout": "timeout",
    "stalled": "timeout",
    "usage_missing": "wrong_tokens",
    "wrong_prompt_tokens": "wrong_tokens",
    "wrong_completion_tokens": "wrong_tokens",
}


def verdict_of(errors: Iterable[str | None], engine_alive: bool) -> tuple[str, str | None]:
    """The verdict and its evidence.

    `errors` has one entry per request: null for a success, else `kind: detail`. Where requests
    failed in several ways, the most frequent one decides, the first of them among equals.
    """
    told = list(errors)
    failures = [error for error in told if error is not None]
    if not engine_alive:
        return SERVER_DIED, _evidence(failures, len(told)) or "the engine is gone"
    if not failures:
        return OK, None
    kinds = Counter(_OF_KIND.get(error.partition(":")[0], "http_error") for error in failures)
    return kinds.most_common(1)[0][0], _evidence(failures, len(told))


def _evidence(failures: list[str], requests: int) -> str | None:
    if not failures:
        return None
    error, _ = Counter(failures).most_common(1)[0]
    return f"{len(failures)} of {requests} requests failed, most often: {error}"
