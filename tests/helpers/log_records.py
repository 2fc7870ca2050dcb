"""Log records as Snakemake and the executor plugin make them."""

from __future__ import annotations

import logging
from typing import Any

from snakemake_interface_logger_plugins.common import LogEvent


def log_record(
    text: str | None = None, level: int = logging.INFO, **extra: Any
) -> logging.LogRecord:
    record = logging.LogRecord("snakemake.logging", level, "scheduler.py", 1, text, (), None)
    vars(record).update(extra)
    return record


def executor_record(text: str) -> logging.LogRecord:
    record = log_record(text)
    record.pathname = "/site/snakemake_executor_plugin_submitit/manager.py"
    return record


def run_info(**stats: int) -> logging.LogRecord:
    stats |= {"all": 1, "total": sum(stats.values()) + 1}
    return log_record("Job stats: …", event=LogEvent.RUN_INFO, stats=stats)


def job_info(
    job_id: int,
    rule: str = "measure",
    reason: str = "Missing output files: results/x",
    **wildcards: str,
) -> logging.LogRecord:
    return log_record(
        f" Rule: {rule}, Jobid: {job_id}",
        event=LogEvent.JOB_INFO,
        jobid=job_id,
        rule_name=rule,
        wildcards=wildcards,
        reason=reason,
    )


def cell_info(job_id: int, deployment: str, cell: str, trial: int = 1) -> logging.LogRecord:
    return job_info(job_id, deployment=deployment, cell=cell, trial=str(trial))


def job_finished(job_id: int) -> logging.LogRecord:
    text = f"Finished jobid: {job_id} (Rule: measure)"
    return log_record(text, event=LogEvent.JOB_FINISHED, job_id=job_id)


def job_error(
    job_id: int, rule: str = "measure", message: str | None = None, log: list[str] | None = None
) -> logging.LogRecord:
    return log_record(
        f"Error in rule {rule}, jobid: {job_id}",
        logging.ERROR,
        event=LogEvent.JOB_ERROR,
        jobid=job_id,
        rule_name=rule,
        rule_msg=message,
        log=log or [],
    )


def allocation(deployment: str, state: str, **values: Any) -> logging.LogRecord:
    description = {"node": None, "reason": None, "done": 0, "total": 0, "eta_s": None} | values
    name = f"{deployment}.0123abcd"
    return log_record(
        f"Allocation {name}: {state}",
        allocation={"name": name, "state": state} | description,
    )
