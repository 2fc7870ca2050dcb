"""Predicts the cells of a deployment, with intervals, from the calibration of this package.

The calibration (`reference/calibration.json`) is fitted to the published tables;
`bench/prediction.py --write` makes it again. Cells that the user has measured narrow the intervals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np

from servegrid.analysis.prediction import (
    OUTPUT_LEN,
    Bursts,
    Constants,
    Floats,
    Indices,
    Points,
    Table,
    Traits,
    burst_seconds,
    fit_constants,
    log_residuals,
)
from servegrid.analysis.published_tables import published_tables
from servegrid.analysis.residuals import Z_95, Covariance, Observed, choose_cells, condition
from servegrid.reference.published import FOLDER
from servegrid.study.deployment import CPU, EMULATED, EXTERNAL, VLLM

CALIBRATION = FOLDER / "calibration.json"

UNSEEN = {"architecture": 0.20, "kernel": 0.15, "engine": 0.50, CPU: 0.80}
"""Further standard deviations of the level, on a logarithmic scale: for a kind of GPU, a kernel, or
an engine that no table has, and for a CPU. The first is what leaving a kind of GPU out needs; the
others are judgements, and generous."""
UNSEEN_OUTPUT = 0.15
"""The same per factor of e between the output length and that of the tables."""
MAX_OBSERVED = 600
"""Only so many of a deployment's measured cells are used, evenly spread: the work is cubic."""
MAX_CANDIDATES = 150
"""Only so many cells of a deployment are compared when cells to measure first are chosen."""
MIN_CELLS_TO_FIT = 8
"""A deployment of the user joins the fit of the constants from this number of measured cells on."""


@dataclass(frozen=True)
class Calibration:
    """The constants of all deployments, and the covariance of what they do not explain."""

    constants: Constants
    covariance: Covariance

    def to_json(self) -> str:
        """The text of the calibration's file."""
        rounded = {name: round(score, 4) for name, score in self.constants.items()}
        parts = {name: round(value, 4) for name, value in asdict(self.covariance).items()}
        return json.dumps({"constants": rounded, "covariance": parts}, indent=1) + "\n"


@cache
def load_calibration() -> Calibration:
    """The calibration of this package."""
    stored = json.loads(CALIBRATION.read_text(encoding="utf-8"))
    return Calibration(stored["constants"], Covariance(**stored["covariance"]))


def refit(calibration: Calibration, own: Sequence[Table]) -> Calibration:
    """The calibration with the user's own tables, if one of them has enough cells."""
    enough = [table for table in own if len(table.points) >= MIN_CELLS_TO_FIT]
    if not enough:
        return calibration
    tables = [*published_tables(), *enough]
    return Calibration(fit_constants(tables), calibration.covariance)


def novelties(traits: Traits, engine: str, constants: Constants) -> dict[str, str]:
    """What no table has, by keys of UNSEEN, each as a text."""
    found = {}
    if traits.architecture == CPU:
        found[CPU] = "a CPU"
    elif f"launch@{traits.architecture}" not in constants:
        found["architecture"] = f"GPUs of the architecture {traits.architecture}"
    if f"arithmetic@{traits.kernel}" not in constants:
        found["kernel"] = f"the kernels of the quantization ({traits.kernel})"
    if engine not in (VLLM, EMULATED, EXTERNAL):
        found["engine"] = f"the engine {engine}"
    return found


@dataclass(frozen=True)
class Expectation:
    """Seconds of bursts: the expected value and its 95% interval, arrays of one length."""

    seconds: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Predictor:
    """Predicts bursts of one deployment. `observed` are its measured cells, if there are any.

    `unseen` says what no table has; `level` is the standard deviation of the residual's level.
    """

    traits: Traits
    calibration: Calibration
    unseen: Mapping[str, str]
    observed: Observed | None = None

    @property
    def level(self) -> float:
        known = self.calibration.covariance.level
        return math.hypot(known, *(UNSEEN[key] for key in self.unseen))

    def predict(self, points: Points) -> Expectation:
        """The seconds until each burst's last request has its last token."""
        mean, sd = condition(self.calibration.covariance, points, self.observed, self.level)
        lengths = np.abs(np.log(points.output_len / OUTPUT_LEN))
        noise = self.calibration.covariance.noise
        sd = np.sqrt(sd**2 + noise**2 + (UNSEEN_OUTPUT * lengths) ** 2)
        seconds = burst_seconds(self.calibration.constants, self.traits, points) * np.exp(mean)
        return Expectation(seconds, seconds * np.exp(-Z_95 * sd), seconds * np.exp(Z_95 * sd))

    def teach(self, points: Points, count: int) -> list[int]:
        """The positions of the `count` cells whose measurement narrows the intervals most."""
        candidates = spread(len(points), MAX_CANDIDATES)
        chosen = choose_cells(
            self.calibration.covariance,
            points.take(candidates),
            count,
            self.level,
            self.observed,
        )
        return [int(candidates[index]) for index in chosen]


def make_predictor(
    traits: Traits, engine: str, calibration: Calibration, measured: Bursts | None = None
) -> Predictor:
    """The predictor of a deployment with its own measured cells."""
    unseen = novelties(traits, engine, calibration.constants)
    if measured is None or not len(measured.points):
        return Predictor(traits, calibration, unseen)
    points = evenly(measured.points, MAX_OBSERVED)
    seconds = measured.seconds[spread(len(measured.points), MAX_OBSERVED)]
    residuals = log_residuals(calibration.constants, Table("", traits, points, seconds))
    variances = np.full(len(points), calibration.covariance.noise**2)
    return Predictor(traits, calibration, unseen, Observed(points, residuals, variances))


def spread(length: int, count: int) -> Indices:
    """At most `count` positions, evenly spread over `length`."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).astype(np.int64))


def evenly(points: Points, count: int) -> Points:
    """At most `count` of the points, evenly spread."""
    return points.take(spread(len(points), count))
