"""The requests of a load, and whether a server takes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import httpx

from servegrid.client.parse import text_of_error
from servegrid.client.prompts import Form, Prompt
from servegrid.errors import LoadError
from servegrid.study.endpoint import Endpoint

DISPENSABLE = ("continuous_usage_stats", "min_tokens", "ignore_eos")
"""Keys that a server may refuse: what its answers lack without them is seen in each of them."""
_KEYS = (*DISPENSABLE, "stream_options", "temperature", "max_tokens", "messages", "prompt")
_WORD = "Hello"
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


def without_key(text: str, client: httpx.Client) -> str:
    """What a server has said, without the API key: some quote the one that they refuse."""
    key = client.headers.get("Authorization", "").removeprefix("Bearer ")
    return text.replace(key, "…") if key else text


class Refusal(LoadError):
    """The server answers, but refuses what every request of the load would be; with its status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Writer:
    """Writes the requests of one load to one model, their ids beginning with `salt`.

    Prompts go out as `form` says; the keys `left_out` don't.
    """

    client: httpx.Client
    model: str
    salt: str
    form: Form = "ids"
    left_out: frozenset[str] = frozenset()

    def request_id(self, name: str) -> str:
        return f"{self.salt}/{name}"

    def completion(self, name: str, prompt: Prompt, output_len: int) -> httpx.Request:
        """A streamed completion of exactly `output_len` tokens, whatever the model would say."""
        chat = self.form == "messages"
        asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        return self.client.build_request(
            "POST",
            "/v1/chat/completions" if chat else "/v1/completions",
            headers={"X-Request-Id": self.request_id(name)},
            json={
                "model": self.model,
                **asked,
                "max_tokens": output_len,
                **self._wanted({"min_tokens": output_len, "ignore_eos": True}),
                "temperature": 0,
                "stream": True,
                "stream_options": {
                    "include_usage": True,
                    **self._wanted({"continuous_usage_stats": True}),
                },
            },
        )

    def _wanted(self, keys: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if key not in self.left_out}


def accepted(writer: Writer, token: int | None, limit_s: float) -> Writer:
    """A writer whose requests the server takes, found by asking for one token.

    It is `writer`, or the same without the DISPENSABLE keys that the server refuses. `token` is
    any token id, None where text is to be sent. Raises LoadError where the server cannot be
    reached, and Refusal where it refuses anything else that would make every request fail, or ask
    for something else. A server that is overloaded or breaks down is for the load itself to meet,
    and to record.
    """
    request = writer.completion("probe", _WORD if token is None else [token], 1)
    request.extensions["timeout"] = {"read": limit_s}
    try:
        response = writer.client.send(request)
    except httpx.ConnectError as error:
        raise LoadError(
            f"{request.url}: no connection ({error}). Is the server up, and is this its URL?"
        ) from error
    except httpx.TransportError:
        return writer
    status = response.status_code
    if status not in _REFUSALS:
        return writer
    told = without_key(text_of_error(response.content), writer.client)
    key = next((key for key in _KEYS if key in told), None) if status in (400, 422) else None
    if key in DISPENSABLE and key not in writer.left_out:
        return accepted(replace(writer, left_out=writer.left_out | {key}), token, limit_s)
    refuses = _REFUSALS[status] if key is None else f"refuses the key `{key}` of the request"
    raise Refusal(
        f"{request.url}: the server {refuses} (HTTP {status}: {told}). servegrid needs streamed "
        "completions with a fixed number of output tokens and their usage.",
        status,
    )


def accepted_in_some_form(writer: Writer, token: int, limit_s: float, as_text: bool) -> Writer:
    """As `accepted`; token ids become text where the server refuses them and `as_text` allows it.

    Raises LoadError and Refusal as `accepted`, of the first form that was tried.
    """
    if writer.form != "ids":
        return accepted(writer, None, limit_s)
    try:
        return accepted(writer, token, limit_s)
    except Refusal as refusal:
        if not as_text or refusal.status not in (400, 422):
            raise
        try:
            return accepted(replace(writer, form="text"), None, limit_s)
        except LoadError:
            raise refusal from None
