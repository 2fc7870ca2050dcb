"""Describes a bundle as a Workflow Run RO-Crate, which other software can read.

The terms come from RO-Crate 1.1 (https://w3id.org/ro/crate/1.1) and its profile Workflow Run
Crate 0.5 (https://w3id.org/ro/wfrun/workflow/0.5). Unknown values are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from servegrid.bundle.layout import CRATE, README, SOURCE

WORKFLOW = f"{SOURCE}/Snakefile"
LICENSE = f"{SOURCE}/LICENSE"
_PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": ("Process Run Crate", "0.5"),
    "https://w3id.org/ro/wfrun/workflow/0.5": ("Workflow Run Crate", "0.5"),
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": ("Workflow RO-Crate", "1.0"),
}
_FORMATS = {
    ".csv": "text/csv",
    ".html": "text/html",
    ".json": "application/json",
    ".log": "text/plain",
    ".md": "text/markdown",
    ".parquet": "application/vnd.apache.parquet",
    ".patch": "text/x-diff",
    ".png": "image/png",
    ".py": "text/x-python",
    ".svg": "image/svg+xml",
    ".toml": "application/toml",
    ".txt": "text/plain",
    ".yaml": "application/yaml",
}
_OTHER_FORMAT = "text/plain"
"""For Snakefiles, LICENSE, lists of packages, captions of a report."""
_WORKFLOW_PROFILE = "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"


@dataclass(frozen=True)
class CrateFile:
    """One file of the bundle."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class RunFacts:
    """Facts about the whole study. Times are ISO 8601, None if unknown."""

    study: str
    version: str
    configuration: str
    started: str | None
    ended: str | None
    missing: Sequence[str]
    """Trials of the study that are not in the bundle."""


def build_crate(
    run: RunFacts, files: Sequence[CrateFile], unhashed: Sequence[str]
) -> dict[str, Any]:
    """The JSON-LD of a bundle with `files`. It lists `unhashed` files, written later, by name."""
    results = [file.name for file in files if _is_result(file.name)]
    names = sorted({file.name for file in files})
    graph = [
        {
            "@id": CRATE,
            "@type": "CreativeWork",
            "conformsTo": [
                {"@id": "https://w3id.org/ro/crate/1.1"},
                {"@id": "https://w3id.org/workflowhub/workflow-ro-crate/1.0"},
            ],
            "about": {"@id": "./"},
        },
        _root(run, [*names, *unhashed]),
        *(
            {"@id": url, "@type": "CreativeWork", "name": name, "version": version}
            for url, (name, version) in _PROFILES.items()
        ),
        {
            "@id": "#licence",
            "@type": "CreativeWork",
            "name": "No licence stated",
            "description": "The study states no licence for its results. The workflow's licence is "
            f"in the file {LICENSE}.",
        },
        {
            "@id": "#snakemake",
            "@type": "ComputerLanguage",
            "name": "Snakemake",
            "identifier": {"@id": "https://snakemake.readthedocs.io"},
            "url": {"@id": "https://snakemake.readthedocs.io"},
        },
        {
            "@id": "#servegrid",
            "@type": "SoftwareApplication",
            "name": "servegrid",
            "softwareVersion": run.version,
        },
        {
            "@id": _WORKFLOW_PROFILE,
            "@type": "CreativeWork",
            "name": "ComputationalWorkflow",
            "version": "1.0-RELEASE",
        },
        _action(run, results),
        *(_file(file, run.version) for file in files),
        *(
            {"@id": name, "@type": "File", "name": name, "encodingFormat": _OTHER_FORMAT}
            for name in unhashed
        ),
    ]
    return {
        "@context": [
            "https://w3id.org/ro/crate/1.1/context",
            "https://w3id.org/ro/terms/workflow-run/context",
        ],
        "@graph": graph,
    }


def parse_files(data: Mapping[str, Any]) -> dict[str, CrateFile]:
    """The files that a crate describes with size and hash, by their names.

    Raises KeyError, TypeError or ValueError if `build_crate` did not make `data`.
    """
    found: dict[str, CrateFile] = {}
    for entity in data["@graph"]:
        types = entity["@type"]
        if "File" in (types if isinstance(types, list) else [types]) and "sha256" in entity:
            name = str(entity["@id"])
            if name in found:
                raise ValueError(f"{name} is described twice")
            found[name] = CrateFile(name, int(entity["contentSize"]), str(entity["sha256"]))
    return found


def _root(run: RunFacts, names: Sequence[str]) -> dict[str, Any]:
    about = "Benchmark of language models with servegrid"
    partial = (
        f" This study is partial: {len(run.missing)} trials are missing." if run.missing else ""
    )
    return _without_null(
        {
            "@id": "./",
            "@type": "Dataset",
            "name": f"Study {run.study}" + (" (partial)" if run.missing else ""),
            "description": f"{about}: raw records, configuration, workflow, tables.{partial}",
            "datePublished": run.ended or run.started,
            "license": {"@id": "#licence"},
            "conformsTo": [{"@id": url} for url in _PROFILES],
            "mainEntity": {"@id": WORKFLOW},
            "mentions": {"@id": "#run"},
            "hasPart": [{"@id": name} for name in names],
        }
    )


def _action(run: RunFacts, results: Sequence[str]) -> dict[str, Any]:
    status = "FailedActionStatus" if run.missing else "CompletedActionStatus"
    error = "Not measured: " + ", ".join(run.missing) if run.missing else None
    return _without_null(
        {
            "@id": "#run",
            "@type": "CreateAction",
            "name": f"Measurement of the study {run.study}",
            "description": "Each deployment was started and benchmarked under each workload.",
            "instrument": {"@id": WORKFLOW},
            "object": {"@id": run.configuration},
            "result": [{"@id": name} for name in results],
            "startTime": run.started,
            "endTime": run.ended,
            "actionStatus": {"@id": f"http://schema.org/{status}"},
            "error": error,
        }
    )


def _file(file: CrateFile, version: str) -> dict[str, Any]:
    entity: dict[str, Any] = {
        "@id": file.name,
        "@type": "File",
        "name": PurePosixPath(file.name).name,
        "contentSize": file.bytes,
        "sha256": file.sha256,
    }
    if file.name == WORKFLOW:
        entity |= {
            "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow"],
            "name": "servegrid",
            "programmingLanguage": {"@id": "#snakemake"},
            "license": {"@id": LICENSE},
            "version": version,
            "softwareRequirements": {"@id": "#servegrid"},
            "conformsTo": {"@id": _WORKFLOW_PROFILE},
        }
    elif file.name == README:
        entity |= {"about": {"@id": "./"}}
    kind = _FORMATS.get(PurePosixPath(file.name).suffix, _OTHER_FORMAT)
    return entity | {"encodingFormat": kind}


def _is_result(name: str) -> bool:
    return name.startswith("results/") and not name.startswith("results/logs/")


def _without_null(entity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entity.items() if value is not None}
