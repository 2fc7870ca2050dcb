"""Builds the requests of a workload, and finds out which of them a server accepts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Literal

import httpx

from servegrid.client.parse import parse_error_body, redirect_target
from servegrid.client.prompts import Prompt, PromptForm
from servegrid.errors import LoadError
from servegrid.study.endpoint import Endpoint

OPTIONAL_KEYS = ("continuous_usage_stats", "min_tokens", "ignore_eos", "temperature")
"""Keys that a server may refuse. Every response shows what is missing without them."""
_OTHER_KEYS = ("stream_options", "messages", "prompt")
LengthKey = Literal["max_tokens", "max_completion_tokens"]
"""The key with the number of output tokens. Some models know only the second one."""
PROBE_TIMEOUT_S = 60.0
"""Limit for one request before the load. Without it, a server that only sends pings holds it."""
_PROBE_TEXT = "Hello"
_REFUSALS = {
    400: "refuses the request",
    401: "refuses the API key, or needs one",
    403: "refuses the API key",
    404: "does not know the model or the path",
    405: "does not know the path",
    422: "refuses the request",
    500: "fails for a prompt of token ids",
    501: "does not know prompts of token ids",
}
_KEY_REFUSALS = (400, 422)
_FAILED = (500, 501)
"""How some servers answer a prompt of token ids that they do not understand."""


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
    """Builds the requests of one workload for one endpoint. Their ids start with `salt`.

    `form` is how prompts are sent, `length_key` the key with the number of output tokens. The keys
    in `omitted_keys` are not sent. `more` are further keys that a server may refuse.
    """

    client: httpx.Client
    endpoint: Endpoint
    salt: str
    form: PromptForm = "ids"
    length_key: LengthKey = "max_tokens"
    omitted_keys: frozenset[str] = frozenset()
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def optional_keys(self) -> tuple[str, ...]:
        """The keys that a server may refuse."""
        return (*OPTIONAL_KEYS, *self.more)

    def request_id(self, name: str) -> str:
        return f"{self.salt}/{name}"

    def completion(
        self, name: str, prompt: Prompt, output_len: int, number: int = 0
    ) -> httpx.Request:
        """A streamed completion of exactly `output_len` tokens, even if the model would stop.

        If the endpoint has LoRA adapters, `number` says whose turn it is.

        An endpoint that may stop early is asked for the same: its responses are then as long as it
        can make them.
        """
        chat = self.form == "messages"
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        content = {"messages": messages} if chat else {"prompt": prompt}
        return self.client.build_request(
            "POST",
            f"{self.endpoint.api_path}/{'chat/' if chat else ''}completions",
            headers={**self.endpoint.extra_headers, "X-Request-Id": self.request_id(name)},
            json={
                "model": self.endpoint.adapter(number) or self.endpoint.model,
                **content,
                self.length_key: output_len,
                **self._without_omitted(
                    {"min_tokens": output_len, "ignore_eos": True, "temperature": 0, **self.more}
                ),
                "stream": True,
                "stream_options": {
                    "include_usage": True,
                    **self._without_omitted({"continuous_usage_stats": True}),
                },
                **self.endpoint.extra_body,
            },
        )

    def without(self, *keys: str) -> RequestBuilder:
        """The same requests without these keys."""
        return replace(self, omitted_keys=self.omitted_keys | set(keys))

    def _without_omitted(self, keys: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if key not in self.omitted_keys}


@dataclass(frozen=True)
class Probe:
    """One request before the load, to see what the server accepts.

    The prompt is the token id `token`, or a text if that is None. `output_len` is the number of
    output tokens: a server may refuse a large one, or a small one.
    """

    token: int | None
    output_len: int
    timeout_s: float

    def send(self, builder: RequestBuilder) -> httpx.Response | None:
        """The response; None if there was none in time. Raises LoadError without a connection."""
        prompt: Prompt = _PROBE_TEXT if self.token is None else [self.token]
        request = builder.completion("probe", prompt, self.output_len)
        request.extensions["timeout"] = {"read": min(self.timeout_s, PROBE_TIMEOUT_S)}
        try:
            return builder.client.send(request)
        except httpx.ConnectError as error:
            raise LoadError(
                f"{request.url}: no connection ({error}). Check that the server runs and that this "
                "is its URL."
            ) from error
        except httpx.TransportError:
            return None


def negotiate_keys(builder: RequestBuilder, probe: Probe) -> RequestBuilder:
    """Find out which keys the server accepts, by requests as the workload sends them.

    Returns `builder`, without those optional keys that the server refuses, and with the length key
    that it knows. A refusal that names no key is tried once without all of them, then key by key.
    Raises LoadError if the server cannot be reached, and RequestRefused if it refuses anything else
    that would make every request fail. An overloaded or failing server raises nothing: the
    measurement records its failures.
    """
    response = probe.send(builder)
    if response is None or not _is_refusal(response, builder.form):
        return builder
    message = parse_error_body(response.content, sent_key(builder.client))
    if response.status_code not in _KEY_REFUSALS:
        raise _refusal(response, message)
    if key := _named_key(message, builder):
        if key in builder.optional_keys:
            return negotiate_keys(builder.without(key), probe)
        if key == "max_tokens":
            return negotiate_keys(replace(builder, length_key="max_completion_tokens"), probe)
        raise _refusal(response, message, key)
    accepted = _negotiate_one_by_one(builder, probe)
    if accepted is None:
        raise _refusal(response, message)
    return accepted


def _is_refusal(response: httpx.Response, form: PromptForm) -> bool:
    """Whether all requests of this kind would be answered like this."""
    status = response.status_code
    if status in _FAILED:
        return form == "ids"
    return status in _REFUSALS or response.is_redirect


def _negotiate_one_by_one(builder: RequestBuilder, probe: Probe) -> RequestBuilder | None:
    """The request with as many optional keys as the server accepts; None if it accepts none."""
    bare = builder.without(*builder.optional_keys)
    if bare == builder:
        return None
    others: tuple[LengthKey, ...] = ("max_tokens", "max_completion_tokens")
    forms = (replace(bare, length_key=key) for key in others[others.index(builder.length_key) :])
    accepted = next((form for form in forms if _is_accepted(form, probe)), None)
    if accepted is None:
        return None
    for key in builder.optional_keys:
        more = replace(accepted, omitted_keys=accepted.omitted_keys - {key})
        if key not in builder.omitted_keys and _is_accepted(more, probe):
            accepted = more
    return accepted


def _is_accepted(builder: RequestBuilder, probe: Probe) -> bool:
    response = probe.send(builder)
    return response is not None and response.status_code == HTTPStatus.OK


def _named_key(message: str, builder: RequestBuilder) -> str | None:
    """The key that a refusal is about, if it names one that the request has."""
    optional = (key for key in builder.optional_keys if key not in builder.omitted_keys)
    found = (
        key
        for key in (*optional, builder.length_key, *_OTHER_KEYS)
        if re.search(rf"\b{key}\b", message)
    )
    return next(found, None)


def _refusal(response: httpx.Response, message: str, key: str | None = None) -> RequestRefused:
    url, status = response.request.url, response.status_code
    if response.is_redirect:
        target = redirect_target(str(url), response.headers.get("location", ""))
        return RequestRefused(
            f"{url}: the server redirects to {target} (HTTP {status}). servegrid follows no "
            "redirect. If this is the right server, use this URL.",
            status,
        )
    refuses = _REFUSALS[status] if key is None else f"refuses the key `{key}` of the request"
    remedy = (
        "servegrid needs a server that streams completions with a fixed number of output tokens, "
        "and reports their usage."
    )
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        remedy = (
            "Export its key in a variable, and name the variable with --api-key-env, or in a "
            "study as `endpoint.api_key_env`."
        )
    return RequestRefused(
        f"{url}: the server {refuses} (HTTP {status}: {message}). {remedy}", status
    )


def negotiate(builder: RequestBuilder, probe: Probe, allow_text: bool) -> RequestBuilder:
    """As `negotiate_keys`, and send prompts as text if the server refuses token ids.

    `allow_text` permits this. Raises LoadError and RequestRefused as `negotiate_keys` does for
    the first form.
    """
    as_text = replace(probe, token=None)
    if builder.form != "ids":
        return negotiate_keys(builder, as_text)
    try:
        return negotiate_keys(builder, probe)
    except RequestRefused as refusal:
        failed = refusal.status in _FAILED
        if not failed and (refusal.status not in _KEY_REFUSALS or not allow_text):
            raise
        if not allow_text:
            return builder
        try:
            text = negotiate_keys(replace(builder, form="text"), as_text)
        except LoadError:
            if failed:
                return builder
            raise refusal from None
        # A server that fails for texts too does not fail because of the token ids.
        return builder if failed and not _is_accepted(text, as_text) else text
