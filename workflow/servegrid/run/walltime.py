"""How long the executor should expect trials and engine starts to take.

docs/prediction.md says how the times are predicted. Where nothing is known, there is no time, and
an allocation requests its whole time limit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from servegrid.errors import ServegridError
from servegrid.study.deployment import CPU, EXTERNAL, Deployment
from servegrid.study.grid import Study, Trial, Workload
from servegrid.study.text import pluralize

if TYPE_CHECKING:  # pandas takes a second of a dry run, which needs none of this
    from servegrid.analysis.plan import ExpectedTimes, Range
    from servegrid.analysis.prediction import Bursts

GAP_S = 3.0
"""Between two trials on a busy node: a process starts, records are written to a shared disk."""
START_EXTRA_S = 60.0
"""Around the start of an engine: Python starts, the load client is calibrated."""
NEEDS_OWN_CELLS = (CPU, "engine")
"""Without cells of its own, a deployment with one of these `predictor.UNSEEN` has no times."""


class Walltimes:
    """The upper ends of the 95% intervals, in whole seconds. Predicted when first asked for.

    `results` is the folder of the study's results: finished cells in its table calibrate the
    times.
    """

    def __init__(self, study: Study, results: Path) -> None:
        self._study, self._results = study, results

    def trial_s(self, trial: Trial) -> int | None:
        """The time of one trial; None if it cannot be predicted."""
        times = _sure(self._times[trial.deployment.name])
        if times is None:
            return None
        cell_s = 0.0 if self._is_further(trial) else times.cells[trial.workload.cell].high
        return math.ceil(cell_s + GAP_S)

    def _is_further(self, trial: Trial) -> bool:
        """Whether it repeats a cell of a search, which few cells need."""
        return trial.deployment.name in self._study.searched and trial.number > 1

    def start_s(self, deployment: Deployment) -> int | None:
        """The time until the engine serves; None if it cannot be predicted."""
        times = _sure(self._times[deployment.name])
        return None if times is None else math.ceil(times.start.high + START_EXTRA_S)

    def forecast(self, ids: Collection[str]) -> str | None:
        """What the trials with these ids take in all, as a text; None if nothing is known."""
        wanted = (trial for trial in self._study.all_trials if trial.id in ids)
        trials = [trial for trial in wanted if not self._is_further(trial)]
        parts: list[Range] = []
        starts: dict[str, ExpectedTimes] = {}
        for trial in trials:
            if times := self._times[trial.deployment.name]:
                parts.append(times.cells[trial.workload.cell])
                starts[trial.allocation] = times
        if not starts:
            return None
        rest = len(trials) - len(parts)
        parts += [times.start for times in starts.values()]
        value, low, high = (
            format_minutes(sum(getattr(part, end) for part in parts))
            for end in ("value", "low", "high")
        )
        text = f"Expected time: {value} (95% interval: {low} to {high})"
        text += f", with {pluralize(len(starts), 'engine start')}."
        if any(trial.deployment.name in self._study.searched for trial in trials):
            text += " A search takes less: this is the time of its whole grid."
        if rest:
            text += f" Not predicted: {pluralize(rest, 'measurement')}."
        unseen = dict.fromkeys(each for times in starts.values() for each in times.unseen.values())
        if unseen:
            text += f"\nThe prediction has no data of {', '.join(unseen)}: it may be far off."
        return text

    @cached_property
    def _times(self) -> Mapping[str, ExpectedTimes | None]:
        workloads: dict[str, dict[str, Workload]] = {}
        for trial in self._study.all_trials:
            name, workload = trial.deployment.name, trial.workload
            workloads.setdefault(name, {})[workload.cell] = workload
        earlier = self._earlier()
        return {
            each.name: self._predict(each, workloads[each.name], earlier.get(each.name))
            for each in self._study.deployments
        }

    def _predict(
        self, deployment: Deployment, workloads: Mapping[str, Workload], bursts: Bursts | None
    ) -> ExpectedTimes | None:
        from servegrid.analysis.plan import Site, expected_times
        from servegrid.analysis.predictor import load_calibration
        from servegrid.reference.checkpoint import find_model
        from servegrid.study import models
        from servegrid.study.revisions import read_revisions

        if deployment.engine == EXTERNAL:
            return None  # another engine than it is said to be may answer
        site = Site(cores=len(os.sched_getaffinity(0)))
        try:
            facts = find_model(deployment, models.default_folder(), read_revisions(self._results))
            times = expected_times(
                deployment, list(workloads.values()), facts, load_calibration(), site, bursts
            )
        except ServegridError:  # the checks before a run report it
            return None
        return times

    def _earlier(self) -> Mapping[str, Bursts]:
        """Finished cells of this study, if the last run has made their table."""
        file = self._results / "tables" / "cells.parquet"
        if not file.is_file():
            return {}
        from servegrid.analysis import earlier, tables

        try:
            table = tables.load_table(file)
        except ServegridError:
            return {}
        digests = {trial.digest for trial in self._study.trials}
        return earlier.earlier_bursts(self._study, table[table["spec_digest"].isin(digests)])


def _sure(times: ExpectedTimes | None) -> ExpectedTimes | None:
    """The times, unless they come from tables that say nothing about such a deployment."""
    if times is None or times.observed:
        return times
    return None if any(key in times.unseen for key in NEEDS_OWN_CELLS) else times


def format_minutes(seconds: float) -> str:
    """
    >>> [format_minutes(each) for each in (20, 90, 5400)]
    ['1 min', '2 min', '1.5 h']
    """
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{math.ceil(seconds / 60)} min"
