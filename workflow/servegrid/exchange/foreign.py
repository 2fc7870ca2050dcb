"""A load that another client has measured, as a row of the table of cells. Pure.

Its requests go through the same computations as servegrid's own. What the other client does not
tell is null, and none of its cells is certified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from servegrid.analysis import metrics, tables
from servegrid.analysis.stationarity import window_of
from servegrid.errors import ExchangeError
from servegrid.records import columns, parquet
from servegrid.records.columns import PERCENTILES
from servegrid.records.verdict import OK, verdict_of
from servegrid.study.deployment import Deployment
from servegrid.study.grid import Protocol, Trial, Workload

_NS = 1_000_000_000

IMPORTED = "imported"
"""Stands for a rule of validity in cells that another client has measured."""


@dataclass(frozen=True)
class Foreign:
    """What a client, `origin`, says of one load.

    `requests` are rows of `columns.REQUESTS`, as far as they are told. Where the client kept no
    requests, `figures` are columns of `columns.CELLS` by its own account, and `requests` is None.
    `lengths` are the input and output tokens of a request, rounded means where they differ, which
    `notes` then say. `gaps_known` where it told the time of each chunk.
    """

    source: str
    origin: str
    model: str
    measured: str
    protocol: Protocol
    concurrency: int | None
    request_rate: float | None
    lengths: tuple[int, int]
    requests: Sequence[Mapping[str, Any]] | None
    figures: Mapping[str, Any]
    notes: Sequence[str] = ()
    gaps_known: bool = True


def cells_of(
    workloads: Sequence[Foreign], deployment: Deployment, engine: str | None
) -> pd.DataFrame:
    """The loads as a dataframe of `columns.CELLS`; those of the same kind are trials of a cell."""
    numbers: dict[tuple[Any, ...], int] = {}
    rows = []
    for each in workloads:
        own = replace(deployment, model=deployment.model or each.model)
        own = replace(own, name=own.name or _name(own, each.origin))
        kind = (own.name, each.origin, each.protocol, each.concurrency, each.request_rate)
        key = (*kind, each.lengths)
        numbers[key] = numbers.get(key, 0) + 1
        rows.append(row_of(each, Trial(own, _load(each), numbers[key]), engine))
    names = [column.name for column in columns.CELLS]
    return tables.typed(pd.DataFrame(rows, columns=names), columns.CELLS)


def row_of(foreign: Foreign, trial: Trial, engine: str | None) -> dict[str, Any]:
    """Its row of `columns.CELLS`: `valid` is null, and `invalid_evidence` says what is doubtful.

    A closed or open loop is reported by its stationary part, as servegrid's own are; where it has
    none, by all of it, start and end included, and that is noted.
    """
    rows = foreign.requests or []
    requests = parquet.table_of(columns.REQUESTS, rows)
    notes = [f"not certified: measured by {foreign.origin}", *foreign.notes]
    verdict, detail = verdict_of((row.get("error") for row in rows), engine_alive=True)
    whole = foreign.protocol == "burst"
    if rows and not whole and isinstance(window_of(requests, trial.workload), str):
        whole = True
        notes.append("no steady state: figures of the whole load, its start and end included")
    record = {
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "origin": foreign.origin,
        "verdict": verdict,
        "verdict_detail": detail,
        "engine": {"engine": engine},
        "environment": {"allocation": foreign.source, "started": foreign.measured},
        "client": {},
        "self_check": None,
        "metrics_before": None,
        "metrics_after": None,
    }
    telemetry = parquet.table_of(columns.TELEMETRY, [])
    row = metrics.row_of(record, requests, telemetry, whole)
    if not foreign.gaps_known:
        row |= {name: None for name in row if name.startswith("itl_")} | {
            "coalesced_chunk_fraction": None
        }
    row |= foreign.figures
    if verdict == OK and row.get("failed_requests"):
        row |= {
            "verdict": "http_error",
            "verdict_detail": f"{row['failed_requests']} requests failed",
        }
    unknown = dict.fromkeys(("valid", "prompts", "output_spread"))
    return row | unknown | {"invalid_rules": [IMPORTED] * len(notes), "invalid_evidence": notes}


def closed(limit: int | None, requests: int) -> tuple[Protocol, int]:
    """Protocol and concurrency of requests that are sent as soon as `limit` allows."""
    if limit is None or limit >= requests:
        return "burst", requests
    return "closed_loop", limit


def with_users(requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The requests, each given to the stream whose last one had ended longest before it."""
    free: list[tuple[int, int]] = []
    given = []
    for row in sorted(requests, key=lambda each: each["sent_ns"]):
        end, user = min(free, default=(row["sent_ns"] + 1, 0))
        if end <= row["sent_ns"]:
            free.remove((end, user))
        else:
            user = len(free)
        free.append((row["done_ns"], user))
        given.append({**row, "user": user})
    return given


def lengths_of(
    prompts: Sequence[int], outputs: Sequence[int], source: str
) -> tuple[tuple[int, int], list[str]]:
    """Rounded means of the tokens of prompts and outputs, and notes where they differ."""
    if not prompts or not outputs:
        raise ExchangeError(f"{source}: no request of it succeeded; there is nothing to import.")
    notes = [
        f"{what} of {min(own)} to {max(own)} tokens"
        for what, own in (("prompts", prompts), ("outputs", outputs))
        if min(own) != max(own)
    ]
    return (_mean(prompts), _mean(outputs)), notes


def ns(seconds: float) -> int:
    """Seconds as whole nanoseconds."""
    return round(seconds * _NS)


def percentile_known(percentile: int, samples: int) -> bool:
    """Whether so many samples are enough for the percentile to be published."""
    return samples >= PERCENTILES[percentile]


def _load(foreign: Foreign) -> Workload:
    input_len, output_len = foreign.lengths
    rows = foreign.requests
    return Workload(
        protocol=foreign.protocol,
        concurrency=foreign.concurrency,
        request_rate=foreign.request_rate,
        input_len=input_len,
        output_len=output_len,
        requests=foreign.figures.get("requests") if rows is None else len(rows),
    )


def _name(deployment: Deployment, origin: str) -> str:
    client = origin.partition(" ")[0]
    gpus = f"{deployment.gpu_count}x{deployment.gpu}" if deployment.gpu != "cpu" else "cpu"
    parts = (deployment.model.rpartition("/")[2], deployment.quantization, client, gpus)
    return "_".join(part for part in parts if part)


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))
