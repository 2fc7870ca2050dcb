"""Checks before a run: it reports what is sure to fail, and starts nothing."""

from __future__ import annotations

from pathlib import Path

from servegrid.client import prompts
from servegrid.engines import EMULATED, EXTERNAL
from servegrid.errors import ModelError
from servegrid.study import models
from servegrid.study.grid import Deployment, Study
from servegrid.study.tokenizer import MissingPackageError


def check_ready(study: Study, cells: str | Path) -> None:
    """Raise an error if this machine can already see that a deployment of the study will fail.

    ModelError: a model is missing, or prompts cannot be made with its tokenizer. ConfigError: the
    arguments of an emulated deployment are wrong. EngineError: the API key of an external
    deployment is missing. Deployments whose records in the folder `cells` are complete are not
    checked.
    """
    to_measure = {
        trial.deployment.name: trial.deployment
        for trial in study.all_trials
        if not (Path(cells) / trial.id / "requests.parquet").exists()
    }
    for deployment in to_measure.values():
        if deployment.engine == EMULATED:
            from servegrid.engines.emulated import parse_settings

            parse_settings(deployment)
        else:
            if deployment.engine == EXTERNAL:
                from servegrid.engines.external import resolve_endpoint

                resolve_endpoint(deployment)
            _check_models(deployment)


def _check_models(deployment: Deployment) -> None:
    folder = models.default_folder()
    try:
        if deployment.engine != EXTERNAL:
            models.locate(deployment.checkpoint, folder)
        prompts.check_tokenizer(models.locate(deployment.tokenizer, folder))
    except MissingPackageError as error:
        # The job's own Python, which has the engine, may have the package.
        if deployment.environment == "main":
            raise _named(deployment, error) from None
    except ModelError as error:
        raise _named(deployment, error) from None


def _named(deployment: Deployment, error: ModelError) -> ModelError:
    return ModelError(f"deployment `{deployment.name}`: {error}")
