"""Reads a server's health and metrics, over HTTP and independently of any workload."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlencode, urlsplit

from prometheus_client.parser import text_string_to_metric_families

from servegrid.study.endpoint import Endpoint
from servegrid.telemetry import counters
from servegrid.telemetry.counters import Counters

PREFIXES = ("vllm:", "llamacpp:")
RATIO_SUFFIX = "_usage_perc"
"""Gauges with this suffix are ratios, one per label: their sum has no meaning."""
GAUGES_PATH = f"/metrics/?{urlencode([('name[]', name) for name in counters.GAUGES])}"
"""Returns only these metrics on vLLM, which mounts Prometheus' own server under `/metrics/`."""
MODELS_PATH = "/v1/models"
NOT_FOUND_STATUSES = (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.METHOD_NOT_ALLOWED)
HTTP_TIMEOUT_S = 5.0
MAX_BODY_BYTES = 2**28
SETTLED_S = 1.0
"""Time for a server to count the requests that it has finished."""
_POLL_S = 0.02

_SKIPPED = re.compile(r"[^{ ]*(_bucket|_created)[{ ]")


class _UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket. (httpx leaks the socket if no server listens.)"""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=HTTP_TIMEOUT_S)
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
    return kind(parts.netloc, timeout=HTTP_TIMEOUT_S)


def http_get(endpoint: Endpoint, path: str) -> tuple[int, bytes]:
    """Status and body of GET `path`, sent with the endpoint's API key.

    Raises OSError or http.client.HTTPException if there is no complete answer within
    HTTP_TIMEOUT_S, or if it has more than MAX_BODY_BYTES.
    """
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    with contextlib.closing(_connection(endpoint)) as connection:
        connection.connect()
        # The connection's own timeout is for each byte.
        timer = threading.Timer(HTTP_TIMEOUT_S, _interrupt, [connection.sock])
        timer.daemon = True
        timer.start()
        try:
            connection.request("GET", urlsplit(endpoint.base_url).path + path, headers=headers)
            response = connection.getresponse()
            body = response.read(MAX_BODY_BYTES + 1)
        finally:
            timer.cancel()
    if len(body) > MAX_BODY_BYTES:
        raise http.client.HTTPException(f"the answer has more than {MAX_BODY_BYTES:,} bytes")
    return response.status, body


def _interrupt(connected: socket.socket) -> None:
    """Let all reads of other threads end now."""
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def is_healthy(endpoint: Endpoint) -> bool:
    """Whether GET /health answers 200 in time; without /health, whether /v1/models does."""
    try:
        status, _ = http_get(endpoint, "/health")
        if status in NOT_FOUND_STATUSES:
            status, _ = http_get(endpoint, MODELS_PATH)
        return status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False


def read_metrics(endpoint: Endpoint, path: str = "/metrics") -> dict[str, float] | None:
    """The engine's counters and gauges, and the sums and counts of its histograms.

    None if the server has no page at `path`, does not answer, or sends something else.
    """
    try:
        status, page = http_get(endpoint, path)
        return parse_metrics(page.decode()) if status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException, ValueError):
        return None


def read_gauges(endpoint: Endpoint) -> dict[str, float]:
    """The server's running and waiting requests and KV cache now, by `columns.TELEMETRY`.

    It requests few metrics: vLLM needs 0.2 ms for these, and 4 ms for its whole page.
    """
    return counters.gauge_columns(read_metrics(endpoint, GAUGES_PATH) or read_metrics(endpoint))


def counter_reader(endpoint: Endpoint) -> Callable[[int], Counters]:
    """A function that reads the server's metrics after it has counted all finished requests.

    The function's argument is the number of requests finished since its first call. A server
    sends the last token of a request before it counts the request. So the function repeats the
    read until the server is idle, for up to SETTLED_S seconds, and then returns what it has: the
    server may still work on a request that the client has given up.
    """
    first: Counters = None

    def read(finished: int) -> Counters:
        nonlocal first
        deadline = time.monotonic() + SETTLED_S
        now = read_metrics(endpoint)
        while not counters.has_settled(now, finished, first) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            now = read_metrics(endpoint)
        first = first or now
        return now

    return read


def parse_metrics(text: str) -> dict[str, float]:
    """The engine's samples in Prometheus' text format, by name, without histogram buckets.

    Samples of one name are summed over their labels; for ratios, the largest is taken.
    """
    # Buckets are most of the page: parsing is five times faster without them.
    lines = (line for line in text.splitlines() if line.startswith(PREFIXES))
    wanted = "\n".join(line for line in lines if not _SKIPPED.match(line))
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(wanted):
        for name, _, value, *_ in family.samples:
            before = values.get(name, 0.0)
            values[name] = max(before, value) if name.endswith(RATIO_SUFFIX) else before + value
    return values
