"""What a server says of itself, apart from any load: its health, its facts and its counters."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import time
from collections.abc import Callable
from urllib.parse import urlencode, urlsplit

from prometheus_client.parser import text_string_to_metric_families

from servegrid.study.endpoint import Endpoint
from servegrid.telemetry import counters
from servegrid.telemetry.counters import Counters

PREFIXES = ("vllm:", "llamacpp:")
SHARES = "_usage_perc"
"""How the names of gauges end that are shares of a whole, of which there is one per label."""
GAUGES_PATH = f"/metrics/?{urlencode([('name[]', name) for name in counters.GAUGES])}"
"""Where vLLM tells some of its metrics alone: what is mounted there is Prometheus' own server."""
MODELS_PATH = "/v1/models"
NO_SUCH_PATH = (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.METHOD_NOT_ALLOWED)
LIMIT_S = 5.0
SETTLED_S = 1.0
"""How long a server is given to count the requests that it has finished."""
POLL_S = 0.02

_LEFT_OUT = re.compile(r"[^{ ]*(_bucket|_created)[{ ]")


class _UnixConnection(http.client.HTTPConnection):
    """To a Unix socket; httpx leaves that open if none listens."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=LIMIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(endpoint: Endpoint) -> http.client.HTTPConnection:
    if endpoint.socket is not None:
        return _UnixConnection(endpoint.socket)
    parts = urlsplit(endpoint.base_url)
    encrypted = parts.scheme == "https"
    kind = http.client.HTTPSConnection if encrypted else http.client.HTTPConnection
    return kind(parts.netloc, timeout=LIMIT_S)


def get(endpoint: Endpoint, path: str) -> tuple[int, bytes]:
    """Status and body of the answer to GET `path`, asked with the endpoint's key.

    Raises OSError or http.client.HTTPException where none comes within `LIMIT_S`.
    """
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    with contextlib.closing(_connection(endpoint)) as connection:
        connection.request("GET", urlsplit(endpoint.base_url).path + path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()


def healthy(endpoint: Endpoint) -> bool:
    """Whether GET /health, or /v1/models where there is none, is answered with 200 in time."""
    try:
        status, _ = get(endpoint, "/health")
        if status in NO_SUCH_PATH:
            status, _ = get(endpoint, MODELS_PATH)
        return status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False


def metrics(endpoint: Endpoint, path: str = "/metrics") -> dict[str, float] | None:
    """The engine's counters, gauges and the sums and counts of its histograms.

    None where the server has nothing under `path`, or does not answer.
    """
    try:
        status, page = get(endpoint, path)
    except (OSError, http.client.HTTPException):
        return None
    return parsed(page.decode()) if status == http.HTTPStatus.OK else None


def gauges(endpoint: Endpoint) -> dict[str, float]:
    """What the server says of its load at this moment, by the names of `columns.TELEMETRY`.

    It is asked for little: vLLM works 4 ms on its whole page, and 0.2 ms on these few metrics.
    """
    return counters.gauges_of(metrics(endpoint, GAUGES_PATH) or metrics(endpoint))


def counters_of(endpoint: Endpoint) -> Callable[[int], Counters]:
    """What reads the server's metrics when it has counted all that it has finished.

    Its argument is the number of requests that were finished since it was first called. A server
    sends the end of a request before it counts it, so it is asked again for up to SETTLED_S,
    until no request is left in it; then what it says is taken as it is, as where a client has
    given up a request that the server goes on with.
    """
    first: Counters = None

    def read(finished: int) -> Counters:
        nonlocal first
        deadline = time.monotonic() + SETTLED_S
        now = metrics(endpoint)
        while not counters.has_settled(now, finished, first) and time.monotonic() < deadline:
            time.sleep(POLL_S)
            now = metrics(endpoint)
        first = first or now
        return now

    return read


def parsed(text: str) -> dict[str, float]:
    """The engine's samples in Prometheus text, by name, without the histograms' buckets.

    Samples of the same name are added up over their labels; of shares the largest counts.
    """
    # Most of the page are buckets: without them it is read five times as fast.
    lines = (line for line in text.splitlines() if line.startswith(PREFIXES))
    wanted = "\n".join(line for line in lines if not _LEFT_OUT.match(line))
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(wanted):
        for name, _, value, *_ in family.samples:
            before = values.get(name, 0.0)
            values[name] = max(before, value) if name.endswith(SHARES) else before + value
    return values
