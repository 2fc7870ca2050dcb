"""What the allocations of a study ran on, from the records of their cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid.records import parquet
from servegrid.study.grid import Trial


def allocations(
    trials: Sequence[Trial], cells: pd.DataFrame, folder: Path
) -> list[dict[str, str | None]]:
    """A row for each allocation that measured any of `trials`, in their order.

    `cells` is their table of `columns.CELLS`, a row each; `folder` has their records. Raises
    RecordError where one cannot be read.
    """
    first: dict[Any, Trial] = {}
    for allocation, trial in zip(cells["allocation"], trials, strict=True):
        if not pd.isna(allocation):
            first.setdefault(allocation, trial)
    return [
        told(trial, parquet.read_record(folder / trial.id / "requests.parquet"))
        for trial in first.values()
    ]


def told(trial: Trial, record: dict[str, Any]) -> dict[str, str | None]:
    """What a record says of the place where it was measured, as texts; None where it does not."""
    environment, engine = record.get("environment") or {}, record.get("engine") or {}
    gpus = [gpu.get("name") for gpu in environment.get("gpus") or []]
    cpu, cores = environment.get("cpu"), environment.get("cpu_cores")
    return {
        "deployment": trial.deployment.name,
        "engine": f"{trial.deployment.engine} {engine.get('version') or ''}".strip(),
        "node": environment.get("node"),
        "processor": cpu and f"{cpu}, {cores} cores",
        "driver": environment.get("driver"),
        "GPUs": ", ".join(sorted({f"{gpus.count(gpu)} × {gpu}" for gpu in gpus if gpu})) or None,
        "Python": environment.get("python"),
        "servegrid": record.get("servegrid"),
        "begun": (environment.get("started") or "")[:16].replace("T", " ") or None,
    }
