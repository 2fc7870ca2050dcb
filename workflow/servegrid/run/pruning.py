"""Finds workloads that are not worth a try, because a lighter one could not be served.

An allocation keeps a journal of what is known about its deployment: the records of earlier
allocations, and one line per trial that it measures itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servegrid.errors import RecordError
from servegrid.records import parquet
from servegrid.records.verdict import NOT_RUN, Verdict, shows_overload, was_served
from servegrid.study.grid import Deployment, Trial, Workload


@dataclass(frozen=True)
class Outcome:
    """What a trial showed about its workload: that it was served, or that it is too heavy.

    `trial` is its id without the deployment.
    """

    trial: str
    workload: Workload
    verdict: str

    @classmethod
    def of(cls, trial: Trial, verdict: str, evidence: Mapping[str, Any]) -> Outcome | None:
        """None if the verdict shows neither, such as that of a workload that was not tried."""
        if not was_served(verdict) and not shows_overload(verdict, evidence):
            return None
        return cls(f"{trial.cell}/trial-{trial.label}", trial.workload, verdict)


def find_dominating(workload: Workload, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The first outcome that shows that `workload` cannot be served; None if none does.

    Its workload was not served, has at most as many users, at most as long prompts, and the same
    other settings. It shows nothing if a workload that asks for at least as much was served: then
    something else was the cause.
    """
    served = [each.workload for each in outcomes if was_served(each.verdict)]
    return next(
        (
            each
            for each in outcomes
            if not was_served(each.verdict)
            and workload.asks_at_least(each.workload)
            and not any(other.asks_at_least(each.workload) for other in served)
        ),
        None,
    )


def dominated_by(outcome: Outcome) -> Verdict:
    """The verdict of a workload that is not tried because of `outcome`."""
    return Verdict(
        NOT_RUN,
        f"dominated by {outcome.trial}: {outcome.verdict}",
        {"reason": "dominated", "by": outcome.trial, "by_verdict": outcome.verdict},
    )


def find_outcomes(cells: Path, deployment: Deployment) -> Iterator[Outcome]:
    """The outcomes of the trials in the folder `cells` that have this deployment's specification.

    Records that cannot be read are left out: they are measured again.
    """
    for file in sorted((cells / deployment.name).glob("*/*/requests.parquet")):
        try:
            record = parquet.read_record(file)
            if record["format"] != parquet.RECORD_FORMAT:
                continue
            trial = Trial.from_spec(record["spec"])
            found = Outcome.of(trial, record["verdict"], record["verdict_evidence"])
        except (RecordError, KeyError, TypeError):
            continue
        if found is not None and trial.deployment.digest == deployment.digest:
            yield found


def append_outcome(journal: Path, outcome: Outcome) -> None:
    """Add one line to a journal, which is created if it does not exist."""
    with journal.open("a", encoding="utf-8") as file:
        line = {
            "trial": outcome.trial,
            "workload": outcome.workload.spec,
            "verdict": outcome.verdict,
        }
        file.write(json.dumps(line) + "\n")


def read_outcomes(journal: Path) -> list[Outcome]:
    """The outcomes in a journal; none if it does not exist."""
    if not journal.exists():
        return []
    return list(_parse(journal.read_text(encoding="utf-8").splitlines()))


def _parse(lines: Iterable[str]) -> Iterator[Outcome]:
    for line in lines:
        data = json.loads(line)
        yield Outcome(data["trial"], Workload.from_spec(data["workload"]), data["verdict"])
