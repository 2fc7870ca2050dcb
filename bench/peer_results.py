"""Reads what clients report of a measurement, and compares it with the mock server's log.

Pure, except that it reads these files. Times in s, unless the name says otherwise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq

from servegrid.errors import ServegridError

VLLM_PREFIX = "peer-"
"""`vllm bench serve` makes a request's X-Request-Id from this prefix and its number."""

Times = TypeVar("Times")


class PeerError(ServegridError):
    """A client could not be installed, did not run, or its results cannot be used."""


@dataclass(frozen=True)
class ReportedRequest:
    """A request that its client reports as successful.

    `key` identifies it in the server's log: its X-Request-Id, or its prompt if the client sends no
    X-Request-Id. `gaps` are the times between tokens, None if the client keeps only their mean.
    """

    key: str
    tokens: int
    ttft: float
    mean_itl: float
    gaps: tuple[float, ...] | None


@dataclass(frozen=True)
class ClientErrors:
    """How far a client's reported times are from those of the server.

    Per request, `ttft`: reported minus configured; `mean_itl`: difference between the client's mean
    time per token and that of the server's sends. Per token, `itl`: difference between a reported
    gap and that of the server's two sends; None if the client keeps no gaps. `lost`: requests
    without all of their tokens.
    """

    ttft: Sequence[float]
    mean_itl: Sequence[float]
    itl: Sequence[float] | None
    lost: int


def read_servegrid(folder: Path) -> list[ReportedRequest]:
    """`requests.parquet`, a table of servegrid.records.columns.REQUESTS."""
    return [
        _from_gaps(
            row["request_id"],
            (row["first_token_ns"] - row["sent_ns"]) / 1e9,
            np.diff(row["token_ns"]) / 1e9,
        )
        for row in pq.read_table(folder / "requests.parquet").to_pylist()
        if row["error"] is None
    ]


def read_vllm(folder: Path) -> list[ReportedRequest]:
    """`result.json` of `vllm bench serve --save-result --save-detailed` (0.32)."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return [
        _from_gaps(f"{VLLM_PREFIX}{number}", ttft, gaps)
        for number, (ttft, gaps, error) in enumerate(
            zip(result["ttfts"], result["itls"], result["errors"], strict=True)
        )
        if not error
    ]


def read_guidellm(folder: Path) -> list[ReportedRequest]:
    """`result.json` of `guidellm run --output kind=json` (0.8.1)."""
    (benchmark,) = json.loads((folder / "result.json").read_text(encoding="utf-8"))["benchmarks"]
    return [
        ReportedRequest(
            json.loads(request["request_args"])["body"]["prompt"],
            request["output_tokens"],
            request["time_to_first_token_ms"] / 1e3,
            request["inter_token_latency_ms"] / 1e3,
            None,
        )
        for request in benchmark["requests"]["successful"]
    ]


def read_aiperf(folder: Path) -> list[ReportedRequest]:
    """`profile_export.jsonl` of `aiperf profile` (0.13)."""
    lines = (folder / "profile_export.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        _from_gaps(
            record["metadata"]["x_request_id"],
            record["metrics"]["time_to_first_token"]["value"] / 1e3,
            np.array(record["metrics"]["inter_chunk_latency"]["value"]) / 1e3,
        )
        for record in map(json.loads, lines)
        if record.get("error") is None
        and not record["metadata"]["was_cancelled"]
        and "inter_chunk_latency" in record["metrics"]
    ]


def key_by_request(
    times: Mapping[str, Times], requests: Sequence[Mapping[str, Any]]
) -> dict[str, Times]:
    """The server's log by X-Request-Id, or by prompt for requests without one.

    `requests` are those of the log. Prompts that were sent more than once are left out.
    """
    prompts = {
        name: request["body"]["prompt"]
        for number, request in enumerate(requests)
        if (name := f"#{number}") in times
    }
    seen = Counter(prompts.values())
    with_id = {key: value for key, value in times.items() if key not in prompts}
    return with_id | {prompt: times[name] for name, prompt in prompts.items() if seen[prompt] == 1}


def compute_errors(
    reported: Iterable[ReportedRequest],
    sends: Mapping[str, Sequence[int]],
    request_count: int,
    ttft: float,
) -> ClientErrors:
    """Compare the reports of `request_count` requests with the server's `sends` (ns) per key.

    `ttft` is the configured one. Raises PeerError if a report matches no request of the server, or
    if no reported request has all tokens.
    """
    complete = [
        request for request in reported if request.tokens == len(_find_sends(request, sends))
    ]
    if not complete:
        raise PeerError("it reports no request that received all of its tokens")
    server_gaps = [np.diff(sends[request.key]) / 1e9 for request in complete]
    gaps = [request.gaps for request in complete if request.gaps is not None]
    return ClientErrors(
        ttft=[request.ttft - ttft for request in complete],
        mean_itl=[
            abs(request.mean_itl - float(gap.mean()))
            for request, gap in zip(complete, server_gaps, strict=True)
        ],
        itl=np.abs(np.concatenate(gaps) - np.concatenate(server_gaps)).tolist() if gaps else None,
        lost=request_count - len(complete),
    )


def _find_sends(request: ReportedRequest, sends: Mapping[str, Sequence[int]]) -> Sequence[int]:
    try:
        return sends[request.key]
    except KeyError:
        raise PeerError(
            f"it reports a request ({request.key!r}) that is not in the server's log, or is there "
            "more than once: its results cannot be compared"
        ) from None


def _from_gaps(key: str, ttft: float, gaps: Iterable[float]) -> ReportedRequest:
    times = tuple(map(float, gaps))
    mean = sum(times) / len(times) if times else float("nan")
    return ReportedRequest(key, len(times) + 1, ttft, mean, times)
