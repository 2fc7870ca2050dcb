"""How long the executor should expect trials and engine starts to take.

docs/prediction.md says how the times are predicted. Where nothing is known, there is no time, and
an allocation requests its whole time limit.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from servegrid.analysis.slo import DEFAULT_SLO, Slo
from servegrid.errors import ServegridError
from servegrid.study.deployment import CPU, EXTERNAL, Deployment
from servegrid.study.few_requests import describe_few_requests
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
    times. Searches are for `slo`.
    """

    def __init__(self, study: Study, results: Path, slo: Slo = DEFAULT_SLO) -> None:
        self._study, self._results, self._slo = study, results, slo

    def trial_s(self, trial: Trial) -> int | None:
        """The time of one trial; None if it cannot be predicted.

        A trial that a search is not expected to measure takes only the gap before the next one.
        """
        from servegrid.analysis.plan import is_taken

        times = _sure(self._times[trial.deployment.name])
        if times is None:
            return None
        is_measured = is_taken(trial, times.search)
        cell_s = times.cells[trial.workload.cell].high if is_measured else 0.0
        return math.ceil(cell_s + GAP_S)

    def start_s(self, deployment: Deployment) -> int | None:
        """The time until the engine serves; None if it cannot be predicted."""
        times = _sure(self._times[deployment.name])
        return None if times is None else math.ceil(times.start.high + START_EXTRA_S)

    def forecast(self, ids: Collection[str]) -> str | None:
        """What the trials with these ids take in all, as a text; None if nothing is known.

        It names cells with too few requests.
        """
        from servegrid.analysis.plan import is_taken

        parts: list[Range] = []
        starts: dict[str, ExpectedTimes] = {}
        rest, searched = 0, Counter[bool]()
        trials = [trial for trial in self._study.all_trials if trial.id in ids]
        few = describe_few_requests(trial.workload for trial in trials)
        for trial in trials:
            times = self._times[trial.deployment.name]
            if times is None:
                rest += 1
                continue
            starts[trial.allocation] = times
            is_measured = is_taken(trial, times.search)
            if is_measured:
                parts.append(times.cells[trial.workload.cell])
            if times.search is not None and trial.number == 1 and not trial.drift_check:
                searched[is_measured] += 1
        if not starts:
            return few
        parts += [times.start for times in starts.values()]
        value, low, high = (
            format_minutes(sum(getattr(part, end) for part in parts))
            for end in ("value", "low", "high")
        )
        text = f"Expected time: {value} (95% interval: {low} to {high})"
        text += f", with {pluralize(len(starts), 'engine start')}."
        if searched:
            text += f" Searches will measure about {searched[True]} of {searched.total()} cells."
        if rest:
            text += f" Not predicted: {pluralize(rest, 'measurement')}."
        unseen = dict.fromkeys(each for times in starts.values() for each in times.unseen.values())
        if unseen:
            text += f"\nThe prediction has no data for {', '.join(unseen)}: it may be far off."
        return text if few is None else f"{text}\n{few}"

    @cached_property
    def _times(self) -> Mapping[str, ExpectedTimes | None]:
        workloads: dict[str, dict[str, Workload]] = {}
        for trial in self._study.all_trials:
            name, workload = trial.deployment.name, trial.workload
            workloads.setdefault(name, {})[workload.cell] = workload
        earlier = self._earlier()
        return {
            each.name: self._predict(each, list(workloads[each.name].values()), earlier)
            for each in self._study.deployments
        }

    def _predict(
        self, deployment: Deployment, workloads: list[Workload], earlier: Mapping[str, Bursts]
    ) -> ExpectedTimes | None:
        from servegrid.analysis.plan import Site, expected_times
        from servegrid.analysis.predictor import load_calibration
        from servegrid.reference.checkpoint import find_model
        from servegrid.study import models
        from servegrid.study.revisions import read_revisions

        if deployment.engine == EXTERNAL:
            return None  # another engine than it is said to be may answer
        site = Site(cores=len(os.sched_getaffinity(0)))
        bursts = earlier.get(deployment.name)
        slo = self._slo if deployment.name in self._study.searched else None
        try:
            facts = find_model(deployment, models.default_folder(), read_revisions(self._results))
            times = expected_times(
                deployment, workloads, facts, load_calibration(), site, bursts, slo
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
        from servegrid.records import columns

        try:
            table = tables.load_table(file, columns.CELLS)
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
    ['20 s', '2 min', '1.5 h']
    """
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{math.ceil(seconds / 60)} min"
