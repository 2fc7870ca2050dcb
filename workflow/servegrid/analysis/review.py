"""Holds the predictions of a study against what was measured. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from servegrid.analysis.feasibility import CANNOT, QUEUES
from servegrid.analysis.plan import CellPlan, DeploymentPlan, StudyPlan
from servegrid.analysis.summary import run_trials
from servegrid.analysis.validation import percentiles
from servegrid.records.verdict import was_served


@dataclass(frozen=True)
class DeploymentReview:
    """One deployment's predictions, made from published tables alone, and its finished cells.

    `finished` counts the trials that were run, `cells` those of them that were served.
    `median_ratio` is predicted / measured; `median` and `p90` are those of |log ratio| as ratios
    in %. `covered` of the `cells` lie in their interval, and `below_bound` are faster than their
    bound. `over_bound` is the median of measured / bound. They are None without a served cell
    that was predicted. `surprises` are outlooks that did not come true.
    """

    deployment: str
    finished: int
    cells: int
    median_ratio: float | None
    median: float | None
    p90: float | None
    covered: int
    below_bound: int
    over_bound: float | None
    surprises: tuple[str, ...]


def review_study(plan: StudyPlan, cells: pd.DataFrame) -> list[DeploymentReview]:
    """Each deployment of `plan`, which must not know `cells`, a table of `columns.CELLS`."""
    by_deployment = dict(iter(cells.groupby("deployment", sort=False)))
    return [
        _review(each, by_deployment[each.deployment.name])
        for each in plan.deployments
        if each.deployment.name in by_deployment
    ]


def add_measured(plan: StudyPlan, cells: pd.DataFrame | None) -> StudyPlan:
    """`plan` with the measured times of its cells, from a table of `columns.CELLS`."""
    if cells is None:
        return plan
    seconds: dict[tuple[Any, ...], list[float]] = {}
    for row in cells.dropna(subset=["seconds_per_100_tokens"]).to_dict("records"):
        found = seconds.setdefault((row["deployment"], *_key(row)), [])
        found.append(float(row["seconds_per_100_tokens"]))

    def measured(deployment: DeploymentPlan, cell: CellPlan) -> CellPlan:
        found = seconds.get((deployment.deployment.name, *_key(vars(cell.workload))))
        return replace(cell, measured_s=float(np.median(found))) if found else cell

    deployments = tuple(
        replace(each, cells=tuple(measured(each, cell) for cell in each.cells))
        for each in plan.deployments
    )
    return replace(plan, deployments=deployments)


def _review(plan: DeploymentPlan, cells: pd.DataFrame) -> DeploymentReview:
    planned = {_key(vars(cell.workload)): cell for cell in plan.cells}
    logs, covered, below, over, surprises = [], 0, 0, [], []
    rows: list[dict[Any, Any]] = run_trials(cells).to_dict("records")
    for row in rows:
        cell = planned.get(_key(row))
        if cell is None:
            continue
        surprises += _surprises(cell, row)
        measured = row["seconds_per_100_tokens"]
        if pd.isna(measured):
            continue
        if cell.bound_s is not None:
            over.append(measured / cell.bound_s)
            below += bool(measured < cell.bound_s)
        if cell.expected_s is not None:
            logs.append(np.log(cell.expected_s.value / measured))
            covered += bool(cell.expected_s.low <= measured <= cell.expected_s.high)
    median, p90 = percentiles(np.asarray(logs)) if logs else (None, None)
    return DeploymentReview(
        deployment=plan.deployment.name,
        finished=len(rows),
        cells=len(logs),
        median_ratio=float(np.exp(np.median(logs))) if logs else None,
        median=median,
        p90=p90,
        covered=covered,
        below_bound=below,
        over_bound=float(np.median(over)) if over else None,
        surprises=tuple(dict.fromkeys(surprises)),
    )


def _key(values: Mapping[Any, Any]) -> tuple[Any, ...]:
    """What identifies a workload, in the plan and in the table.

    The rate of a sweep is not known in the plan, but its fraction of the rate at saturation is.
    """
    loads = (values["concurrency"], values.get("rate_fraction"), values["request_rate"])
    load = next(float(each) for each in loads if not pd.isna(each))
    return values["protocol"], load, int(values["input_len"]), int(values["output_len"])


def _surprises(cell: CellPlan, row: Mapping[Any, Any]) -> list[str]:
    """Outlooks that did not come true, each as a text."""
    name, status = cell.workload.cell, cell.outlook.status
    served = was_served(row["verdict"])
    waiting = row.get("waiting_max")
    found = []
    if served and status == CANNOT:
        found.append(f"{name}: should not work ({cell.outlook.why}), but was served")
    if served and status == QUEUES and not pd.isna(waiting) and waiting == 0:
        found.append(f"{name}: should queue, but no request waited")
    if served and status not in (QUEUES, CANNOT) and not pd.isna(waiting) and waiting > 0:
        found.append(f"{name}: should fit, but up to {waiting:.0f} requests waited")
    if not served and status != CANNOT:
        found.append(f"{name}: not served, {row['verdict']}: {row['verdict_detail']}")
    return found
