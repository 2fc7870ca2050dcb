"""Slurm's own record of a job, kept beside ours: Slurm forgets it, the results do not."""

from __future__ import annotations

import re
import subprocess

LIMIT_S = 30.0
SACCT_FIELDS = (
    *("JobID", "JobName", "Partition", "UsageStats", "NodeList", "AllocTRES", "Submit", "Start"),
    *("End", "Elapsed", "Timelimit", "State", "ExitCode", "Restarts"),
)


def slurm_record(job_id: str) -> dict[str, str] | None:
    """What scontrol says of the job, else sacct; None where neither knows it."""
    text = _asked("scontrol", "--oneliner", "show", "job", job_id)
    if text and (record := parse_scontrol(text)):
        return record
    text = _asked(
        "sacct", "--parsable2", "--allocations", f"--jobs={job_id}",
        f"--format={','.join(SACCT_FIELDS)}",
    )  # fmt: skip
    return parse_sacct(text) if text else None


def parse_scontrol(text: str) -> dict[str, str]:
    """`Key=value Key=value …`, where values may hold spaces, but no ` Key=`."""
    line = text.splitlines()[0] if text.strip() else ""
    parts = re.split(r"(?:^|\s)([A-Za-z][\w/:]*)=", line)
    return {key: value.strip() for key, value in zip(parts[1::2], parts[2::2], strict=True)}


def parse_sacct(text: str) -> dict[str, str] | None:
    """The last line under the header: a requeued job has one for each of its starts."""
    header, *lines = text.splitlines() or [""]
    if not lines:
        return None
    return dict(zip(header.split("|"), lines[-1].split("|"), strict=False))


def _asked(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
