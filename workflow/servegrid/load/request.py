"""The requests of a load, and whether a server takes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import httpx

from servegrid.endpoint import Endpoint
from servegrid.errors import LoadError
from servegrid.load.stream import text_of_error

_KEYS = (
    "continuous_usage_stats",
    "stream_options",
    "min_tokens",
    "ignore_eos",
    "temperature",
    "max_tokens",
    "prompt",
)
_REFUSALS = {
    400: "refuses the request",
    401: "refuses the API key, or wants one",
    403: "refuses the API key",
    404: "does not know the model or the path",
    422: "refuses the request",
}


def headers(endpoint: Endpoint) -> dict[str, str]:
    """The headers of every request to the endpoint."""
    # A compressed stream would come in other pieces than those in which it was generated.
    told = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
    if endpoint.api_key is not None:
        told["Authorization"] = f"Bearer {endpoint.api_key}"
    return told


@dataclass(frozen=True)
class Writer:
    """Writes the requests of one load to one model, their ids beginning with `salt`."""

    client: httpx.Client
    model: str
    salt: str
    continuous_usage: bool = True

    def request_id(self, name: str) -> str:
        return f"{self.salt}/{name}"

    def completion(self, name: str, prompt: list[int], output_len: int) -> httpx.Request:
        """A streamed completion of exactly `output_len` tokens, whatever the model would say."""
        options = {"include_usage": True}
        if self.continuous_usage:
            options["continuous_usage_stats"] = True
        return self.client.build_request(
            "POST",
            "/v1/completions",
            headers={"X-Request-Id": self.request_id(name)},
            json={
                "model": self.model,
                "prompt": prompt,
                "max_tokens": output_len,
                "min_tokens": output_len,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": options,
            },
        )


def accepted(writer: Writer, token: int, limit_s: float) -> Writer:
    """A writer whose requests the server takes, found by asking for one token.

    It is `writer`, or the same without usage per chunk where the server refuses that key.
    Raises LoadError where the server cannot be reached or refuses anything else that would make
    every request fail, or ask for something else. A server that is overloaded or breaks down is
    for the load itself to meet, and to record.
    """
    request = writer.completion("probe", [token], 1)
    request.extensions["timeout"] = {"read": limit_s}
    try:
        response = writer.client.send(request)
    except httpx.ConnectError as error:
        raise LoadError(
            f"{request.url}: no connection ({error}). Is the server up, and is this its URL?"
        ) from error
    except httpx.TransportError:
        return writer
    if response.status_code not in _REFUSALS:
        return writer
    told = text_of_error(response.content)
    key = next((key for key in _KEYS if key in told), None)
    if key == "continuous_usage_stats" and writer.continuous_usage:
        return accepted(replace(writer, continuous_usage=False), token, limit_s)
    refuses = _REFUSALS[response.status_code]
    if key is not None and response.status_code in (400, 422):
        refuses = f"refuses the key `{key}` of the request"
    raise LoadError(
        f"{request.url}: the server {refuses} (HTTP {response.status_code}: {told}). servegrid "
        "needs streamed completions of token ids with a fixed number of output tokens, as vLLM "
        "and llama.cpp give them."
    )
