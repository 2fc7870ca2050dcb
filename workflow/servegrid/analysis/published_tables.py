"""The published tables as `analysis.prediction` needs them. Pure."""

from __future__ import annotations

import numpy as np
import pandas as pd

from servegrid.analysis.prediction import Bursts, Points, Table, deployment_traits
from servegrid.reference import data
from servegrid.reference.memory import find_device, place
from servegrid.reference.roofline import model_shape
from servegrid.study.deployment import VLLM, Deployment

MAX_MODEL_LEN = 4096
"""An assumption: the article does not say it."""
_KEYS = ("model", "quantization", "gpu", "gpu_count")


def published_deployments(study: str = "inria-2024") -> list[Deployment]:
    """The deployments of a published data set, in its order."""
    rows = data.published_cells(study)[list(_KEYS)].drop_duplicates().to_dict("records")
    return [
        Deployment(
            name=f"{row['model']}/{row['quantization']}/{row['gpu_count']}x{row['gpu']}",
            checkpoint=row["model"],
            tokenizer=row["model"],
            engine=VLLM,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=256,
            **{str(key): value for key, value in row.items()},
        )
        for row in rows
    ]


def published_tables(study: str = "inria-2024") -> list[Table]:
    """The served cells of a published data set, one table per deployment."""
    cells = data.published_cells(study).dropna(subset="seconds_per_100_tokens")
    tables = []
    for deployment in published_deployments(study):
        device = find_device(deployment.gpu)
        placement = place(deployment, model_shape(deployment), device)
        bursts = _bursts(cells, deployment)
        traits = deployment_traits(deployment, placement, device)
        tables.append(Table(deployment.name, traits, bursts.points, bursts.seconds))
    return tables


def published_bursts(study: str = "inria-2024") -> list[Bursts]:
    """All cells of a published data set by deployment, in the order of `published_tables`.

    The seconds of a cell that was not served (a dash in the article) are NaN.
    """
    cells = data.published_cells(study)
    return [_bursts(cells, deployment) for deployment in published_deployments(study)]


def _bursts(cells: pd.DataFrame, deployment: Deployment) -> Bursts:
    mask = np.logical_and.reduce([cells[key] == getattr(deployment, key) for key in _KEYS])
    rows = cells[mask]
    points = Points.of(rows["concurrency"], rows["input_len"], rows["output_len"])
    return Bursts(points, rows["seconds_per_100_tokens"].to_numpy(float) * points.output_len / 100)
