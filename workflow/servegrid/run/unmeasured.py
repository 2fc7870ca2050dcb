"""Records of trials that were not tried: their verdict and its evidence, and no request."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servegrid import __version__
from servegrid.errors import RecordError
from servegrid.records import columns, parquet
from servegrid.records.verdict import UNSUPPORTED, Verdict
from servegrid.study.deployment import EMULATED, EXTERNAL
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Deployment, Trial


@dataclass(frozen=True)
class RefusedEngine:
    """Takes the place of an engine that cannot start: all its cells get the same verdict."""

    endpoint: Endpoint
    facts: dict[str, Any]
    verdict: Verdict
    errors: None = None

    @classmethod
    def of(cls, deployment: Deployment, verdict: Verdict) -> RefusedEngine:
        return cls(Endpoint("", deployment.model, None), planned_facts(deployment), verdict)

    def pids(self) -> list[int]:
        return []

    def healthy(self) -> bool:
        return True


def planned_facts(deployment: Deployment) -> dict[str, Any]:
    """What is known about an engine that did not start: what the study says."""
    name, arguments = deployment.engine, dict(deployment.engine_args)
    if name == EXTERNAL:
        assert deployment.endpoint is not None
        return {"engine": deployment.endpoint.engine, "external": True}
    scale = {"time_scale": arguments.get("time_scale", 1.0)} if name == EMULATED else {}
    return {"engine": name, "engine_args": arguments, **scale}


def refuse_trial(trial: Trial, requests: Path, samples: Path) -> str:
    """Write the records of a trial that cannot work, without an allocation. Returns its verdict."""
    verdict = Verdict(UNSUPPORTED, trial.unsupported)
    nowhere = {"allocation": None, "started": None}
    return write_unmeasured(
        trial, verdict, requests, samples, planned_facts(trial.deployment), nowhere
    )


def record_files(folder: Path) -> tuple[Path, Path]:
    """The two files of a trial."""
    return folder / "requests.parquet", folder / "telemetry.parquet"


def read_if_present(folder: Path) -> dict[str, Any]:
    """The record of a trial; empty if it is missing or damaged."""
    with contextlib.suppress(RecordError):
        return parquet.read_record(record_files(folder)[0])
    return {}


def remove_record(folder: Path) -> None:
    """Remove the files of a trial, if they exist. Raises RecordError if that fails."""
    for file in record_files(folder):
        parquet.remove(file)


def write_unmeasured(
    trial: Trial,
    verdict: Verdict,
    requests: Path,
    samples: Path,
    engine: Mapping[str, Any],
    environment: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """Write the two files of a trial that was not tried, and return its verdict.

    Raises RecordError if they cannot be written.
    """
    record = {
        "format": parquet.RECORD_FORMAT,
        "servegrid": __version__,
        "spec": trial.spec,
        "spec_digest": trial.digest,
        **verdict.record,
        "client": {},
        "engine": dict(engine),
        "environment": dict(environment),
        "calibration": calibration,
        "metrics_before": None,
        "metrics_after": None,
    }
    parquet.check_writable(requests.parent)
    parquet.remove_half_written(requests.parent)
    parquet.write_table(parquet.arrow_table(columns.TELEMETRY, [], record), samples)
    parquet.write_table(parquet.arrow_table(columns.REQUESTS, [], record), requests)
    return verdict.name
