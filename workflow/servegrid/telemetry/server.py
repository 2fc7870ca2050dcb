"""Reads a server's health and metrics, over HTTP and independently of any workload."""

from __future__ import annotations

import contextlib
import http.client
import math
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import urlencode, urlsplit

from prometheus_client.parser import text_string_to_metric_families

from servegrid.node.network import Proxy, find_proxy, tls_context
from servegrid.study.endpoint import Endpoint
from servegrid.study.text import printable
from servegrid.telemetry import counters
from servegrid.telemetry.counters import Counters

PREFIXES = ("vllm:", "llamacpp:")
RATIO_SUFFIX = "_usage_perc"
"""Gauges with this suffix are ratios, one per label: their sum has no meaning."""
GAUGES_PATH = f"/metrics/?{urlencode([('name[]', name) for name in counters.GAUGES])}"
"""Returns only these metrics on vLLM, which mounts Prometheus' own server under `/metrics/`."""
NOT_FOUND_STATUSES = (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.METHOD_NOT_ALLOWED)
HTTP_TIMEOUT_S = 5.0
BRING_UP_TIMEOUT_S = 15.0
"""Limit for one GET while it is found out how the server shows that it works."""
_SLOWER = 3
"""A healthy server may be this many times slower than it was at the bring-up."""
MAX_BODY_BYTES = 2**28
SETTLED_S = 1.0
"""Time for a server to count the requests that it has finished."""
_POLL_S = 0.02

_SKIPPED = re.compile(r"[^{ ]*(_bucket|_created)[{ ]")


_warned: set[tuple[str, str]] = set()


class _UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket. (httpx leaks the socket if no server listens.)"""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(
    endpoint: Endpoint, proxy: Proxy | None, timeout_s: float
) -> http.client.HTTPConnection:
    if endpoint.socket is not None:
        return _UnixConnection(endpoint.socket, timeout_s)
    parts = urlsplit(endpoint.base_url)
    to = parts.netloc if proxy is None else str(proxy)
    if parts.scheme != "https":
        return http.client.HTTPConnection(to, timeout=timeout_s)
    context = tls_context(endpoint.ca_file, endpoint.verify_tls)
    connection = http.client.HTTPSConnection(to, timeout=timeout_s, context=context)
    if proxy is not None:
        connection.set_tunnel(parts.hostname or "", parts.port or 443, proxy.headers)
    return connection


def http_get(endpoint: Endpoint, path: str, timeout_s: float = HTTP_TIMEOUT_S) -> tuple[int, bytes]:
    """Status and body of GET `path`, sent with the endpoint's API key.

    Raises OSError or http.client.HTTPException if there is no complete answer within `timeout_s`,
    or if it has more than MAX_BODY_BYTES.
    """
    headers = {**endpoint.extra_headers}
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    proxy = None if endpoint.socket is not None else find_proxy(endpoint.base_url)
    target = urlsplit(endpoint.base_url).path + path
    if proxy is not None and endpoint.base_url.startswith("http://"):
        target, headers = f"{endpoint.base_url}{path}", headers | proxy.headers
    with contextlib.closing(_connection(endpoint, proxy, timeout_s)) as connection:
        connection.connect()
        # The connection's own timeout is for each byte.
        timer = threading.Timer(timeout_s, _interrupt, [connection.sock])
        timer.daemon = True
        timer.start()
        try:
            connection.request("GET", target, headers=headers)
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


@dataclass(frozen=True)
class Health:
    """What GET `path` answered: a status, or None and the `detail`, after so many `seconds`."""

    path: str | None
    status: int | None
    seconds: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.status == http.HTTPStatus.OK

    def __str__(self) -> str:
        asked = "connecting" if self.path is None else f"GET {self.path}"
        answer = self.detail if self.status is None else f"HTTP {self.status}"
        return f"{asked}: {answer} after {self.seconds:.1f} s"


def find_health(endpoint: Endpoint) -> Endpoint:
    """The endpoint with the way in which it shows now that it works.

    The first of GET /health and of the list of models that answers 200. A slow answer raises the
    limit for later ones. If neither does, a connection must be enough.
    """
    for path in ("/health", endpoint.models_path):
        found = _get_health(endpoint, path, BRING_UP_TIMEOUT_S)
        if found.ok:
            limit_s = max(HTTP_TIMEOUT_S, _SLOWER * found.seconds)
            return replace(endpoint, health_path=path, health_timeout_s=limit_s)
    return replace(endpoint, health_path=None)


def check_health(endpoint: Endpoint) -> Health:
    """Whether the endpoint works now, judged in the way that `endpoint` names."""
    if endpoint.health_path is None:
        return _connect_health(endpoint)
    found = _get_health(endpoint, endpoint.health_path, endpoint.health_timeout_s)
    if found.status in NOT_FOUND_STATUSES and endpoint.health_path != endpoint.models_path:
        found = _get_health(endpoint, endpoint.models_path, endpoint.health_timeout_s)
    return found


def is_healthy(endpoint: Endpoint) -> bool:
    """Whether the endpoint works now, by `check_health`."""
    return check_health(endpoint).ok


def _get_health(endpoint: Endpoint, path: str, timeout_s: float) -> Health:
    return _time_health(path, lambda: http_get(endpoint, path, timeout_s)[0])


def _connect_health(endpoint: Endpoint) -> Health:
    def connect() -> int:
        proxy = find_proxy(endpoint.base_url)
        with contextlib.closing(
            _connection(endpoint, proxy, endpoint.health_timeout_s)
        ) as connection:
            connection.connect()
        return http.HTTPStatus.OK

    return _time_health(None, connect)


def _time_health(path: str | None, ask: Callable[[], int]) -> Health:
    """The health by the status that `ask` returns."""
    started = time.monotonic()
    status, detail = None, ""
    try:
        status = ask()
    except (OSError, http.client.HTTPException) as error:
        detail = describe_failure(error)
    return Health(path, status, time.monotonic() - started, detail)


def describe_failure(error: Exception) -> str:
    """Why a request has no answer, on one line."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(" ".join(reason.split()))


def read_metrics(endpoint: Endpoint, path: str = "/metrics") -> dict[str, float] | None:
    """The engine's counters and gauges, and the sums and counts of its histograms.

    None if the server has no page at `path`, does not answer, or sends something else. Once per
    page that cannot be read, stderr says so.
    """
    try:
        status, page = http_get(endpoint, path)
    except (OSError, http.client.HTTPException, ValueError):
        return None
    if status != http.HTTPStatus.OK:
        return None
    try:
        return parse_metrics(page.decode())
    except Exception as error:  # The parser raises whatever a malformed page leads it to.
        _warn_once(endpoint, path, describe_failure(error))
        return None


def _warn_once(endpoint: Endpoint, path: str, reason: str) -> None:
    if (endpoint.base_url, path) not in _warned:
        _warned.add((endpoint.base_url, path))
        where = f"{endpoint.base_url}{path}"
        print(f"servegrid: no server metrics: {where} is malformed: {reason}", file=sys.stderr)


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
            if not math.isfinite(value):
                continue
            before = values.get(name, 0.0)
            values[name] = max(before, value) if name.endswith(RATIO_SUFFIX) else before + value
    return values
