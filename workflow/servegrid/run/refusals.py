"""The trials that cannot work: they get their verdict at the start of a run, without a job.

A rule for them would start Python once per trial. Its constraint would name all of them, and the
time of a plan would grow with the square of their number.

Snakemake knows nothing of these records. So a list says which trial got its verdict for which
specification. If a trial can work now, the workflow hides its record from Snakemake, which then
measures it. `forget_refused` removes such records at the start of that run. A dry run, and a start
while another run works in the folder, remove nothing.

Every start of Snakemake imports this module, also a dry run. So it imports little, and Arrow only
if there are such trials.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from servegrid.records.verdict import UNSUPPORTED
from servegrid.study.grid import Study, Trial

CELLS = Path("results/cells")
"""Relative to the working directory, as all paths here."""
LIST = Path("results/unsupported.json")
"""An object with the digest of the specification of each trial, by `Trial.id`."""


def find_outdated(study: Study) -> list[str]:
    """The ids of trials whose records say that they cannot work, and that can now. Only reads."""
    listed = _read_list()
    return [name for name in _possible_now(study, listed) if _says_so(name, listed[name])]


def forget_refused(study: Study) -> list[str]:
    """Remove the records of trials that could not work and can now. Returns the trials' ids.

    They say only that nothing was measured. Raises RecordError if a file cannot be removed.
    """
    listed = _read_list()
    forgotten = _possible_now(study, listed)
    if not forgotten:
        return []
    from servegrid.run.unmeasured import remove_record

    for name in forgotten:
        if _says_so(name, listed[name]):
            remove_record(CELLS / name)
    kept = listed.keys() - set(forgotten)
    _write_list({name: digest for name, digest in listed.items() if name in kept})
    return forgotten


def refuse_unsupported(study: Study, replace: bool = True) -> list[str]:
    """Write the missing records of the trials that cannot work. Returns the trials' ids.

    With `replace`, a record of another specification counts as missing. Otherwise it is kept: it
    may be a measurement, and a run of one cell or of `bundle_partial` does not need the others.
    Raises RecordError if a file cannot be removed or written.
    """
    if not study.unsupported:
        return []
    from servegrid.run.unmeasured import record_files, refuse_trial, remove_record

    listed = _read_list()
    missing = [trial for trial in study.unsupported if not _is_recorded(trial, listed)]
    kept: set[str] = set()
    if not replace:
        kept = {t.id for t in missing if any(map(Path.exists, record_files(CELLS / t.id)))}
    missing = [trial for trial in missing if trial.id not in kept]
    # A list that names too much does no harm: a run may end here at any moment.
    for trial in missing:
        remove_record(CELLS / trial.id)
    current = {trial.id: trial.digest for trial in study.unsupported if trial.id not in kept}
    if not current.items() <= listed.items():
        _write_list(listed | current)
    for trial in missing:
        refuse_trial(trial, *record_files(CELLS / trial.id))
    return [trial.id for trial in missing]


def _possible_now(study: Study, listed: Mapping[str, str]) -> list[str]:
    """The trials of the list that can work now."""
    return [trial.id for trial in study.all_trials if trial.id in listed and not trial.unsupported]


def _says_so(name: str, digest: str) -> bool:
    """Whether a trial's record says that this specification cannot work."""
    from servegrid.run.unmeasured import read_if_present

    record = read_if_present(CELLS / name)
    return record.get("verdict") == UNSUPPORTED and record.get("spec_digest") == digest


def _is_recorded(trial: Trial, listed: Mapping[str, str]) -> bool:
    """Whether the trial has its two files, and they are of its present specification."""
    from servegrid.run.unmeasured import read_if_present, record_files

    folder = CELLS / trial.id
    if not all(file.exists() for file in record_files(folder)):
        return False
    return trial.digest == (listed.get(trial.id) or read_if_present(folder).get("spec_digest"))


def _read_list() -> dict[str, str]:
    """The list; empty if it is missing or damaged, because the records say the same."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(LIST.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {name: digest for name, digest in found.items() if isinstance(digest, str)}
    return {}


def _write_list(digests: Mapping[str, str]) -> None:
    from servegrid.records import parquet

    with parquet.atomic_write(LIST) as temporary:
        temporary.write_text(json.dumps(digests), encoding="utf-8")
