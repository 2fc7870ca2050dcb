"""Builds the requests of a workload, and finds out which of them a server accepts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import httpx

from servegrid.client.parse import parse_error_body
from servegrid.client.prompts import Prompt, PromptForm
from servegrid.errors import LoadError
from servegrid.study.endpoint import Endpoint

OPTIONAL_KEYS = ("continuous_usage_stats", "min_tokens", "ignore_eos")
"""Keys that a server may refuse. Every response shows what is missing without them."""
_KEYS = (*OPTIONAL_KEYS, "stream_options", "temperature", "max_tokens", "messages", "prompt")
_PROBE_TEXT = "Hello"
_REFUSALS = {
    400: "refuses the request",
    401: "refuses the API key, or needs one",
    403: "refuses the API key",
    404: "does not know the model or the path",
    422: "refuses the request",
}


def request_headers(endpoint: Endpoint) -> dict[str, str]:
    """The headers of every request to the endpoint."""
    # Compression would change the pieces in which the stream arrives.
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
    if endpoint.api_key is not None:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    return headers


def http_client(endpoint: Endpoint, transport: httpx.BaseTransport) -> httpx.Client:
    """A client for the endpoint that keeps no cookies.

    A load balancer with sticky sessions would otherwise send the whole workload to one replica.
    """
    client = httpx.Client(
        base_url=endpoint.base_url, headers=request_headers(endpoint), transport=transport
    )
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return client


def sent_key(client: httpx.Client) -> str | None:
    """The API key that the client sends."""
    return client.headers.get("Authorization", "").removeprefix("Bearer ") or None


class RequestRefused(LoadError):
    """The server responds, but refuses all requests of this kind, with this HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class RequestBuilder:
    """Builds the requests of one workload for one model. Their ids start with `salt`.

    `form` is how prompts are sent. The keys in `omitted_keys` are not sent.
    """

    client: httpx.Client
    model: str
    salt: str
    form: PromptForm = "ids"
    omitted_keys: frozenset[str] = frozenset()

    def request_id(self, name: str) -> str:
        return f"{self.salt}/{name}"

    def completion(self, name: str, prompt: Prompt, output_len: int) -> httpx.Request:
        """A streamed completion of exactly `output_len` tokens, even if the model would stop."""
        chat = self.form == "messages"
        content = (
            {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        )
        return self.client.build_request(
            "POST",
            "/v1/chat/completions" if chat else "/v1/completions",
            headers={"X-Request-Id": self.request_id(name)},
            json={
                "model": self.model,
                **content,
                "max_tokens": output_len,
                **self._without_omitted({"min_tokens": output_len, "ignore_eos": True}),
                "temperature": 0,
                "stream": True,
                "stream_options": {
                    "include_usage": True,
                    **self._without_omitted({"continuous_usage_stats": True}),
                },
            },
        )

    def _without_omitted(self, keys: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if key not in self.omitted_keys}


def negotiate_keys(builder: RequestBuilder, token: int | None, timeout_s: float) -> RequestBuilder:
    """Find out which optional keys the server accepts, by requests for one token.

    Returns `builder`, without those OPTIONAL_KEYS that the server refuses. The prompt is the
    token id `token`, or a text if that is None. Raises LoadError if the server cannot be reached,
    and RequestRefused if it refuses anything else that would make every request fail. An
    overloaded or failing server raises nothing: the measurement records its failures.
    """
    request = builder.completion("probe", _PROBE_TEXT if token is None else [token], 1)
    request.extensions["timeout"] = {"read": timeout_s}
    try:
        response = builder.client.send(request)
    except httpx.ConnectError as error:
        raise LoadError(
            f"{request.url}: no connection ({error}). Check that the server runs and that this "
            "is its URL."
        ) from error
    except httpx.TransportError:
        return builder
    status = response.status_code
    if status not in _REFUSALS:
        return builder
    message = parse_error_body(response.content, sent_key(builder.client))
    key = next((key for key in _KEYS if key in message), None) if status in (400, 422) else None
    if key in OPTIONAL_KEYS and key not in builder.omitted_keys:
        fewer_keys = replace(builder, omitted_keys=builder.omitted_keys | {key})
        return negotiate_keys(fewer_keys, token, timeout_s)
    refuses = _REFUSALS[status] if key is None else f"refuses the key `{key}` of the request"
    raise RequestRefused(
        f"{request.url}: the server {refuses} (HTTP {status}: {message}). servegrid needs a server "
        "that streams completions with a fixed number of output tokens, and reports their usage.",
        status,
    )


def negotiate(
    builder: RequestBuilder, token: int, timeout_s: float, allow_text: bool
) -> RequestBuilder:
    """As `negotiate_keys`, and send prompts as text if the server refuses token ids.

    `allow_text` permits this. Raises LoadError and RequestRefused as `negotiate_keys` does for
    the first form.
    """
    if builder.form != "ids":
        return negotiate_keys(builder, None, timeout_s)
    try:
        return negotiate_keys(builder, token, timeout_s)
    except RequestRefused as refusal:
        if not allow_text or refusal.status not in (400, 422):
            raise
        try:
            return negotiate_keys(replace(builder, form="text"), None, timeout_s)
        except LoadError:
            raise refusal from None
