"""The data files of this package as tables. README.md names their sources."""

from __future__ import annotations

from functools import cache

import pandas as pd

from servegrid.reference.published import FOLDER, SOURCES

STUDIES = tuple(SOURCES)
"""The names of the published data sets. Their columns are named as in docs/columns.md."""


@cache
def published_cells(study: str) -> pd.DataFrame:
    """The cells of one of STUDIES. An unpublished `seconds_per_100_tokens` is null."""
    return pd.read_csv(FOLDER / f"{study}.csv")


@cache
def models() -> pd.DataFrame:
    """The shapes of models by name."""
    return pd.read_csv(FOLDER / "models.csv").set_index("model")


@cache
def gpus() -> pd.DataFrame:
    """The memory, bandwidth, FLOP/s, links and power of GPUs by name."""
    return pd.read_csv(FOLDER / "gpus.csv").set_index("gpu")


@cache
def quantizations() -> pd.DataFrame:
    """Bits per parameter, kernels and the least compute capability of quantizations by name."""
    return pd.read_csv(FOLDER / "quantizations.csv").set_index("quantization")


@cache
def systems() -> pd.DataFrame:
    """The systems of Bionic's page: parameters in 10⁹, hardware, output tokens/s, price in USD.

    An unknown price is null.
    """
    return pd.read_csv(FOLDER / "bionic-2023.csv")
