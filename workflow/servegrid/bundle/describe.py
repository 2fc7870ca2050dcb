"""Describes a study for the readers of its bundle: environments, models, times, README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from servegrid import __version__
from servegrid.bundle.layout import (
    CELLS,
    CONFIGURATION,
    CRATE,
    ENVIRONMENTS,
    FIGURES,
    HARDWARE,
    LOGS,
    MANIFEST,
    METADATA,
    MODELS,
    SOURCE,
    TABLES,
)
from servegrid.study.deployment import canonical_json
from servegrid.study.grid import Study

Records = Mapping[str, Mapping[str, Any]]
"""The record of each trial, by the trial's id."""


def describe_environments(records: Records) -> list[dict[str, Any]]:
    """Each distinct environment of the jobs, with the bring-ups in it."""
    found: dict[str, dict[str, Any]] = {}
    for trial, record in records.items():
        environment = dict(record["environment"])
        if environment.get("allocation", "") is None:
            continue  # decided before anything was submitted
        bring_up = {key: environment.pop(key, None) for key in ("allocation", "started", "job")}
        bring_up |= {"deployment": trial.partition("/")[0], "engine": record["engine"]}
        entry = found.setdefault(
            canonical_json(environment), {"environment": environment, "bring_ups": []}
        )
        if bring_up not in entry["bring_ups"]:
            entry["bring_ups"].append(bring_up)
    return list(found.values())


def describe_models(study: Study, records: Records) -> dict[str, dict[str, Any]]:
    """What each deployment served. A value that its records do not have is null."""
    engines: dict[str, dict[str, Any]] = {}
    for trial, record in records.items():
        engines.setdefault(trial.partition("/")[0], {}).update(record["engine"])
    return {
        deployment.name: {
            "model": deployment.model,
            "checkpoint": deployment.checkpoint,
            "tokenizer": deployment.tokenizer,
            "quantization": deployment.quantization,
            "revision": engines.get(deployment.name, {}).get("revision"),
            "files": engines.get(deployment.name, {}).get("model_files"),
        }
        for deployment in study.deployments
    }


def find_times(records: Iterable[Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """The start of the first workload and the end of the last one, if the records have them."""
    clients = [record["client"] for record in records]
    started = [
        datetime.fromisoformat(client["started_at"]) for client in clients if "started_at" in client
    ]
    ended = [
        datetime.fromtimestamp((client["window_ns"][1] + offset) // 10**9, UTC)
        for client in clients
        if (offset := client.get("clock_offset_after_ns")) is not None
    ]
    return _format_time(min(started, default=None)), _format_time(max(ended, default=None))


def _format_time(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="seconds")


def render_readme(study: Study, missing: int) -> str:
    """README.md, for readers without servegrid."""
    total = len(study.all_trials)
    partial = f" {missing} are missing; `missing` in `{METADATA}` lists them." if missing else ""
    return f"""# Study {study.name}

A benchmark of language models, made with servegrid {__version__}. It contains {total - missing} of
{total} trials.{partial}

| path | content |
|---|---|
| `{CONFIGURATION}`, `{HARDWARE}` | the resolved configuration, and prices |
| `{CELLS}/` | the raw records as Parquet: one row per request, and the telemetry |
| `{TABLES}/`, `{FIGURES[0]}/`, `{FIGURES[1]}/` | derived from the records; not in a partial study |
| `{LOGS}/` | logs, and Slurm's records of the jobs, redacted |
| `{ENVIRONMENTS}`, `{MODELS}` | the environments of the jobs, and the models |
| `{SOURCE}/` | the workflow and the profiles, for reading; `{METADATA}` has the commit |
| `{MANIFEST}` | the hash of every file: `sha256sum -c {MANIFEST}` |
| `{CRATE}` | the same as a Workflow Run RO-Crate |

`servegrid verify` checks the bundle. `servegrid unpack` turns it into a folder in which the study
can continue.
"""
