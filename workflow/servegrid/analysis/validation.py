"""Holds the predictions against published tables that they have not seen. Pure.

Each deployment, and each kind of GPU, is left out in turn: the constants are fitted to the other
tables, and the covariance to residuals of tables that were left out of a fit of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from servegrid.analysis import frontier
from servegrid.analysis.prediction import (
    Bursts,
    Constants,
    Floats,
    Table,
    fit_constants,
    log_residuals,
)
from servegrid.analysis.predictor import Calibration, Predictor
from servegrid.analysis.residuals import (
    ROUNDING_S,
    Z_95,
    Covariance,
    Observed,
    choose_cells,
    condition,
    learn_covariance,
)

MEASURED = (0, 1, 2, 4, 8)
"""The numbers of measured cells of the validation."""


def fit_all(tables: Sequence[Table]) -> tuple[dict[str, float], Covariance]:
    """The constants of all tables, and the covariance of their residuals when left out."""
    fit = _fitter(tables)
    everything = frozenset(range(len(tables)))
    return dict(fit(everything)), _covariance(tables, everything, fit)


_Fitter = Callable[[frozenset[int]], Constants]


def _fitter(tables: Sequence[Table]) -> _Fitter:
    """Fits to a set of tables, each set once."""

    @cache
    def fit(which: frozenset[int]) -> Constants:
        return fit_constants([tables[index] for index in sorted(which)])

    return fit


def _covariance(tables: Sequence[Table], which: frozenset[int], fit: _Fitter) -> Covariance:
    return learn_covariance(
        [
            Observed(
                tables[index].points,
                log_residuals(fit(which - {index}), tables[index]),
                (ROUNDING_S / tables[index].seconds) ** 2,
            )
            for index in sorted(which)
        ]
    )


@dataclass(frozen=True)
class Errors:
    """The cells of a deployment that were not measured, after `measured` cells were.

    `errors` is log(measured / predicted); `covered` says which are in the 95% interval.
    """

    deployment: str
    measured: int
    errors: Floats
    covered: npt.NDArray[np.bool_]

    @property
    def percentiles(self) -> tuple[float, float]:
        """Median and 90th percentile of |log ratio|, as a ratio in %."""
        return percentiles(self.errors)


def percentiles(errors: Floats) -> tuple[float, float]:
    """Median and 90th percentile of |error|, as a ratio in %: 10 means a factor of 1.1."""
    median, high = 100 * np.expm1(np.quantile(np.abs(errors), [0.5, 0.9]))
    return float(median), float(high)


def pool(errors: Iterable[Errors]) -> tuple[float, float, float]:
    """Median and p90 in % over all cells, and the coverage of the intervals as a fraction."""
    parts = list(errors)
    median, high = percentiles(np.concatenate([part.errors for part in parts]))
    return median, high, float(np.concatenate([part.covered for part in parts]).mean())


def fit_without(tables: Sequence[Table], folds: Sequence[Sequence[int]]) -> list[Calibration]:
    """For each fold, the calibration of the tables that are not in it."""
    fit, everything = _fitter(tables), frozenset(range(len(tables)))
    rests = [everything - set(fold) for fold in folds]
    return [Calibration(fit(rest), _covariance(tables, rest, fit)) for rest in rests]


def leave_out(
    tables: Sequence[Table],
    folds: Sequence[Sequence[int]],
    calibrations: Sequence[Calibration],
    level: float,
) -> list[Errors]:
    """Predict the tables of each fold from the others, for each of MEASURED.

    `calibrations` are those of `fit_without`. `level` is added, as a standard deviation, to the
    covariance's level.
    """
    found = []
    for fold, calibration in zip(folds, calibrations, strict=True):
        wide = float(np.hypot(calibration.covariance.level, level))
        for index in fold:
            found += _predict_rest(
                tables[index], calibration.constants, calibration.covariance, wide
            )
    return found


def _predict_rest(
    table: Table, constants: Constants, covariance: Covariance, level: float
) -> list[Errors]:
    residuals = log_residuals(constants, table)
    everything = Observed.of(table.points, residuals, table.seconds, covariance)
    order = choose_cells(covariance, table.points, max(MEASURED), level)
    found = []
    for count in MEASURED:
        seen, rest = order[:count], np.setdiff1d(np.arange(len(residuals)), order[:count])
        observed = Observed(table.points.take(seen), residuals[seen], everything.variances[seen])
        mean, sd = condition(covariance, table.points.take(rest), observed, level)
        errors = residuals[rest] - mean
        limits = Z_95 * np.sqrt(sd**2 + everything.variances[rest])
        found.append(Errors(table.name, count, errors, np.abs(errors) < limits))
    return found


def folds_by_deployment(tables: Sequence[Table]) -> list[list[int]]:
    return [[index] for index in range(len(tables))]


def folds_by_architecture(tables: Sequence[Table]) -> list[list[int]]:
    names = [table.traits.architecture for table in tables]
    return [
        [index for index, name in enumerate(names) if name == wanted]
        for wanted in dict.fromkeys(names)
    ]


FRONTIER_RATE = 5.0
"""The SLO of the searches, in tokens/s per user."""


@dataclass(frozen=True)
class Searched:
    """A search on a published table: the cells it took, and whether it found the frontier.

    `measured` has the positions of the cells.
    """

    deployment: str
    measured: tuple[int, ...]
    exact: bool

    @property
    def cells(self) -> int:
        return len(self.measured)


def search_published(
    table: Table,
    bursts: Bursts,
    calibration: Calibration | None,
    tokens_per_s: float = FRONTIER_RATE,
) -> Searched:
    """Search the largest loads with at least `tokens_per_s` per user in a published table.

    `bursts` are all cells of `table`, with dashes, which miss the SLO. `calibration` must not have
    seen the table; without one, nothing is predicted.
    """
    points, limit_s = bursts.points, bursts.points.output_len / tokens_per_s
    loads = frontier.Loads.of(points.concurrency, points.input_len)
    meets = np.nan_to_num(bursts.seconds, nan=np.inf) <= limit_s

    def chances(measured: Sequence[int]) -> Floats:
        assert calibration is not None
        observed = _observe(table, bursts, measured, calibration)
        predictor = Predictor(table.traits, calibration, {}, observed)
        return frontier.meeting_chances(predictor, points, limit_s)

    answers = frontier.search(
        loads, lambda position: bool(meets[position]), None if calibration is None else chances
    )
    decided = frontier.decide(loads, answers)
    return Searched(table.name, tuple(answers), bool((decided.meets == meets).all()))


def _observe(
    table: Table, bursts: Bursts, measured: Sequence[int], calibration: Calibration
) -> Observed:
    served = [index for index in measured if np.isfinite(bursts.seconds[index])]
    seen = Table(table.name, table.traits, bursts.points.take(served), bursts.seconds[served])
    residuals = log_residuals(calibration.constants, seen)
    return Observed.of(seen.points, residuals, seen.seconds, calibration.covariance)
