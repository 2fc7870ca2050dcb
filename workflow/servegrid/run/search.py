"""A search inside an allocation: it chooses the next job, and leaves out what is not needed.

Each job still has one trial and writes its two files. When its turn comes, it measures the trial,
or records that the search does not need it (docs/adr/0013).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from servegrid.analysis import search
from servegrid.analysis.search import Figures, Search
from servegrid.records.verdict import NOT_RUN, Verdict
from servegrid.reference.checkpoint import find_model
from servegrid.run.search_plan import CELLS, SearchPlan, left_out_file, read_digest
from servegrid.run.service import INFO_VARIABLE, AllocationInfo
from servegrid.run.trial import NO_INPUTS, TrialInputs, measure_trial
from servegrid.run.unmeasured import write_unmeasured
from servegrid.study import models
from servegrid.study.grid import Trial


def measure_if_needed(
    plan_path: Path,
    trial: Trial,
    requests: Path,
    samples: Path,
    last_attempt: bool,
    inputs: TrialInputs = NO_INPUTS,
) -> str:
    """Measure `trial` if its search needs it, else record NOT_RUN. Returns the verdict.

    Raises the errors of `measure_trial`, and RecordError if the plan cannot be read.
    """
    digest = read_digest(plan_path)
    if trial.drift_check or (not _is_complete(digest) and _is_needed(plan_path, trial)):
        return measure_trial(trial, requests, samples, last_attempt, inputs)
    entry = {"trial": trial.id, "search": digest}
    # First the list, then the record: a record that is not in the list would never be removed.
    left_out = left_out_file(trial.deployment.name, trial.bring_up)
    with left_out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    info, verdict = AllocationInfo.read(), Verdict(NOT_RUN, search.NOT_NEEDED)
    return write_unmeasured(
        trial, verdict, requests, samples, info.engine, info.environment, info.calibration
    )


def _is_complete(digest: str) -> bool:
    """Whether the allocation knows that this search has nothing left to measure."""
    try:
        file = complete_file(Path(os.environ[INFO_VARIABLE]))
        return file.read_text(encoding="utf-8") == digest
    except (KeyError, OSError):
        return False


def complete_file(info: Path) -> Path:
    """The file with the digest of a search that has nothing left to measure."""
    return info.with_name("search_complete")


def _is_needed(plan_path: Path, trial: Trial) -> bool:
    plan = SearchPlan.read(plan_path)
    trials = plan.of_bring_up(trial.bring_up)
    return Search(trials, plan.slo, search.load_measured(trials, CELLS, plan.slo)).needs(trial)


class Chooser:
    """Says which job of an allocation runs next: its search needs that one most."""

    def __init__(
        self, plan: SearchPlan, bring_up: int, revisions: Mapping[str, str], complete: Path
    ) -> None:
        trials = plan.of_bring_up(bring_up)
        first = trials[0]
        facts = find_model(first.deployment, models.default_folder(), revisions)
        self._plan, self._trials, self._complete = plan, trials, complete
        self._by_order = {plan.orders[trial.id]: trial.id for trial in trials}
        cores = len(os.sched_getaffinity(0))
        self._predict = search.make_predict(first, facts, cores)
        self._measured: dict[str, Figures] = {}

    def __call__(self, orders: Sequence[int]) -> int | None:
        """The order of the job to run next, of those that wait; None if none is needed."""
        if self._complete.exists():
            return None
        unread = [trial for trial in self._trials if trial.id not in self._measured]
        self._measured |= search.load_measured(unread, CELLS, self._plan.slo)
        waiting = {self._by_order[order] for order in orders if order in self._by_order}
        state = Search(self._trials, self._plan.slo, self._measured, self._predict)
        chosen = state.next_trial(waiting)
        if chosen is None:
            if state.is_complete:
                self._complete.write_text(self._plan.digest, encoding="utf-8")
            return None
        print(f"The search measures {chosen.id} next.", flush=True)
        return self._plan.orders[chosen.id]
