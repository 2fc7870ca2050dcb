"""How a failed job is shown: its cell, what happened, and the last lines of its log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

LOG_LINES = 12
"""Lines of a log that are shown."""
LOG_BYTES = 64_000
LINE_LENGTH = 2000
"""A longer line ends with `…` after a whole word: a path that is cut could name another folder."""

_SNAKEMAKE_LINES = (
    "Building DAG of jobs...",
    "Using shell: ",
    "Conda environments: ",
    "Select jobs to execute...",
    "Execute 1 jobs...",
    "RuleException:",
    "CalledProcessError in file ",
    "Command '",
    "Shutting down, this might take some time.",
    "Exiting because a job execution failed.",
    "Storing output in storage.",
    "Elapsed time: ",
    "WorkflowError:",
    "At least one job did not complete successfully.",
)
"""Beginnings of the lines that Snakemake itself writes to the log of a job that it has run."""


def format_failure(first: str, logs: Sequence[str], show_logs: bool, briefly: bool) -> str:
    """The message for one failed job; `briefly` leaves out the log's lines."""
    lines = [first]
    for log in logs:
        tail = read_tail(Path(log)) if show_logs and not briefly else []
        lines.append(f"Log{', last lines' if tail else ''}: {log}")
        lines += [f"  {line}" for line in tail]
    return "\n    ".join(lines)


def read_tail(log: Path) -> list[str]:
    """The last lines of a log without those of Snakemake; none if the log cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [shorten(line.rstrip()) for line in text.splitlines() if line.strip()]
    return (without_snakemake_lines(lines) or lines)[-LOG_LINES:]


def shorten(line: str) -> str:
    """The line, cut after the last word that ends within LINE_LENGTH."""
    if len(line) <= LINE_LENGTH:
        return line
    words, _, _ = line[: LINE_LENGTH + 1].rpartition(" ")
    return f"{words or line[:LINE_LENGTH]} …"


def without_snakemake_lines(lines: Sequence[str]) -> list[str]:
    """The lines that the job's own script has written."""
    kept = []
    in_traceback = False
    for line in lines:
        # Snakemake's short traceback follows the command that failed.
        in_traceback = line.startswith("Command '") or (in_traceback and line.startswith("  File "))
        if not in_traceback and not line.startswith(_SNAKEMAKE_LINES):
            kept.append(line)
    return kept
