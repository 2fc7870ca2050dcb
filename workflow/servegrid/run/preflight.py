"""Checks before a run: it reports what is sure to fail, and starts nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from servegrid.engines import EMULATED, EXTERNAL
from servegrid.errors import ModelError, RecordError
from servegrid.study import hub, models
from servegrid.study.grid import Deployment, Study, Trial
from servegrid.study.revisions import LOCK, add_revisions, read_revisions
from servegrid.study.tokenizer import MissingPackageError


def check_ready(study: Study, cells: str | Path) -> None:
    """Raise an error if this machine can already see that a deployment of the study will fail.

    ModelError: a model is missing, prompts cannot be made with its tokenizer, or it has another
    revision than the cells that are measured. ConfigError: the arguments of an emulated deployment
    are wrong. EngineError: the API key of an external deployment is missing. Deployments whose
    records in the folder `cells` are complete are not checked.

    The revisions of models of the Hugging Face Hub become part of the lock file beside `cells`.
    """
    results = Path(cells).parent
    locked = read_revisions(results)
    used: dict[str, str] = {}
    for deployment, measured in _to_measure(study, Path(cells)):
        if deployment.engine == EMULATED:
            from servegrid.engines.emulated import parse_settings

            parse_settings(deployment)
            continue
        if deployment.engine == EXTERNAL:
            from servegrid.engines.external import resolve_endpoint

            resolve_endpoint(deployment)
        try:
            recorded = _recorded_revisions(deployment, measured, Path(cells))
            _check_same(deployment, recorded, locked, results)
            revisions = {**recorded, **locked}
            _check_models(deployment, revisions)
        except ModelError as error:
            raise ModelError(f"deployment `{deployment.name}`: {error}") from None
        for name in filter(None, (deployment.checkpoint, deployment.tokenizer)):
            if commit := models.find_revision(name, {**used, **revisions}):
                used[name] = commit
    add_revisions(results, used)


def _to_measure(study: Study, cells: Path) -> Iterator[tuple[Deployment, Trial | None]]:
    """Each deployment with missing trials, and one of its trials that is measured."""
    missing: dict[str, Deployment] = {}
    measured: dict[str, Trial] = {}
    for trial in study.all_trials:
        if (cells / trial.id / "requests.parquet").exists():
            measured.setdefault(trial.deployment.name, trial)
        else:
            missing.setdefault(trial.deployment.name, trial.deployment)
    for name, deployment in missing.items():
        yield deployment, measured.get(name)


def _recorded_revisions(
    deployment: Deployment, measured: Trial | None, cells: Path
) -> dict[str, str]:
    """The commits with which a measured trial of the same deployment was made, by name."""
    engine: Mapping[str, str] = {}
    if measured is not None:
        from servegrid.records import parquet

        with contextlib.suppress(RecordError):  # The rule that gathers the records names it.
            record = parquet.read_record(cells / measured.id / "requests.parquet")
            if record["spec"]["deployment"] == deployment.spec:
                engine = record["engine"]
    found = {
        deployment.checkpoint: engine.get("revision"),
        deployment.tokenizer: engine.get("tokenizer_revision"),
    }
    return {name: commit for name, commit in found.items() if commit}


def _check_same(
    deployment: Deployment, recorded: Mapping[str, str], locked: Mapping[str, str], results: Path
) -> None:
    for name, before in recorded.items():
        now = locked.get(name, before)
        if now != before:
            raise ModelError(
                f"its cells in {results} were measured with revision {before} of `{name}`, but "
                f"{results / LOCK} says {now}. Cells of one deployment must have the same weights. "
                "Correct the lock file. To measure the other revision, write "
                f"`{name.partition('@')[0]}@{now}` in the study."
            )


def _check_models(deployment: Deployment, revisions: Mapping[str, str]) -> None:
    # Not at the top: every start of Snakemake imports this module, also a dry run.
    from servegrid.client import prompts

    folder = models.default_folder()
    if deployment.engine != EXTERNAL:
        checkpoint = models.locate(deployment.checkpoint, folder, revisions)
        if models.find_revision(deployment.checkpoint, revisions):
            hub.check_weights(checkpoint)
    try:
        prompts.check_tokenizer(models.locate(deployment.tokenizer, folder, revisions))
    except MissingPackageError:
        # The job's own Python, which has the engine, may have the package.
        if deployment.environment == "main":
            raise
