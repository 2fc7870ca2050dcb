"""What clients report of one load, from the files they write, and how far it is from what the
scripted server did. Pure but for reading those files; times in s unless the name says otherwise.
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
"""What `vllm bench serve` puts before a request's number to make its X-Request-Id."""

Times = TypeVar("Times")


class PeerError(ServegridError):
    """A client could not be made ready, has not run, or its results cannot be used."""


@dataclass(frozen=True)
class Reported:
    """A request that its client calls a success.

    `key` finds it in the server's log: its X-Request-Id, or its prompt where the client sends no
    such header. `gaps` are the times between tokens, None where the client keeps their mean alone.
    """

    key: str
    tokens: int
    ttft: float
    mean_itl: float
    gaps: tuple[float, ...] | None


@dataclass(frozen=True)
class Distances:
    """Between what a client reports and what the server did.

    Per request, `ttft`: reported minus scripted; `mean_itl`: between its mean time per token and
    that of the server's sends. Per token, `itl`: between a reported gap and that between the two
    sends; None where the client keeps no gaps. `lost`: requests without all of their tokens.
    """

    ttft: Sequence[float]
    mean_itl: Sequence[float]
    itl: Sequence[float] | None
    lost: int


def of_servegrid(folder: Path) -> list[Reported]:
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


def of_vllm(folder: Path) -> list[Reported]:
    """`result.json` of `vllm bench serve --save-result --save-detailed` (0.32)."""
    result = json.loads((folder / "result.json").read_text())
    return [
        _from_gaps(f"{VLLM_PREFIX}{number}", ttft, gaps)
        for number, (ttft, gaps, error) in enumerate(
            zip(result["ttfts"], result["itls"], result["errors"], strict=True)
        )
        if not error
    ]


def of_guidellm(folder: Path) -> list[Reported]:
    """`result.json` of `guidellm run --output kind=json` (0.8.1)."""
    (benchmark,) = json.loads((folder / "result.json").read_text())["benchmarks"]
    return [
        Reported(
            json.loads(request["request_args"])["body"]["prompt"],
            request["output_tokens"],
            request["time_to_first_token_ms"] / 1e3,
            request["inter_token_latency_ms"] / 1e3,
            None,
        )
        for request in benchmark["requests"]["successful"]
    ]


def of_aiperf(folder: Path) -> list[Reported]:
    """`profile_export.jsonl` of `aiperf profile` (0.13)."""
    lines = (folder / "profile_export.jsonl").read_text().splitlines()
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


def keyed(times: Mapping[str, Times], requests: Sequence[Mapping[str, Any]]) -> dict[str, Times]:
    """What the server logged by X-Request-Id; by prompt instead where a request had none.

    `requests` are the log's. Prompts that were sent more than once are left out.
    """
    prompts = {
        name: request["body"]["prompt"]
        for number, request in enumerate(requests)
        if (name := f"#{number}") in times
    }
    seen = Counter(prompts.values())
    named = {key: found for key, found in times.items() if key not in prompts}
    return named | {prompt: times[name] for name, prompt in prompts.items() if seen[prompt] == 1}


def distances(
    reported: Iterable[Reported],
    sends: Mapping[str, Sequence[int]],
    asked: int,
    ttft: float,
) -> Distances:
    """How far the reports of `asked` requests are from the server's `sends` (ns) per key.

    `ttft` is the scripted one. Raises PeerError where a report matches no request of the server,
    or none is left to be held against it.
    """
    whole = [each for each in reported if each.tokens == len(_sends_of(each, sends))]
    if not whole:
        raise PeerError("it reports no request with all of its tokens")
    true = [np.diff(sends[each.key]) / 1e9 for each in whole]
    gaps = [each.gaps for each in whole if each.gaps is not None]
    return Distances(
        ttft=[each.ttft - ttft for each in whole],
        mean_itl=[
            abs(each.mean_itl - float(apart.mean()))
            for each, apart in zip(whole, true, strict=True)
        ],
        itl=np.abs(np.concatenate(gaps) - np.concatenate(true)).tolist() if gaps else None,
        lost=asked - len(whole),
    )


def _sends_of(reported: Reported, sends: Mapping[str, Sequence[int]]) -> Sequence[int]:
    try:
        return sends[reported.key]
    except KeyError:
        raise PeerError(
            f"it reports a request ({reported.key!r}) that is not in the server's log, or not in "
            "one place: its results cannot be held against it"
        ) from None


def _from_gaps(key: str, ttft: float, gaps: Iterable[float]) -> Reported:
    apart = tuple(map(float, gaps))
    mean = sum(apart) / len(apart) if apart else float("nan")
    return Reported(key, len(apart) + 1, ttft, mean, apart)
