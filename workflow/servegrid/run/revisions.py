"""Finished cells keep their weights: no cell is measured again with another revision of its model.

A record has the commits of checkpoint and tokenizer if these are from the Hugging Face Hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servegrid.errors import ModelError, RecordError
from servegrid.study import models
from servegrid.study.deployment import EMULATED, Deployment
from servegrid.study.grid import Study
from servegrid.study.hub import HubName
from servegrid.study.revisions import LOCK, read_revisions

_RECORDED = {"checkpoint": "revision", "tokenizer": "tokenizer_revision"}
"""The key of a deployment, and the key of a record's `engine` with its commit."""


@dataclass(frozen=True)
class Measured:
    """A record of a deployment: its file, the deployment's specification, and its models.

    `models` has the name in the Hub and the commit, by the deployment's key.
    """

    file: Path
    spec: Mapping[str, Any]
    models: Mapping[str, tuple[str, str]]

    @classmethod
    def read(cls, file: Path) -> Measured | None:
        """None if the file is no record; the rule that gathers the records names it."""
        from servegrid.records import parquet

        try:
            record = parquet.read_record(file)
            spec, engine = record["spec"]["deployment"], record["engine"]
            found = {key: (spec[key], engine.get(name)) for key, name in _RECORDED.items()}
            known = {key: pair for key, pair in found.items() if _is_pair(*pair)}
        except (RecordError, LookupError, TypeError, AttributeError):
            return None
        return cls(file, spec, known)

    @property
    def commits(self) -> dict[str, str]:
        """The commits by name."""
        return dict(self.models.values())


def find_measured(study: Study, cells: Path) -> dict[str, Measured]:
    """One record of each deployment that has one, by the deployment's name."""
    found: dict[str, Measured] = {}
    for trial in study.all_trials:
        file = cells / trial.id / "requests.parquet"
        if trial.unsupported:
            continue  # its record knows no model
        if trial.deployment.name not in found and file.exists() and (each := Measured.read(file)):
            found[trial.deployment.name] = each
    return found


def commits_by_name(files: Iterable[Path]) -> dict[str, set[str]]:
    """The commits in records, by name: one, or several if something went wrong."""
    found: dict[str, set[str]] = {}
    for measured in filter(None, map(Measured.read, files)):
        for name, commit in measured.models.values():
            found.setdefault(name, set()).add(commit)
    return found


def pinned_commits(measured: Iterable[Measured], locked: Mapping[str, str]) -> dict[str, str]:
    """The commits by name that a study must keep: those of its lock file and of its records."""
    pinned: dict[str, str] = {}
    for each in measured:
        pinned |= each.commits
    return {**pinned, **locked}


def check_same_revisions(
    deployment: Deployment, measured: Measured, commits: Mapping[str, str], results: Path
) -> None:
    """Raise ModelError if `commits`, by name, are others than those of the deployment's cells.

    Another model is no other revision: then the cells are measured again, as after every change of
    a specification.
    """
    for key, (name_before, before) in measured.models.items():
        name = getattr(deployment, key)
        now = commits.get(name)
        if now is None or now == before or _repo(name) != _repo(name_before):
            continue
        wrong = f"deployment `{deployment.name}`: its cells were measured with revision {before} of"
        if name == name_before:
            raise ModelError(
                f"{wrong} `{name}` ({measured.file}), but {results / LOCK} says {now}. Cells of "
                "one deployment must have the same weights. Correct this entry of the lock file. "
                "To measure the other revision as well, add a deployment with another `name` and "
                f"`{key}: {_repo(name)}@{now}`."
            )
        raise ModelError(
            f"{wrong} `{_repo(name)}` ({measured.file}), but the study's `{key}: {name}` is "
            f"{now}. A run would measure these cells again. To keep them, write "
            f"`{key}: {_repo(name)}@{before}`, or give the deployment another `name`. To measure "
            f"them again, first delete {measured.file.parents[2]}."
        )


def read_pinned(deployment: Deployment, results: Path) -> dict[str, str]:
    """The commits of the lock file, for an allocation of `deployment`.

    An allocation can wait for days. Raises ModelError if the lock file has changed meanwhile: if it
    has no entry for a model of the deployment, or another commit than its cells.
    """
    locked = read_revisions(results)
    if deployment.engine == EMULATED:
        return locked
    for key in _RECORDED:
        name = getattr(deployment, key)
        if name and name not in locked and models.find_revision(name, {}):
            raise ModelError(
                f"deployment `{deployment.name}`: {results / LOCK} has no entry for its "
                f"`{key}: {name}`. It was there when the run began. Run the same command again: it "
                "pins the revision."
            )
    for file in (results / "cells" / deployment.name).glob("*/*/requests.parquet"):
        measured = Measured.read(file)
        if measured and measured.spec == deployment.spec:
            check_same_revisions(deployment, measured, locked, results)
            break
    return locked


def _is_pair(name: str, commit: str | None) -> bool:
    """Whether these are a name in the Hub and a commit. A record of a bundle can have any text."""
    return bool(commit and HubName.parse(name) and HubName(name, commit).commit)


def _repo(name: str) -> str | None:
    parsed = HubName.parse(name)
    return parsed.repo if parsed else None
