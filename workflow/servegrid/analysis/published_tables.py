"""The published tables as `analysis.prediction` needs them. Pure."""

from __future__ import annotations

import numpy as np

from servegrid.analysis.prediction import Points, Table, deployment_traits
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
        mask = np.logical_and.reduce([cells[key] == getattr(deployment, key) for key in _KEYS])
        rows, device = cells[mask], find_device(deployment.gpu)
        placement = place(deployment, model_shape(deployment), device)
        points = Points.of(rows["concurrency"], rows["input_len"], rows["output_len"])
        seconds = rows["seconds_per_100_tokens"].to_numpy(float) * points.output_len / 100
        traits = deployment_traits(deployment, placement, device)
        tables.append(Table(deployment.name, traits, points, seconds))
    return tables
