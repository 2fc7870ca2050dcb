"""The search of one deployment: what its measured trials say, and which trial is next.

`analysis.frontier` searches over one protocol and output length. A deployment can have several of
these, each with several trials per cell. Only `load_measured` reads files.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from servegrid.analysis import frontier, tables
from servegrid.analysis.frontier import Answer, Decided, Loads
from servegrid.analysis.plan import expected_points, time_scale
from servegrid.analysis.prediction import Bursts, Floats, Points, find_traits
from servegrid.analysis.predictor import Predictor, load_calibration, make_predictor
from servegrid.analysis.slo import Slo
from servegrid.errors import RecordError
from servegrid.records.verdict import NOT_RUN, SERVED
from servegrid.reference.checkpoint import ModelFacts
from servegrid.study.grid import Study, Trial, Workload

NOT_NEEDED = "not needed by the search"
"""The detail of the verdict of a cell that a search left out."""
GOOD_SHARE = 0.95
"""The share of the requests of an open loop that must meet the SLO."""


@dataclass(frozen=True)
class Figures:
    """What a search needs of a measured trial.

    `headroom` is limit / latency, the least of all limits of the SLO, and 0 if the cell was not
    served. `seconds` is the time of a response, without the scale of an emulated engine; None if it
    is unknown or the workload is an open loop. `breaks_rules` says that the trial is not valid: it
    counts for the search all the same, or the search would measure it again and again. `good` has
    the share of an open loop's requests that meet the SLO, and their number; None if unknown.
    """

    headroom: float
    seconds: float | None
    breaks_rules: bool = False
    good: tuple[float, float] | None = None


def trial_figures(row: Mapping[Any, Any], slo: Slo) -> Figures:
    """What a search needs of a trial, from its row of `columns.CELLS`.

    A value that is not known does not meet its limit. The headroom of an open loop is the share of
    requests that may miss the SLO / the share that does: goodput, not latency, is its limit.
    """
    if row["verdict"] not in SERVED:
        return Figures(0.0, None)
    breaks_rules = _known(row.get("valid"), 1.0) == 0.0
    if row["request_rate"] is not None and not math.isnan(row["request_rate"]):
        share = _known(row["slo_attainment"], 0.0)
        headroom = (1 - GOOD_SHARE) / (1 - share) if share < 1 else math.inf
        ended = _known(row["requests_in_window"], 0.0)
        good = (share, ended + _known(row["failed_requests"], 0.0)) if ended else None
        return Figures(headroom, None, breaks_rules, good)
    scale = _known(row["time_scale"], 1.0)
    per_token = _known(row["seconds_per_100_tokens"]) / scale / 100
    limits = [(per_token * slo.tokens_per_s_per_user, 1.0)]
    for column, limit in (
        ("ttft_s_p50", slo.ttft_s),
        ("e2el_s_p50", slo.e2el_s),
        ("tpot_s_p50", slo.tpot_s),
        ("itl_max_s_p50", slo.itl_s),
    ):
        if limit is not None:
            limits.append((_known(row[column]) / scale, limit))
    headroom = min(limit / value for value, limit in limits)
    seconds = per_token * row["output_len"]
    return Figures(headroom, None if math.isinf(seconds) else seconds, breaks_rules)


def _known(value: Any, default: float = math.inf) -> float:
    try:
        number = float(value)
    except TypeError:  # None or pandas.NA
        return default
    return default if math.isnan(number) else number


@dataclass(frozen=True)
class Grid:
    """The cells of one protocol and output length, each with its trials."""

    cells: tuple[tuple[Trial, ...], ...]

    @property
    def workloads(self) -> list[Workload]:
        return [trials[0].workload for trials in self.cells]

    @cached_property
    def loads(self) -> Loads:
        return Loads.of(
            [each.intensity for each in self.workloads], [each.input_len for each in self.workloads]
        )

    @cached_property
    def positions(self) -> Mapping[str, int]:
        """The position of each trial's cell, by the trial's id."""
        return {trial.id: at for at, trials in enumerate(self.cells) for trial in trials}


@dataclass(frozen=True)
class Status:
    """What is known of a grid.

    `answers` are those of measured cells. `settled` are those that count: they are sure, or have no
    trial left. `decided` follows from them. `unsure` are cells that need another trial.
    """

    answers: Mapping[int, Answer]
    settled: Mapping[int, bool]
    decided: Decided
    unsure: Sequence[int]


@dataclass(frozen=True)
class FrontierEntry:
    """The largest load that meets the SLO, of one prompt length; None if none does.

    `smallest_missing` is the smallest load that misses it; None if none does. `is_open` says that
    one of the two could be otherwise: it is near a limit, and its trials do not decide.
    `is_complete` says that nothing is left to measure.
    """

    protocol: str
    output_len: int
    input_len: int
    largest: float | None
    smallest_missing: float | None
    is_open: bool
    is_complete: bool


def _judge(trials: Sequence[Figures]) -> Answer:
    """The answer of a cell's trials; of an open loop, its requests must be enough for it."""
    answer = frontier.judge([trial.headroom for trial in trials])
    shares = [trial.good for trial in trials if trial.good is not None]
    if len(shares) < len(trials) or frontier.is_share_sure(shares, GOOD_SHARE):
        return answer
    return Answer(answer.meets, False)


@dataclass(frozen=True)
class Search:
    """The search of a deployment in one bring-up: its trials, the SLO and what is measured."""

    trials: tuple[Trial, ...]
    slo: Slo
    measured: Mapping[str, Figures]
    predict: Callable[[Sequence[tuple[Workload, float]]], Predictor] | None = None
    """The predictor, given measured cells with their seconds; None: nothing is predicted."""

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        groups: dict[tuple[str, int], dict[str, list[Trial]]] = {}
        for trial in self.trials:
            key = trial.workload.protocol, trial.workload.output_len
            groups.setdefault(key, {}).setdefault(trial.cell, []).append(trial)
        return tuple(Grid(tuple(map(tuple, cells.values()))) for cells in groups.values())

    @cached_property
    def _grid_of(self) -> Mapping[str, Grid]:
        return {trial_id: grid for grid in self.grids for trial_id in grid.positions}

    def status(self, grid: Grid) -> Status:
        """What the measured trials say about a grid."""
        answers, left = {}, {}
        for at, trials in enumerate(grid.cells):
            known = [self.measured[trial.id] for trial in trials if trial.id in self.measured]
            left[at] = len(trials) - len(known)
            if known:
                answers[at] = _judge(known)
        settled = {
            at: answer.meets for at, answer in answers.items() if answer.sure or not left[at]
        }
        decided = frontier.decide(grid.loads, settled)
        unsure = [at for at in answers if at not in settled and decided.unknown[at]]
        return Status(answers, settled, decided, unsure)

    def needs(self, trial: Trial) -> bool:
        """Whether a trial must still be measured: its cell is not decided without it."""
        grid = self._grid_of[trial.id]
        return bool(self.status(grid).decided.unknown[grid.positions[trial.id]])

    @property
    def is_complete(self) -> bool:
        """Whether no trial needs to be measured."""
        return not any(self.status(grid).decided.unknown.any() for grid in self.grids)

    def next_trial(self, waiting: Collection[str]) -> Trial | None:
        """The trial to measure next, of those whose ids are `waiting`; None if none is needed.

        A cell that is measured but not sure comes first: others depend on it.
        """
        for grid in self.grids:
            status = self.status(grid)
            ready = [
                [each for each in trials if each.id in waiting and each.id not in self.measured]
                for trials in grid.cells
            ]
            at = next((each for each in status.unsure if ready[each]), None)
            if at is None:
                available = np.array([bool(trials) for trials in ready])
                at = frontier.next_cell(grid.loads, status.settled, self._chances(grid), available)
            if at is not None:
                return ready[at][0]
        return None

    def _chances(self, grid: Grid) -> Floats | None:
        """The probabilities that the cells meet the SLO, without its limit on ttft.

        None for an open loop: a rate is no load before the server's speed is known.
        """
        workloads = grid.workloads
        if self.predict is None or any(each.is_open_loop for each in workloads):
            return None
        predictor = self.predict(
            [
                (trials[0].workload, seconds)
                for each in self.grids
                for trials in each.cells
                # Of users who think, it is not known how many were in flight.
                if not trials[0].workload.think_time_s
                and (seconds := self._seconds(trials)) is not None
            ]
        )
        points = expected_points(workloads, predictor, time_scale(self.trials[0].deployment))
        limit_s = frontier.response_limit(points, self.slo)
        return frontier.meeting_chances(predictor, points, limit_s)

    def _seconds(self, trials: Sequence[Trial]) -> float | None:
        """The median time of a response over the measured trials of a cell."""
        figures = [self.measured[each.id] for each in trials if each.id in self.measured]
        known = [each.seconds for each in figures if each.seconds is not None]
        return float(np.median(known)) if known else None

    def frontier(self) -> list[FrontierEntry]:
        """The frontier as far as it is known, one entry per grid and prompt length."""
        return [entry for grid in self.grids for entry in self._entries(grid)]

    def _entries(self, grid: Grid) -> Iterable[FrontierEntry]:
        status, first = self.status(grid), grid.workloads[0]
        meets, misses = status.decided.meets, status.decided.misses
        for length in np.unique(grid.loads.input_len):
            column = grid.loads.input_len == length
            high, low = np.flatnonzero(column & meets), np.flatnonzero(column & misses)
            best = max(high, key=lambda at: grid.loads.intensity[at], default=None)
            worst = min(low, key=lambda at: grid.loads.intensity[at], default=None)
            ends = [status.answers.get(int(at)) for at in (best, worst) if at is not None]
            yield FrontierEntry(
                protocol=first.protocol,
                output_len=first.output_len,
                input_len=int(length),
                largest=None if best is None else float(grid.loads.intensity[best]),
                smallest_missing=None if worst is None else float(grid.loads.intensity[worst]),
                is_open=any(each is not None and not each.sure for each in ends),
                is_complete=not (column & status.decided.unknown).any(),
            )


def _points(workloads: Sequence[Workload]) -> Points:
    return Points.of(
        [workload.concurrency for workload in workloads],
        [workload.input_len for workload in workloads],
        [workload.output_len for workload in workloads],
    )


def make_predict(
    trial: Trial, facts: ModelFacts, cores: int
) -> Callable[[Sequence[tuple[Workload, float]]], Predictor] | None:
    """The `predict` of the search of a trial's deployment.

    None if the model or the kind of GPU is not known: the search is then a staircase.
    """
    deployment = trial.deployment
    traits = find_traits(deployment, facts.shape, cores)
    if traits is None:
        return None

    def predict(measured: Sequence[tuple[Workload, float]]) -> Predictor:
        bursts = None
        if measured:
            points = _points([workload for workload, _ in measured])
            bursts = Bursts(points, np.array([seconds for _, seconds in measured]))
        return make_predictor(traits, deployment.engine, load_calibration(), bursts)

    return predict


def load_measured(
    trials: Sequence[Trial], cells: Path, slo: Slo, drift_checks: Sequence[Trial] = ()
) -> dict[str, Figures]:
    """What is known of the trials that have a record of their specification, by id.

    `cells` is the folder of the records. Records that are damaged or say NOT_RUN do not count.
    `drift_checks` decide on validity only.
    """
    found, checks = (
        [trial for trial in group if _is_measured(trial, cells / trial.id)]
        for group in (trials, drift_checks)
    )
    if not found:
        return {}
    drifts = tables.drift_by_allocation(tables.gather_trials(checks, cells)) if checks else None
    rows = tables.gather_trials(found, cells, drifts, slo).to_dict("records")
    return {trial.id: trial_figures(row, slo) for trial, row in zip(found, rows, strict=True)}


def _is_measured(trial: Trial, folder: Path) -> bool:
    record = tables.find_record(trial, folder)
    return record is not None and record.get("verdict") != NOT_RUN


def check_left_out(study: Study, cells: pd.DataFrame, slo: Slo, folder: Path) -> None:
    """Raise RecordError if a trial that the study needs is not measured.

    `cells` is the table of the study's trials, in their order. Another search has left these trials
    out, and its list of them is lost; otherwise they would have been removed at the start.
    """
    left_out = cells["verdict_detail"].eq(NOT_NEEDED).fillna(False)
    if not left_out.any():
        return
    rows = list(zip(study.trials, cells.to_dict("records"), strict=True))
    missing: list[str] = []
    groups: dict[tuple[str, int], list[tuple[Trial, Mapping[Any, Any]]]] = {}
    for trial, row in rows:
        groups.setdefault((trial.deployment.name, trial.bring_up), []).append((trial, row))
    for (name, _), group in groups.items():
        measured = {
            trial.id: trial_figures(row, slo) for trial, row in group if row["verdict"] != NOT_RUN
        }
        state = Search(tuple(trial for trial, _ in group), slo, measured)
        missing += [
            trial.id
            for trial, row in group
            if row["verdict_detail"] == NOT_NEEDED
            and (name not in study.searched or state.needs(trial))
        ]
    if missing:
        paths = " ".join(shlex.quote(str(folder / trial)) for trial in missing)
        raise RecordError(
            f"{folder}: another search left out {len(missing)} trials that this study needs. "
            f"Remove their records:\n  rm -r {paths}\nThen run the same command again. Nothing "
            "measured is lost."
        )
