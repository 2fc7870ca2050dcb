"""Published figures that come with the package; README.md says from where."""

from __future__ import annotations

from functools import cache

import pandas as pd

from servegrid.reference.published import FOLDER, SOURCES

STUDIES = tuple(SOURCES)
"""Published studies: their cells, as far as they are known, in the columns of `columns.CELLS`."""


@cache
def published(study: str) -> pd.DataFrame:
    """The cells of one of STUDIES; seconds_per_100_tokens is null where none was published."""
    return pd.read_csv(FOLDER / f"{study}.csv")


@cache
def models() -> pd.DataFrame:
    """Shapes of models, by name."""
    return pd.read_csv(FOLDER / "models.csv").set_index("model")


@cache
def gpus() -> pd.DataFrame:
    """What kinds of GPU can do, by name."""
    return pd.read_csv(FOLDER / "gpus.csv").set_index("gpu")


@cache
def systems() -> pd.DataFrame:
    """Systems that Bionic compares: parameters of the model in 10⁹, output tokens/s, price in USD.

    A price that is not given is null.
    """
    return pd.read_csv(FOLDER / "bionic-2023.csv")
