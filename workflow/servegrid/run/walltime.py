"""How long the executor should expect trials and engine starts to take.

docs/prediction.md says how the times are predicted. Where nothing is known, there is no time, and
an allocation requests its whole time limit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from servegrid.errors import ServegridError
from servegrid.study.deployment import CPU, EXTERNAL, Deployment
from servegrid.study.grid import Study, Trial, Workload

if TYPE_CHECKING:  # pandas takes a second of a dry run, which needs none of this
    from servegrid.analysis.plan import ExpectedTimes
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
        times = self._times[trial.deployment.name]
        return times and math.ceil(times.cells[trial.workload.cell].high + GAP_S)

    def start_s(self, deployment: Deployment) -> int | None:
        """The time until the engine serves; None if it cannot be predicted."""
        times = self._times[deployment.name]
        return times and math.ceil(times.start.high + START_EXTRA_S)

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
        if times is None or (
            not times.observed and any(key in times.unseen for key in NEEDS_OWN_CELLS)
        ):
            return None
        return times

    def _earlier(self) -> Mapping[str, Bursts]:
        """Finished cells of this study, if the last run has made their table."""
        from servegrid.analysis import earlier, tables

        file = self._results / "tables" / "cells.parquet"
        if not file.is_file():
            return {}
        try:
            table = tables.load_table(file)
        except ServegridError:
            return {}
        digests = {trial.digest for trial in self._study.trials}
        return earlier.earlier_bursts(self._study, table[table["spec_digest"].isin(digests)])
