"""What a server says of itself, apart from any load: its health, its facts and its counters."""

from __future__ import annotations

import contextlib
import http.client
import socket

from prometheus_client.parser import text_string_to_metric_families

from servegrid.endpoint import Endpoint

PREFIXES = ("vllm:", "llamacpp:")
LEFT_OUT = ("_bucket", "_created")
LIMIT_S = 5.0


class _Connection(http.client.HTTPConnection):
    """To an endpoint on TCP or on a Unix socket; httpx leaves the latter open if none listens."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint.base_url.removeprefix("http://"), timeout=LIMIT_S)
        self._path = endpoint.socket

    def connect(self) -> None:
        if self._path is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def get(endpoint: Endpoint, path: str) -> tuple[int, bytes]:
    """Status and body of the answer to GET `path`, asked with the endpoint's key.

    Raises OSError or http.client.HTTPException where none comes within `LIMIT_S`.
    """
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    with contextlib.closing(_Connection(endpoint)) as connection:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()


def healthy(endpoint: Endpoint) -> bool:
    """Whether GET /health is answered with 200 within the limit."""
    try:
        return get(endpoint, "/health")[0] == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False


def metrics(endpoint: Endpoint) -> dict[str, float] | None:
    """The engine's counters, gauges and the sums and counts of its histograms.

    Samples of the same name are added up over their labels. None where the server has no
    /metrics.
    """
    try:
        status, page = get(endpoint, "/metrics")
    except (OSError, http.client.HTTPException):
        return None
    return parsed(page.decode()) if status == http.HTTPStatus.OK else None


def parsed(text: str) -> dict[str, float]:
    """The engine's samples in Prometheus text, by name, without the histograms' buckets."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(PREFIXES) and not sample.name.endswith(LEFT_OUT):
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values
