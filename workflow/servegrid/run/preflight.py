"""Checks before a run: it reports what is sure to fail, and starts nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from servegrid.engines import EMULATED, EXTERNAL
from servegrid.engines.extras import find_extras
from servegrid.errors import ModelError
from servegrid.run.revisions import (
    Measured,
    check_same_revisions,
    find_measured,
    pinned_commits,
)
from servegrid.study import hub, models
from servegrid.study.grid import Deployment, Study, Workload
from servegrid.study.revisions import add_revisions, read_revisions
from servegrid.study.tokenizer import MissingPackageError


def check_ready(study: Study, cells: str | Path) -> None:
    """Raise an error if this machine can already see that a deployment of the study will fail.

    ModelError: a model, a LoRA adapter or a chat template is missing, prompts cannot be made with
    its tokenizer, or it has another revision than the cells that are measured. ConfigError: the
    arguments of an emulated deployment are wrong. LoadError: a text of a workload's file is too
    long. EngineError: the API key of an external deployment is missing. Of deployments whose
    records in the folder `cells` are complete, only the revision is checked.

    The revisions of models of the Hugging Face Hub become part of the lock file beside `cells`.
    """
    results = Path(cells).parent
    locked = read_revisions(results)
    measured = find_measured(study, Path(cells))
    pinned = pinned_commits(measured.values(), locked)
    used: dict[str, str] = {}
    for deployment, complete in _deployments(study, Path(cells), measured):
        names = [each for each in (deployment.checkpoint, deployment.tokenizer) if each]
        if deployment.name in measured:
            check_same_revisions(deployment, measured[deployment.name], pinned, results)
            used |= {name: pinned[name] for name in names if name in pinned}
        if complete:
            continue
        if deployment.engine == EMULATED:
            from servegrid.engines.emulated import parse_settings

            parse_settings(deployment)
            continue
        if deployment.engine == EXTERNAL:
            from servegrid.engines.external import resolve_endpoint

            resolve_endpoint(deployment)
        found = {name: models.find_revision(name, pinned) for name in names}
        used |= {name: commit for name, commit in found.items() if commit}
        if deployment.name in measured:
            check_same_revisions(deployment, measured[deployment.name], used, results)
        find_extras(deployment)
        try:
            _check_models(deployment, {**pinned, **used})
            _check_files(study, deployment, {**pinned, **used})
        except ModelError as error:
            raise ModelError(f"deployment `{deployment.name}`: {error}") from None
    add_revisions(results, used)


def _deployments(
    study: Study, cells: Path, measured: Mapping[str, Measured]
) -> Iterator[tuple[Deployment, bool]]:
    """Each deployment, and whether its records are complete and have its specification."""
    incomplete: set[str] = set()
    for trial in study.all_trials:
        name = trial.deployment.name
        if name not in incomplete and not (cells / trial.id / "requests.parquet").exists():
            incomplete.add(name)  # one missing cell is enough: this runs at every start
    for deployment in study.deployments:
        record = measured.get(deployment.name)
        changed = record is not None and record.spec != deployment.spec
        yield deployment, not changed and deployment.name not in incomplete


def _check_files(study: Study, deployment: Deployment, revisions: Mapping[str, str]) -> None:
    """Raise LoadError if a text of a file is too long, or too few are short enough.

    Without the package that reads the tokenizer, the job finds this.
    """
    from servegrid.client import content

    needed: dict[str, Workload] = {}
    for trial in study.all_trials:
        workload, path = trial.workload, study.source_file(trial)
        if trial.deployment.name == deployment.name and path and workload.source is not None:
            known = needed.get(path)
            if known is None or (workload.requests or 1) > (known.requests or 1):
                needed[path] = workload
    for path, workload in needed.items():
        if workload.source is not None and workload.source.kind == "file":
            folder = models.locate(
                deployment.tokenizer, models.default_folder(), revisions, "tokenizer"
            )
            with contextlib.suppress(MissingPackageError):
                content.check_lengths(Path(path), workload, folder)


def _check_models(deployment: Deployment, revisions: Mapping[str, str]) -> None:
    # Not at the top: every start of Snakemake imports this module, also a dry run.
    from servegrid.client import prompts

    folder = models.default_folder()
    if deployment.engine != EXTERNAL:
        checkpoint = models.locate(deployment.checkpoint, folder, revisions)
        if models.find_revision(deployment.checkpoint, revisions):
            hub.check_weights(checkpoint)
    try:
        prompts.check_tokenizer(models.locate(deployment.tokenizer, folder, revisions, "tokenizer"))
    except MissingPackageError:
        # The job's own Python, which has the engine, may have the package.
        if deployment.environment == "main":
            raise
