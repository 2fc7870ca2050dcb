"""The last lines of a run: where its results are, which cells are not valid, and what to do."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from servegrid.records.verdict import NOT_RUN
from servegrid.study.text import pluralize
from snakemake_logger_plugin_servegrid import forecast
from snakemake_logger_plugin_servegrid.messages import format_seconds
from snakemake_logger_plugin_servegrid.progress import DONE, Job, RunProgress, count_reasons

CELLS = Path("results/tables/cells.parquet")
PAGE = Path("results/report/index.html")

_NOT_SERVED = "see the column verdict_detail; lower the load or give the engine more memory"
_SLOW_CLIENT = "the load client needs more CPU; use a node without other work, or more cores"
_REPEAT = "something disturbed the node; measure again when it is idle"
REMEDIES = {
    "http_error": _NOT_SERVED,
    "timeout": "raise timeout_s or idle_timeout_s, or lower the load",
    "wrong_tokens": "check the tokenizer and the engine's arguments",
    "queued": "raise max_num_seqs or the KV cache; the latencies include the wait",
    "oom": "lower concurrency or input_len, or give the engine more memory",
    "oom_at_start": "raise gpu_count, lower max_model_len, or use larger GPUs or fewer bits",
    "unsupported": "correct the study: the column verdict_detail says what cannot work",
    NOT_RUN: "the column verdict_detail says why. To run cells that the search did not need, set "
    "`grid: full`; to run dominated ones, set `prune: false` and delete their folders in "
    "results/cells",
    "server_died": "see the cell's log; lower the load or give the engine more memory",
    "tokens": "check the tokenizer and the engine's arguments",
    "no_steady_state": "raise requests_per_user or duration_s",
    "too_few_in_flight": "raise requests_per_user or duration_s",
    "prefix_cache": "turn prefix caching off in the engine",
    "preempted": "lower concurrency or input_len, or give the engine more KV cache",
    "foreign_load": "use a server that serves nobody else meanwhile, then measure again",
    "buffered": "measure without the gateway, or turn its buffering off",
    "server_queueing": "raise max_num_seqs, or lower concurrency",
    "sent_late": _SLOW_CLIENT,
    "client_busy": _SLOW_CLIENT,
    "client_timing_error": _SLOW_CLIENT,
    "clock_step": _REPEAT,
    "gpu_throttled": "check the GPU's cooling and power supply, then measure again",
    "drifted": _REPEAT,
    "wrong_network": "see docs/troubleshooting.md, or remove `network` from the deployment",
}
"""What to do about each verdict and rule of validity."""


def outcome_lines(progress: RunProgress, launch_folder: Path) -> list[str]:
    """The last lines; none if nothing was to be run. Reads the table of cells."""

    def shown(path: Path) -> str:
        return os.path.relpath(path, launch_folder)

    if not progress.begun and not progress.nothing_to_do:
        return []
    lines = [_describe_run(progress)] if progress.begun else []
    incomplete = progress.begun and not _is_complete(progress)
    if progress.nothing_to_do or "gather" in progress.finished:
        lines += describe_validity(read_cells(CELLS), shown(CELLS.with_suffix(".csv")))
    if PAGE.exists() and not incomplete:
        lines.append(f"Results on one page: {shown(PAGE)}")
    if incomplete:
        if progress.log_files:
            lines.append(f"Snakemake's log: {shown(Path(progress.log_files.split(', ')[0]))}")
        lines.append("To resume, run the same command again.")
    return lines


def _is_complete(progress: RunProgress) -> bool:
    done, total = progress.cells()
    return not progress.interrupted and (done, progress.other_done) == (total, progress.other_total)


def _describe_run(progress: RunProgress) -> str:
    done, total = progress.cells()
    took = f"in {format_seconds(time.monotonic() - progress.started)}"
    if _is_complete(progress):
        return f"{pluralize(total, 'measurement')} done {took}." if total else f"Done {took}."
    how = "Interrupted" if progress.interrupted else "Not finished"
    missing = [
        f"{each.name} ({each.total - each.done})"
        for each in progress.deployments()
        if each.state != DONE
    ]
    text = f"{how}: {done} of {pluralize(total, 'measurement')} done {took}."
    if missing:
        return f"{text} Missing: {', '.join(missing)}."
    other = pluralize(progress.other_total - progress.other_done, "other job")
    return f"{text} {other} not done."


def read_cells(table: Path) -> list[dict[str, Any]]:
    """Trial, bring-up, verdict and validity of the table's rows; none if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(
            table, columns=["trial", "bring_up", "verdict", "valid", "invalid_rules"]
        ).to_pylist()
    except (OSError, pa.ArrowException, KeyError):
        return []
    return rows


def describe_validity(cells: Iterable[Mapping[str, Any]], table: str) -> list[str]:
    """How many cells are valid, and per verdict and rule how many are not, with the remedy.

    `cells` have the keys trial, bring_up, verdict, valid and invalid_rules, a row per trial of a
    cell; `table` is where their evidence is.
    """
    cells = list(cells)
    if not cells:
        return []
    noun = "trials" if any(each["trial"] > 1 or each["bring_up"] > 1 for each in cells) else "cells"
    run = [each for each in cells if each["verdict"] != NOT_RUN]
    valid = sum(each["valid"] is True for each in run)
    counted = f"Valid {noun}: {valid} of {len(run)}."
    if skipped := len(cells) - len(run):
        counted += f" Not run: {skipped}; {REMEDIES[NOT_RUN]}."
    if valid == len(run):
        return [counted]
    causes: Counter[str] = Counter()
    for each in run:
        causes.update([each["verdict"]] if each["valid"] is None else each["invalid_rules"] or [])
    lines = [f"{counted} Not served, or not valid:"]
    for cause, count in causes.most_common():
        remedy = REMEDIES.get(cause, f"see {table}")
        lines.append(f"  {count} {cause}: {remedy}.")
    lines.append(f"  Evidence: the columns verdict_detail and invalid_evidence of {table}.")
    lines.append(
        "  To measure a cell again, delete its folder in results/cells and "
        "run the same command again."
    )
    return lines


def dry_run_lines(progress: RunProgress) -> list[str]:
    """What a dry run shows: cells per deployment and why, and other jobs per rule."""
    if not progress.begun:
        return []
    deployments = progress.deployments()
    jobs_of: dict[str | None, list[Job]] = {}
    for job in progress.jobs.values():
        jobs_of.setdefault(job.deployment, []).append(job)
    others = Counter(job.rule for job in jobs_of.pop(None, []) if job.rule != "all")
    lines = []
    if deployments:
        total = sum(each.total for each in deployments)
        lines.append(f"{pluralize(total, 'measurement')} to do:")
        width = len(str(max(each.total for each in deployments)))
        for each in sorted(deployments, key=lambda deployment: deployment.name):
            reasons = _format_reasons(jobs_of[each.name])
            lines.append(f"  {each.total:>{width}}  {each.name}{reasons}")
        lines += forecast.lines({job.target for jobs in jobs_of.values() for job in jobs})
    if others:
        listed = ", ".join(rule if n == 1 else f"{n} × {rule}" for rule, n in others.items())
        lines.append(f"{pluralize(sum(others.values()), 'other job')} to run: {listed}")
    lines.append("This was a dry run: nothing was started. --verbose lists every job.")
    return lines


def _format_reasons(jobs: list[Job]) -> str:
    """Why a deployment's cells are measured, if not because they are missing."""
    reasons = count_reasons(jobs)
    if set(reasons) <= {"Missing output files"}:
        return ""
    return f" ({', '.join(f'{count}: {reason}' for reason, count in reasons.items())})"
