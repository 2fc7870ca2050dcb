"""What can be known to fail before anything is started."""

from __future__ import annotations

from pathlib import Path

from servegrid import models
from servegrid.errors import ModelError
from servegrid.grid import Study


def refuse_missing_models(study: Study, cells: str | Path) -> None:
    """Raise ModelError, naming the deployment, where a model that is needed is not there.

    Models of deployments that have all their records in `cells` are not needed.
    """
    to_measure = {
        trial.deployment.name: trial.deployment
        for trial in study.trials
        if not (Path(cells) / trial.id / "requests.parquet").exists()
    }
    for name, deployment in to_measure.items():
        for key in ("checkpoint", "tokenizer"):
            try:
                models.locate(getattr(deployment, key), models.default_folder())
            except ModelError as error:
                raise ModelError(f"deployment `{name}`: {error}") from None
