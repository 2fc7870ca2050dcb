"""What the allocations of a study ran on, from the records of their cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid.records import parquet
from servegrid.study.grid import Trial


def describe_allocations(
    trials: Sequence[Trial], cells: pd.DataFrame, folder: Path
) -> list[dict[str, str | None]]:
    """One row for each allocation that measured at least one of `trials`, in their order.

    `cells` is the table of `columns.CELLS` with one row per trial. `folder` contains the records.
    Raises RecordError if a record cannot be read.
    """
    first_trials: dict[Any, Trial] = {}
    for allocation, trial in zip(cells["allocation"], trials, strict=True):
        if not pd.isna(allocation):
            first_trials.setdefault(allocation, trial)
    return [
        describe_environment(trial, parquet.read_record(folder / trial.id / "requests.parquet"))
        for trial in first_trials.values()
    ]


def describe_environment(trial: Trial, record: dict[str, Any]) -> dict[str, str | None]:
    """The environment in a trial's record as texts. A value that is not recorded is None."""
    environment, engine = record.get("environment") or {}, record.get("engine") or {}
    nodes = [environment, *(environment.get("other_nodes") or [])]
    gpus = [gpu.get("name") for node in nodes for gpu in node.get("gpus") or []]
    cpu, cores = environment.get("cpu"), environment.get("cpu_cores")
    return {
        "deployment": trial.deployment.name,
        "engine": f"{trial.deployment.engine} {engine.get('version') or ''}".strip(),
        "node": ", ".join(node["node"] for node in nodes if node.get("node")) or None,
        "CPU": cpu and f"{cpu}, {cores} cores",
        "driver": environment.get("driver"),
        "GPUs": ", ".join(sorted({f"{gpus.count(gpu)} × {gpu}" for gpu in gpus if gpu})) or None,
        "Python": environment.get("python"),
        "servegrid": record.get("servegrid"),
        "started": (environment.get("started") or "")[:16].replace("T", " ") or None,
    }
