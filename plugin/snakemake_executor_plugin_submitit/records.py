"""Records of allocations that have ended: the executor's, and a copy of Slurm's.

Slurm deletes its own record after some time.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from snakemake_executor_plugin_submitit import spool as events
from snakemake_executor_plugin_submitit.slurm import ask
from snakemake_executor_plugin_submitit.spool import write_atomically
from snakemake_executor_plugin_submitit.tracking import AllocationState

SACCT_FIELDS = (
    *("JobID", "JobName", "Partition", "Account", "NodeList", "AllocTRES", "Submit", "Start"),
    *("End", "Elapsed", "Timelimit", "State", "ExitCode", "Restarts"),
)
SACCT_FIELDS_BEFORE_24_11 = tuple(field for field in SACCT_FIELDS if field != "Restarts")
"""sacct refuses the whole query if it does not know a field."""


def write_record(path: Path, live: AllocationState[Any], state: str | None) -> None:
    """Write the record of an allocation as JSON; `state` is the scheduler's end state.

    Raises OSError if the file cannot be written.
    """
    record = {
        "allocation": asdict(live.submission),
        "state": state,
        "reason": live.end_reason or (live.stopped.data["reason"] if live.stopped else None),
        "jobs_assigned": live.assigned,
        "jobs_finished": live.finished,
        "journal": [
            {"event": event.kind, **event.data}
            for event in live.spool.journal().read_new()
            if event.kind not in (events.JOB_STARTED, events.JOB_FINISHED)
        ],
    }
    if live.submission.cluster == "slurm":
        record["slurm"] = fetch_slurm_record(live.submission.job_id, live.submission.clusters)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def fetch_slurm_record(job_id: str, clusters: str | None = None) -> dict[str, str] | None:
    """The job's record from scontrol, else from sacct; None if neither knows the job."""
    text = ask("scontrol", "--oneliner", "show", "job", job_id, clusters=clusters).text
    if text and (record := parse_scontrol(text)):
        return record
    for fields in (SACCT_FIELDS, SACCT_FIELDS_BEFORE_24_11):
        options = ("--parsable2", "--allocations", f"--jobs={job_id}")
        text = ask("sacct", *options, f"--format={','.join(fields)}", clusters=clusters).text
        if text:
            return parse_sacct(text)
    return None


def parse_scontrol(text: str) -> dict[str, str]:
    """The first line of `Key=value Key=value …`. Values may contain spaces, but no ` Key=`."""
    line = text.splitlines()[0] if text.strip() else ""
    parts = re.split(r"(?:^|\s)([A-Za-z][\w/:]*)=", line)
    return {key: value.strip() for key, value in zip(parts[1::2], parts[2::2], strict=True)}


def parse_sacct(text: str) -> dict[str, str] | None:
    """The last line below the header: a requeued job has one line per start."""
    header, *lines = text.splitlines() or [""]
    if not lines:
        return None
    return dict(zip(header.split("|"), lines[-1].split("|"), strict=False))
