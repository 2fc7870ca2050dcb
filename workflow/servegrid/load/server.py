"""What the server says of itself: its health and its counters."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from servegrid.endpoint import Endpoint

PREFIXES = ("vllm:", "llamacpp:")
LEFT_OUT = ("_bucket", "_created")
LIMIT_S = 5.0


def client(endpoint: Endpoint) -> httpx.Client:
    """An ordinary client of the endpoint, key and Unix socket included."""
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    return httpx.Client(
        base_url=endpoint.base_url,
        headers=headers,
        timeout=LIMIT_S,
        transport=httpx.HTTPTransport(uds=endpoint.socket),
    )


def healthy(endpoint: Endpoint) -> bool:
    """Whether GET /health is answered with 200 within the limit."""
    try:
        with client(endpoint) as http:
            return http.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


def metrics(endpoint: Endpoint) -> dict[str, float] | None:
    """The engine's counters, gauges and the sums and counts of its histograms.

    Samples of the same name are added up over their labels. None where the server has no
    /metrics.
    """
    try:
        with client(endpoint) as http:
            response = http.get("/metrics")
    except httpx.HTTPError:
        return None
    if response.status_code != 200:
        return None
    return parsed(response.text)


def parsed(text: str) -> dict[str, float]:
    """The engine's samples in Prometheus text, by name, without the histograms' buckets."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(PREFIXES) and not sample.name.endswith(LEFT_OUT):
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values
