"""Attainment and goodput of each cell for each SLO class. Pure, except `gather_slo_table`.

Goodput is the number of requests per second that meet all limits of an SLO (Y. Zhong et al.,
DistServe, OSDI 2024; `vllm bench serve --goodput`). Attainment is the share of the requests that
meet them. A failed request meets none.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from servegrid.analysis import buffering, metrics, stationarity, tables
from servegrid.analysis.intervals import bring_up_medians, interval, share_interval
from servegrid.analysis.slo import Slo
from servegrid.analysis.stationarity import Window
from servegrid.analysis.summary import rows_by_cell
from servegrid.errors import RecordError
from servegrid.records import columns, parquet
from servegrid.study.few_requests import MIN_REQUESTS
from servegrid.study.grid import OPEN_LOOPS, Trial

HELD_BACK = "the responses were held back, so when their tokens came is not known"
NO_END = "the end of a request is not known"
NO_REQUEST = "no request was sent"
FOLLOWS = 0.95
"""The throughput follows the offered rate if it is at least this fraction of it."""
_KEYS = ["deployment", "protocol", "input_len", "output_len"]


@dataclass(frozen=True)
class TrialOutcome:
    """What became of the requests of one trial, for one SLO class.

    `outcomes` says for each request whether it met the SLO, in the order in which they were due.
    `answered` of them were answered, in `seconds`. `offered_per_s` is the rate at which requests
    were due, which varies by chance around the workload's. `whole_run` says that there is no
    stationary part. `reason` says why nothing is known; None if it is.
    """

    outcomes: Sequence[bool] = ()
    answered: int = 0
    seconds: float = 0.0
    offered_per_s: float | None = None
    whole_run: bool = False
    reason: str | None = None


def trial_outcomes(
    record: Mapping[str, Any], requests: pa.Table, classes: Mapping[str, Slo]
) -> dict[str, TrialOutcome]:
    """The outcome of each of `classes` in one trial, from its record and its rows of `REQUESTS`.

    The requests are those of the window that the metrics come from, and the failed ones. Without a
    stationary part they are all requests, over the time from the first due request to the last end,
    so that a cell above saturation has a goodput too. Values of an emulated engine keep its time
    scale, except for the limits, which are in real time.
    """
    spec = Trial.from_spec(record["spec"])
    served = requests.filter(pc.is_null(requests["error"]))
    failed = requests.filter(pc.is_valid(requests["error"]))
    window = None
    if spec.workload.has_stationary_part:
        window = metrics.stationary_window(requests, spec.workload)
    whole_run = spec.workload.has_stationary_part and window is None
    inside = served if window is None else metrics.completed_in(served, window)
    seconds = metrics.makespan_s(requests)[0] if window is None else window.seconds
    if not seconds:
        reason = NO_END if requests.num_rows else NO_REQUEST
        return dict.fromkeys(classes, TrialOutcome(reason=reason))
    is_held_back = buffering.held_back(record, requests) is not None
    due = pc.fill_null(pa.chunked_array([*_due(inside), *_due(failed)]), 0).to_numpy()
    order = due.argsort(kind="stable")
    met = metrics.requests_met(record, inside, list(classes.values()))
    found = {}
    for (name, slo), served_met in zip(classes.items(), met, strict=True):
        if slo.needs_arrivals and is_held_back:
            found[name] = TrialOutcome(reason=HELD_BACK)
            continue
        in_order = [*served_met.tolist(), *[False] * failed.num_rows]
        outcomes = [in_order[index] for index in order]
        offered = _offered(requests, window)
        found[name] = TrialOutcome(outcomes, inside.num_rows, seconds, offered, whole_run)
    return found


def _offered(requests: pa.Table, window: Window | None) -> float | None:
    """The requests per second that were due in the window, or from the first to the last one."""
    due = pc.drop_null(requests["scheduled_ns"]).to_numpy()
    if window is not None:
        return float(window.contains(due).sum() / window.seconds)
    span = (int(due.max()) - int(due.min())) / 1e9 if due.size else 0.0
    return due.size / span if span else None


def _due(requests: pa.Table) -> list[pa.Array]:
    chunks: list[pa.Array] = requests["scheduled_ns"].chunks
    return chunks


def slo_table(
    cells: pd.DataFrame,
    outcomes: Mapping[str, Mapping[str, TrialOutcome]],
    classes: Mapping[str, Slo],
) -> pd.DataFrame:
    """A table of `columns.SLO`, one row per cell and class, in the order of `cells`.

    `cells` is a table of `columns.CELLS`; `outcomes` has those of each trial by its spec_digest.
    The values come from the valid trials, or from all if none is valid.
    """
    keys = [column.name for column in columns.SUMMARY_KEYS]
    rows = []
    # All rows at once, because a selection of rows of a table takes a millisecond.
    needed = cells[[*keys, "valid", "spec_digest", "allocation"]]
    of_trials: list[dict[Any, Any]] = needed.to_dict("records")
    for numbers in rows_by_cell(cells, keys):
        trials = [of_trials[number] for number in numbers]
        first = {key: trials[0][key] for key in keys}
        valid = [trial for trial in trials if trial["valid"] is True]
        used = valid or trials
        for name, slo in classes.items():
            found = [outcomes[trial["spec_digest"]][name] for trial in used]
            row = _figures(found, [trial["allocation"] for trial in used])
            row |= {"slo_class": name, "slo": str(slo), "valid": bool(valid)}
            rows.append(first | row)
    return tables.from_rows(rows, columns.SLO)


def _figures(found: Sequence[TrialOutcome], allocations: Sequence[Any]) -> dict[str, Any]:
    """The values of one cell and class, by names of `columns.SLO`."""
    known = [
        (each, allocation)
        for each, allocation in zip(found, allocations, strict=True)
        if each.reason is None
    ]
    if not known:
        return {"trials": 0, "reason": found[0].reason}
    trials, bring_ups = [each for each, _ in known], [allocation for _, allocation in known]
    outcomes = [each.outcomes for each in trials]
    count, met = sum(map(len, outcomes)), sum(map(sum, outcomes))
    goodputs = bring_up_medians([sum(each.outcomes) / each.seconds for each in trials], bring_ups)
    rates = bring_up_medians([each.answered / each.seconds for each in trials], bring_ups)
    offered = [each.offered_per_s for each in trials if each.offered_per_s is not None]
    # As the throughput that it is compared with: a bring-up counts once, not once per trial.
    due = bring_up_medians(offered, bring_ups) if len(offered) == len(trials) else None
    low, high = share_interval(outcomes, bring_ups) or (None, None)
    goodput_low, goodput_high = interval(goodputs) or (None, None)
    return {
        "trials": len(trials),
        "whole_run": any(each.whole_run for each in trials),
        "requests": count,
        "requests_met": met,
        "slo_attainment": met / count if count else None,
        "slo_attainment_low": low,
        "slo_attainment_high": high,
        "goodput_requests_per_s": statistics.median(goodputs),
        "goodput_requests_per_s_low": goodput_low,
        "goodput_requests_per_s_high": goodput_high,
        "requests_per_s": statistics.median(rates),
        "offered_requests_per_s": due and statistics.median(due),
    }


REQUEST_COLUMNS = sorted({*metrics.REQUEST_COLUMNS, *stationarity.REQUEST_COLUMNS})
"""The columns of `columns.REQUESTS` that `trial_outcomes` needs."""


def gather_slo_table(
    trials: Sequence[Trial], cells: pd.DataFrame, folder: Path, classes: Mapping[str, Slo]
) -> pd.DataFrame:
    """The table of `columns.SLO` of `trials`, whose records lie in `folder`.

    `cells` is their table of `columns.CELLS`; trials that it lacks are left out. Raises RecordError
    if a record cannot be read.
    """
    present = set(cells["spec_digest"])
    outcomes = {}
    for trial in trials:
        if trial.digest not in present:
            continue
        path = folder / trial.id / "requests.parquet"
        try:
            record, requests = parquet.read_rows(path, REQUEST_COLUMNS)
        except RecordError as error:
            raise RecordError(f"{path.parent}: {error}. Delete it and run again.") from error
        outcomes[trial.digest] = trial_outcomes(record, requests, classes)
    return slo_table(cells, outcomes, classes)


def find_saturation(slo: pd.DataFrame) -> pd.DataFrame:
    """A table of `columns.SATURATION`, one row per deployment, open loop, prompt and output length.

    `slo` is a table of `columns.SLO`. A server is saturated at the largest rate at which its
    throughput still follows the offered rate (W. J. Dally and B. Towles, Principles and Practices
    of Interconnection Networks, 2004, chapter 23; in R. Jain, The Art of Computer Systems
    Performance Analysis, 1991, its usable capacity). This rate lies between the largest measured
    rate that the throughput follows, with all lower ones, and the next measured one. Rates with
    fewer than MIN_REQUESTS requests do not count: the time of their last response alone makes the
    throughput smaller than the offered rate.
    """
    rates = slo[slo["protocol"].isin(OPEN_LOOPS) & (slo["protocol"] != "profile")]
    rates = rates.dropna(subset=["request_rate", "requests_per_s", "offered_requests_per_s"])
    rates = rates[rates["requests"].fillna(MIN_REQUESTS) >= MIN_REQUESTS]
    rates = rates.drop_duplicates([*_KEYS, "request_rate"])
    rows = []
    for key, cells in rates.groupby(_KEYS, sort=False):
        below, above, highest = None, None, None
        for row in cells.sort_values("request_rate").to_dict("records"):
            follows = row["requests_per_s"] >= FOLLOWS * row["offered_requests_per_s"]
            if follows and above is None:
                below = row["request_rate"]
            elif above is None:
                above = row["request_rate"]
            highest = max(highest or 0.0, row["requests_per_s"])
        rows.append(
            dict(zip(_KEYS, key, strict=True))
            | {
                "rate_followed": below,
                "rate_not_followed": above,
                "highest_requests_per_s": highest,
            }
        )
    return tables.from_rows(rows, columns.SATURATION)
