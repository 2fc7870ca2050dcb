"""How far cells are from the model of `analysis.prediction`: a Gaussian process. Pure.

The residual is log(measured / expected). A deployment's residuals are one draw: a level, slopes
over the logarithms of concurrency and prompt length, their product, and what only neighbours share.
The covariance is learnt from tables that the constants had not seen. A measured cell moves the
expectation of its neighbours and narrows their intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from servegrid.analysis.prediction import Floats, Points

Z_95 = 1.96
ROUNDING_S = 0.05 / math.sqrt(3)
"""The standard deviation of rounding to tenths of a second."""

TYPICAL_S = 5.0
"""The duration that is assumed of a cell before it is measured."""


@dataclass(frozen=True)
class Covariance:
    """Standard deviations of the residual's parts, and the two ranges of the local part.

    Coordinates are those of `_coordinates`.
    """

    level: float = 0.15
    concurrency: float = 0.20
    input_len: float = 0.20
    product: float = 0.20
    local: float = 0.06
    range_concurrency: float = 0.35
    range_input_len: float = 0.50
    noise: float = 0.02

    def between(self, first: Points, second: Points, level: float | None = None) -> Floats:
        """The covariances of the residuals of two lists of cells: rows × columns.

        `level` replaces the standard deviation of the level.
        """
        (u, v), (s, t) = _coordinates(first), _coordinates(second)
        outer = np.outer
        near = np.exp(
            -0.5
            * (
                ((u[:, None] - s) / self.range_concurrency) ** 2
                + ((v[:, None] - t) / self.range_input_len) ** 2
            )
        )
        total: Floats = (
            (self.level if level is None else level) ** 2
            + self.concurrency**2 * outer(u, s)
            + self.input_len**2 * outer(v, t)
            + self.product**2 * outer(u * v, s * t)
            + self.local**2 * near
        )
        return total

    def variances(self, points: Points, level: float | None = None) -> Floats:
        """The diagonal of `between(points, points)`."""
        u, v = _coordinates(points)
        total: Floats = (
            (self.level if level is None else level) ** 2
            + (self.concurrency * u) ** 2
            + (self.input_len * v) ** 2
            + (self.product * u * v) ** 2
            + self.local**2
        )
        return total


def _coordinates(points: Points) -> tuple[Floats, Floats]:
    """0 to 1 over the article's grid: 1 to 128 requests, 31 to 2193 prompt tokens."""
    return (
        np.log2(points.concurrency) / 7,
        np.log(points.input_len / 31) / math.log(2193 / 31),
    )


@dataclass(frozen=True)
class Observed:
    """Cells of a deployment that were measured: log(measured / expected), and the noise's variance.

    All arrays have the length of `points`.
    """

    points: Points
    residuals: Floats
    variances: Floats

    @classmethod
    def of(
        cls, points: Points, residuals: Floats, seconds: Floats, covariance: Covariance
    ) -> Observed:
        """Cells with rounded seconds, as published tables have them."""
        return cls(points, residuals, covariance.noise**2 + (ROUNDING_S / seconds) ** 2)


def condition(
    covariance: Covariance, points: Points, observed: Observed | None, level: float | None = None
) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each cell's residual, without the noise of one measurement."""
    prior = covariance.variances(points, level)
    if observed is None or not len(observed.points):
        return np.zeros(len(points)), np.sqrt(prior)
    cross = covariance.between(points, observed.points, level)
    seen = covariance.between(observed.points, observed.points, level) + np.diag(observed.variances)
    gain = np.linalg.solve(seen, cross.T).T
    left = np.clip(prior - np.einsum("ij,ij->i", gain, cross), 0, None)
    return gain @ observed.residuals, np.sqrt(left)


def choose_cells(
    covariance: Covariance,
    points: Points,
    count: int,
    level: float | None = None,
    observed: Observed | None = None,
) -> list[int]:
    """The cells to measure first, by position: each leaves the least mean variance (A-optimal).

    `observed` are the cells that are measured already.
    """
    left = covariance.between(points, points, level)
    if observed is not None and len(observed.points):
        cross = covariance.between(points, observed.points, level)
        seen = covariance.between(observed.points, observed.points, level)
        left = left - cross @ np.linalg.solve(seen + np.diag(observed.variances), cross.T)
    noise = covariance.noise**2 + (ROUNDING_S / TYPICAL_S) ** 2
    chosen: list[int] = []
    for _ in range(min(count, len(points))):
        gains = (left**2).sum(axis=0) / (np.diag(left) + noise)
        gains[chosen] = -1.0
        best = int(np.argmax(gains))
        chosen.append(best)
        left = left - np.outer(left[:, best], left[best]) / (left[best, best] + noise)
    return chosen


def learn_covariance(tables: Sequence[Observed]) -> Covariance:
    """The most probable covariance, given the residuals of deployments as independent draws.

    `variances` of the tables are those of the rounding alone. Each standard deviation and range has
    a log-normal prior around the defaults of `Covariance`.
    """
    from scipy.optimize import minimize

    start = np.array(list(vars(Covariance()).values()))

    def loss(logs: Floats) -> float:
        covariance = Covariance(*np.exp(logs))
        total = float((((logs - np.log(start)) / 0.7) ** 2).sum()) / 2
        for table in tables:
            matrix = covariance.between(table.points, table.points)
            matrix += np.diag(covariance.noise**2 + table.variances)
            factor = np.linalg.cholesky(matrix)
            scaled = np.linalg.solve(factor, table.residuals)
            total += 0.5 * float(scaled @ scaled) + float(np.log(np.diag(factor)).sum())
        return total

    found = minimize(loss, np.log(start), method="L-BFGS-B", options={"maxiter": 30, "ftol": 1e-5})
    return Covariance(*map(float, np.exp(found.x)))
