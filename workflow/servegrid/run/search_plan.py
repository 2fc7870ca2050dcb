"""The files of a search: what its jobs need to know, and which trials they have left out.

Every start of Snakemake imports this module, also a dry run. So it imports little, and Arrow only
if there is a search.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from servegrid.analysis.slo import Slo
from servegrid.errors import RecordError
from servegrid.records.verdict import NOT_RUN
from servegrid.study.grid import Study, Trial, digest_json

FOLDER = Path("results/search")
"""Relative to the working directory, as all paths here."""
CELLS = Path("results/cells")


@dataclass(frozen=True)
class SearchPlan:
    """What a job needs to know about the search it belongs to: a file in `results/search/`.

    `orders` are the positions of the trials in the queue of their allocation.
    """

    slo: Slo
    trials: tuple[Trial, ...]
    orders: Mapping[str, int]

    @property
    def digest(self) -> str:
        """Identifies the question: the SLO and the specifications of all trials."""
        return digest_json({"slo": asdict(self.slo), "trials": [t.digest for t in self.trials]})

    def of_bring_up(self, bring_up: int) -> tuple[Trial, ...]:
        """The trials of one bring-up, which is a search of its own."""
        return tuple(trial for trial in self.trials if trial.bring_up == bring_up)

    def write(self, path: Path) -> None:
        """Write the plan. Raises RecordError if that fails."""
        from servegrid.records import parquet

        data = {
            "digest": self.digest,
            "slo": asdict(self.slo),
            "deployment": self.trials[0].deployment.spec,
            "trials": [
                {"spec": {**trial.spec, "deployment": None}, "order": self.orders[trial.id]}
                for trial in self.trials
            ],
        }
        with parquet.atomic_write(path) as temporary:
            temporary.write_text(json.dumps(data), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> SearchPlan:
        """The plan in a file. Raises RecordError if it is missing or damaged."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            trials = tuple(
                Trial.from_spec({**each["spec"], "deployment": data["deployment"]})
                for each in data["trials"]
            )
            orders = [int(each["order"]) for each in data["trials"]]
            slo = Slo(**data["slo"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(_unreadable(path, error)) from error
        by_id = {trial.id: order for trial, order in zip(trials, orders, strict=True)}
        return cls(slo, trials, by_id)


def read_digest(path: Path) -> str:
    """The digest of the plan in a file. Raises RecordError if it is missing or damaged."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"{path}: the plan of the search cannot be read ({error}). Run the same command again: it "
        "is written at the start."
    )


def plan_file(deployment: str) -> Path:
    """Where the plan of a deployment's search is."""
    return FOLDER / f"{deployment}.json"


def left_out_file(deployment: str, bring_up: int) -> Path:
    """The list of the trials that the search has left out: one JSON object per line."""
    return FOLDER / f"{deployment}.bring_up-{bring_up}.left_out.jsonl"


def write_plans(study: Study, slo: Slo) -> None:
    """Write the plans of all searches of a study."""
    for name, plan in search_plans(study, slo).items():
        plan.write(plan_file(name))


def search_plans(study: Study, slo: Slo) -> dict[str, SearchPlan]:
    """The plan of each deployment whose frontier is searched."""
    plans = {}
    for name in sorted(study.searched):
        trials = tuple(trial for trial in study.trials if trial.deployment.name == name)
        if trials:
            orders = {trial.id: study.position(trial) for trial in trials}
            plans[name] = SearchPlan(slo, trials, orders)
    return plans


def find_outdated(study: Study, slo: Slo) -> list[str]:
    """The ids of trials that another search left out and that may be needed now. Only reads."""
    lists = _outdated_lists(study, slo)
    return [trial for each in lists for trial in each.outdated if _is_left_out(trial)]


def forget_left_out(study: Study, slo: Slo) -> list[str]:
    """Remove the records of trials that another search left out. Returns the trials' ids.

    They say only that nothing was measured. With another SLO, another grid or without a search,
    these trials may be needed. Measured trials are kept. Raises RecordError if a file cannot be
    removed.
    """
    forgotten = []
    for each in _outdated_lists(study, slo):
        from servegrid.run.unmeasured import remove_record

        left_out = [trial for trial in each.outdated if _is_left_out(trial)]
        for trial in left_out:
            remove_record(CELLS / trial)
        forgotten += left_out
        each.write_current()
    return forgotten


@dataclass(frozen=True)
class _LeftOut:
    """A list of left-out trials: the entries of the present search, the trials of other ones."""

    file: Path
    current: list[dict[str, str]]
    outdated: list[str]

    def write_current(self) -> None:
        from servegrid.records import parquet

        text = "".join(json.dumps(entry) + "\n" for entry in self.current)
        with parquet.atomic_write(self.file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _outdated_lists(study: Study, slo: Slo) -> list[_LeftOut]:
    """The lists that name trials which another search left out."""
    files = sorted(FOLDER.glob("*.left_out.jsonl"))
    if not files:
        return []
    digests = {name: plan.digest for name, plan in search_plans(study, slo).items()}
    lists = []
    for file in files:
        entries = _read_lines(file)
        current = [
            entry
            for entry in entries
            if digests.get(entry["trial"].partition("/")[0]) == entry["search"]
        ]
        outdated = [entry["trial"] for entry in entries if entry not in current]
        lists.append(_LeftOut(file, current, outdated))
    return [each for each in lists if each.outdated]


def _is_left_out(trial: str) -> bool:
    """Whether the trial's record says that it was not run; a damaged one does not."""
    from servegrid.run.unmeasured import read_if_present

    return read_if_present(CELLS / trial).get("verdict") == NOT_RUN


def _read_lines(file: Path) -> list[dict[str, str]]:
    """The entries of a list of left-out trials. A damaged line is skipped.

    Raises RecordError if the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RecordError(
            f"{file}: the list of a search cannot be read ({error.strerror}). Correct its "
            "permissions, or remove it."
        ) from error
    entries = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and all(
                isinstance(entry.get(key), str) for key in ("trial", "search")
            ):
                entries.append(entry)
    return [entry for entry in entries if _is_inside(entry["trial"])]


def _is_inside(trial: str) -> bool:
    """Whether the record is below `results/cells`. Others can write the list in a shared folder."""
    parts = Path(trial).parts
    return len(parts) == 3 and not {"/", ".."} & set(parts)
