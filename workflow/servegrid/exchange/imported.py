"""Turns a workload that another client measured into a row of the table of cells. Pure.

Its requests go through the same computations as servegrid's own. Values that the other client does
not report are null, and `valid` is always null.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from servegrid.analysis import metrics, tables
from servegrid.analysis.buffering import describe_buffering
from servegrid.analysis.stationarity import find_window
from servegrid.errors import ExchangeError
from servegrid.records import columns, parquet
from servegrid.records.columns import PERCENTILES
from servegrid.records.verdict import HTTP_ERROR, Verdict, decide_verdict, was_served
from servegrid.study.deployment import Deployment
from servegrid.study.grid import Protocol, Trial, Workload
from servegrid.study.limits import MAX_INTEGER

_NS = 1_000_000_000
_MAX_NS = 2**53
"""Arrow computes with no larger times than this, 104 days."""

IMPORTED = "imported"
"""The entry of `invalid_rules` for each note about an imported cell."""

_TRIAL_PARAMETERS = frozenset({"run_number", "seed"})
"""Parameters of a sweep that make another trial of the same cell."""


@dataclass(frozen=True)
class ImportedResult:
    """One workload, as the client `origin` reports it in the file `source`.

    `requests` are rows of `columns.REQUESTS` with the values that the client reports. If it reports
    no requests, `requests` is None, and `metrics` are columns of `columns.CELLS` that the client
    computed. `input_len` and `output_len` are tokens per request; if requests differ, they are
    rounded means and `notes` say so. `itl_known` is False if the client reports no times between
    tokens. `started` is a text in the client's own format. `parameters` are those of a sweep, with
    the number of the run. `burstiness` is the shape of the gamma-distributed times between
    arrivals; None for other protocols.
    """

    source: str
    origin: str
    model: str
    started: str
    protocol: Protocol
    concurrency: int | None
    request_rate: float | None
    input_len: int
    output_len: int
    requests: Sequence[Mapping[str, Any]] | None
    metrics: Mapping[str, Any]
    notes: Sequence[str] = ()
    itl_known: bool = True
    parameters: Mapping[str, Any] = field(default_factory=dict)
    burstiness: float | None = None


def check_result(result: ImportedResult) -> None:
    """Raise an error if no client can have measured these values, or if a table cannot hold them.

    It is an ExchangeError, or for a value of a wrong type that of Arrow.
    """
    rows, counts = result.requests or [], {"input_len": result.input_len}
    counts |= {"output_len": result.output_len, "concurrency": result.concurrency or 1}
    for name, count in counts.items():
        if not 1 <= count <= MAX_INTEGER:
            raise _implausible(result, f"its `{name}` is {count:.6g}")
    rate = result.request_rate
    if rate is not None and not 0 < rate < math.inf:
        raise _implausible(result, f"its request rate is {rate}")
    for name, value in result.metrics.items():
        if value is not None and not 0 <= value < math.inf:
            raise _implausible(result, f"its `{name}` is {value}")
    for number, row in enumerate(rows):
        times = [row["sent_ns"], *row["token_ns"], row["done_ns"]]
        tokens = [row["prompt_tokens"] or 0, row["completion_tokens"] or 0]
        if times != sorted(times):
            raise _implausible(result, f"the times of its request {number} go backwards")
        if not 0 <= min(tokens) <= max(tokens) <= MAX_INTEGER:
            raise _implausible(result, f"the tokens of its request {number} are {tokens}")
        if row["token_ns"] and row["error"] is None and not row["completion_tokens"]:
            raise _implausible(result, f"its request {number} has times of tokens, but no tokens")
    starts, ends = ([row[key] for row in rows] for key in ("sent_ns", "done_ns"))
    if rows and max(ends) - min(starts) >= _MAX_NS:
        raise _implausible(result, "its requests span more than 104 days")
    parquet.arrow_table(columns.REQUESTS, rows)  # the types of all values


def _implausible(result: ImportedResult, problem: str) -> ExchangeError:
    return ExchangeError(
        f"{result.source}: {problem}. Check that the client finished writing the file."
    )


def drop_repeated(results: Sequence[ImportedResult]) -> tuple[list[ImportedResult], list[str]]:
    """The results without those of a sweep that are there twice, and a reason for each of these.

    A sweep writes every run into a file of its own, and again into the list of its runs.
    """
    kept: list[ImportedResult] = []
    repeated = []
    for result in results:
        same = next(
            (
                each
                for each in kept
                if each.parameters and replace(each, source=result.source) == result
            ),
            None,
        )
        if same is None:
            kept.append(result)
        else:
            repeated.append(f"{result.source}: the same run of the sweep as {same.source}.")
    return kept, repeated


def imported_cells(
    results: Sequence[ImportedResult], deployment: Deployment, engine: str | None
) -> pd.DataFrame:
    """A dataframe of `columns.CELLS`, one row per result. Equal workloads become trials.

    Results of equal workloads that a sweep measured with different parameters, for example of the
    server, are no trials of each other: these parameters become part of the deployment's name.
    """
    varied = _varied_parameters(results)
    numbers: dict[tuple[Any, ...], int] = {}
    rows = []
    for result in results:
        served = replace(deployment, model=deployment.model or result.model)
        name = served.name or _deployment_name(served, result.origin)
        served = replace(served, name=name + _format_parameters(result, varied))
        key = (served.name, *_workload_key(result))
        numbers[key] = numbers.get(key, 0) + 1
        trial = Trial(served, _workload(result), numbers[key])
        rows.append(imported_cell_row(result, trial, engine))
    names = [column.name for column in columns.CELLS]
    return tables.cast_columns(pd.DataFrame(rows, columns=names), columns.CELLS)


def imported_cell_row(result: ImportedResult, trial: Trial, engine: str | None) -> dict[str, Any]:
    """The row of `columns.CELLS`. `valid` is null, and `invalid_evidence` has the notes.

    The metrics of closed_loop and poisson come from the stationary part, as for servegrid's own
    cells. If there is none, they come from the whole run, and a note says so.
    """
    rows = result.requests or []
    requests = parquet.arrow_table(columns.REQUESTS, rows)
    notes = [f"validity not checked: measured by {result.origin}", *result.notes]
    verdict = decide_verdict((row.get("error") for row in rows), engine_alive=True)
    use_all = result.protocol == "burst"
    if rows and not use_all and isinstance(find_window(requests, trial.workload), str):
        use_all = True
        notes.append("no stationary part: the metrics include the start and the end of the run")
    record = {
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "origin": result.origin,
        **verdict.record,
        "engine": {"engine": engine},
        "environment": {"allocation": result.source, "started": result.started},
        "client": {},
        "calibration": None,
        "metrics_before": None,
        "metrics_after": None,
    }
    telemetry = parquet.arrow_table(columns.TELEMETRY, [])
    row = metrics.cell_row(record, requests, telemetry, use_all)
    if row["seconds_per_100_tokens"] is not None:
        # output_len is a rounded mean, which is far off if outputs have a few tokens.
        row["seconds_per_100_tokens"] *= result.output_len / row["completion_tokens_mean"]
    if not result.itl_known:
        row |= {name: None for name in row if name.startswith("itl_")}
        row["coalesced_chunk_fraction"] = None
    if (buffered := describe_buffering(requests)) is not None:
        notes.append(f"no ttft, tpot and itl: {buffered}")
    row |= result.metrics
    if was_served(verdict.name) and row.get("failed_requests"):
        failed = Verdict(HTTP_ERROR, f"{row['failed_requests']} requests failed")
        row |= failed.record | {"verdict_evidence": None}
    unknown = dict.fromkeys(("valid", "source", "prompts", "output_spread", "output_len_exact"))
    return row | unknown | {"invalid_rules": [IMPORTED] * len(notes), "invalid_evidence": notes}


def closed_protocol(max_concurrency: int | None, requests: int) -> tuple[Protocol, int]:
    """Protocol and concurrency of requests that are sent as soon as `max_concurrency` allows."""
    if max_concurrency is None or max_concurrency >= requests:
        return "burst", requests
    return "closed_loop", max_concurrency


def limit_notes(requests: Sequence[Mapping[str, Any]], limit: int | None) -> list[str]:
    """A note if an open loop had to wait, because `limit` requests were in flight."""
    if limit is None:
        return []
    changes = [(row["sent_ns"], 1) for row in requests] + [(row["done_ns"], -1) for row in requests]
    in_flight = itertools.accumulate(change for _, change in sorted(changes))
    if max(in_flight, default=0) < limit:
        return []
    return [f"the client's limit of {limit} requests in flight was reached, so requests waited"]


def assign_users(requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The requests with a `user` each: the user who has been idle longest, or a new one."""
    idle: list[tuple[int, int]] = []
    assigned = []
    for row in sorted(requests, key=lambda request: request["sent_ns"]):
        end, user = min(idle, default=(row["sent_ns"] + 1, 0))
        if end <= row["sent_ns"]:
            idle.remove((end, user))
        else:
            user = len(idle)
        idle.append((row["done_ns"], user))
        assigned.append({**row, "user": user})
    return assigned


def mean_lengths(
    prompts: Sequence[int], outputs: Sequence[int], source: str
) -> tuple[int, int, list[str]]:
    """The rounded means of the tokens of prompts and outputs, and notes if they differ.

    Raises ExchangeError if there are none.
    """
    if not prompts or not outputs:
        raise nothing_to_import(source)
    notes = [
        f"{name} of {min(lengths)} to {max(lengths)} tokens"
        for name, lengths in (("prompts", prompts), ("outputs", outputs))
        if min(lengths) != max(lengths)
    ]
    return _mean(prompts), _mean(outputs), notes


def nothing_to_import(source: str) -> ExchangeError:
    """The error for a result without a successful request."""
    return ExchangeError(
        f"{source}: no request succeeded, so there is nothing to import. Measure it again."
    )


def to_ns(seconds: float) -> int:
    """Seconds as whole nanoseconds."""
    return round(seconds * _NS)


def has_enough_samples(percentile: int, samples: int) -> bool:
    """Whether `samples` are enough for the percentile, by servegrid's own rule."""
    return samples >= PERCENTILES[percentile]


def _workload_key(result: ImportedResult) -> tuple[Any, ...]:
    return (
        *(result.model, result.origin, result.protocol, result.concurrency),
        *(result.request_rate, result.input_len, result.output_len),
    )


def _varied_parameters(results: Sequence[ImportedResult]) -> list[str]:
    """The parameters that differ between results of equal workloads, but for those of trials."""
    values: dict[tuple[Any, ...], set[str]] = {}
    for result in results:
        for name in {name for each in results for name in each.parameters} - _TRIAL_PARAMETERS:
            key = (name, *_workload_key(result))
            values.setdefault(key, set()).add(str(result.parameters.get(name)))
    return sorted({key[0] for key, found in values.items() if len(found) > 1})


def _format_parameters(result: ImportedResult, names: Sequence[str]) -> str:
    words = (f"_{name}-{result.parameters[name]}" for name in names if name in result.parameters)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "".join(words))


def _workload(result: ImportedResult) -> Workload:
    rows = result.requests
    return Workload(
        protocol=result.protocol,
        concurrency=result.concurrency,
        request_rate=result.request_rate,
        input_len=result.input_len,
        output_len=result.output_len,
        requests=result.metrics.get("requests") if rows is None else len(rows),
        burstiness=result.burstiness,
    )


def _deployment_name(deployment: Deployment, origin: str) -> str:
    client = origin.partition(" ")[0]
    gpus = f"{deployment.gpu_count}x{deployment.gpu}" if deployment.gpu != "cpu" else "cpu"
    parts = (deployment.model.rpartition("/")[2], deployment.quantization, client, gpus)
    return "_".join(part for part in parts if part)


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))
