"""How far a run is, from the records that Snakemake and its executor log.

Rules other than `measure` count as "other jobs". An executor that runs several jobs in one
allocation describes it in a record's attribute `allocation`:

    {"name": "<deployment>.<8 hex digits>", "state": "pending|starting|running|ended|failed",
     "node": …, "reason": …, "done": …, "total": …, "eta_s": …}
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from snakemake_interface_logger_plugins.common import LogEvent

from servegrid.study.text import pluralize
from snakemake_logger_plugin_servegrid.failures import format_failure
from snakemake_logger_plugin_servegrid.messages import Level, Message, format_seconds

MEASURE = "measure"
PENDING, STARTING, RUNNING = "pending", "starting", "running"
DONE, FAILED, STOPPED = "done", "failed", "stopped"
SHOWN_IN_FULL = 3
"""Failed jobs whose logs are shown; more would push everything else off the screen."""
HOLD_S = 1.0
"""Seconds until a failure is shown, for Snakemake says only afterwards that it tries again."""

_ROUTINE = (
    "Assuming unrestricted shared filesystem",
    "Building DAG of jobs",
    "Config file ",
    "Elapsed time",
    "Multiple includes",
    "Processed ",
    "Workflow has started",
)
"""Beginnings of Snakemake's messages that say nothing about what it was asked for."""
_REPEATED = (
    "At least one job did not complete successfully",
    "Exiting because a job execution failed",
    "returned non-zero exit status",
)
"""Parts of Snakemake's errors that repeat what a failed job's own message says."""


@dataclass(frozen=True)
class Job:
    """A job that Snakemake has announced."""

    rule: str
    wildcards: Mapping[str, str]
    reason: str = ""

    @property
    def deployment(self) -> str | None:
        """The name of the deployment, with that of a later bring-up: `d.bring_up-2`."""
        if self.rule != MEASURE or "deployment" not in self.wildcards:
            return None
        bring_up = self.wildcards.get("trial", "").partition("-")[2]
        return ".".join(filter(None, [self.wildcards["deployment"], bring_up]))

    @property
    def target(self) -> str:
        """What the job works on: the path of a trial, or the wildcards' values."""
        if self.deployment:
            trial = f"trial-{self.wildcards.get('trial', 1)}"
            return f"{self.wildcards['deployment']}/{self.wildcards.get('cell')}/{trial}"
        return ", ".join(f"{key}={value}" for key, value in self.wildcards.items())


@dataclass
class DeploymentProgress:
    """One deployment: its measurements, and the state of its allocation.

    `first` and `last` are the times (time.monotonic) of the start of this allocation's first
    measurement and of the end of its last one, `measured` how many it has done between them.
    `eta_s` is the executor's estimate.
    """

    name: str
    total: int = 0
    done: int = 0
    failed: int = 0
    state: str = PENDING
    node: str | None = None
    reason: str | None = None
    eta_s: float | None = None
    first: float = 0.0
    last: float = 0.0
    measured: int = 0

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the mean time of a measurement; the executor's estimate until then."""
        if not self.measured:
            return self.eta_s
        left = self.total - self.done - self.failed
        expected = left * (self.last - self.first) / self.measured
        return max(0.0, expected - (time.monotonic() - self.last))

    @property
    def status(self) -> str:
        """The state, with what a person wants to know about it."""
        failed = f", {self.failed} failed" if self.failed else ""
        if self.state == FAILED:
            failed = f"{self.failed} of {self.total}" if self.failed else ""
            return ": ".join(filter(None, (self.state, self.reason or failed)))
        if self.state == PENDING:
            return self.state + (f": {self.reason}" if self.reason else "") + failed
        if self.state in (DONE, STOPPED):
            return self.state + failed
        where = f" on {self.node}" if self.node else ""
        left = ""
        if self.state == RUNNING and (seconds := self.seconds_left):
            left = f", about {format_seconds(seconds)} left"
        return f"{self.state}{where}{failed}{left}"


class RunProgress:
    """Updated with one record at a time; its deployments may be read by another thread."""

    def __init__(self, show_failed_logs: bool = True) -> None:
        self._show_failed_logs = show_failed_logs
        self._lock = threading.Lock()
        self._deployments: dict[str, DeploymentProgress] = {}
        self._failures_shown = 0
        self._held: dict[int, tuple[float, logging.LogRecord]] = {}
        self._last_warning = ""
        self.jobs: dict[int, Job] = {}
        self.finished: set[str] = set()
        """Rules of which at least one job has finished."""
        self.planned: dict[str, int] = {}
        """Jobs to do per rule, `all` apart."""
        self.other_done = 0
        self.started = time.monotonic()
        self.workflow_started = False
        self.nothing_to_do = False
        self.interrupted = False
        self.log_files = ""

    @property
    def begun(self) -> bool:
        """Whether the first job has been announced."""
        return bool(self.jobs)

    @property
    def other_total(self) -> int:
        return sum(count for rule, count in self.planned.items() if rule != MEASURE)

    def deployments(self) -> list[DeploymentProgress]:
        """Copies of those with cells to measure, in the order in which they became known."""
        with self._lock:
            return [replace(each) for each in self._deployments.values() if each.total]

    def cells(self) -> tuple[int, int]:
        """Measurements done, and all of this run."""
        each = self.deployments()
        total = max(self.planned.get(MEASURE, 0), sum(one.total for one in each))
        return sum(one.done for one in each), total

    def update(self, record: logging.LogRecord) -> list[Message]:
        """Take a record in. Returns what is to be printed because of it."""
        with self._lock:
            if allocation := getattr(record, "allocation", None):
                changes = self._update_allocation(allocation)
                urgent = record.levelno >= logging.WARNING
                return changes + (self._message(record) if urgent else [])
            event = getattr(record, "event", None)
            if event == LogEvent.WORKFLOW_STARTED:
                self.workflow_started = True
            elif event == LogEvent.RUN_INFO:
                stats: Mapping[str, int] = getattr(record, "stats", {})
                self.planned = {
                    rule: count for rule, count in stats.items() if rule not in ("all", "total")
                }
            elif event == LogEvent.JOB_INFO:
                self._announce(record)
            elif event == LogEvent.JOB_FINISHED:
                return self._finish(vars(record)["job_id"])
            elif event == LogEvent.JOB_ERROR:
                self._held[vars(record)["jobid"]] = time.monotonic(), record
            elif event in (None, LogEvent.ERROR, LogEvent.GROUP_ERROR):
                return self._message(record)
            return []

    def _announce(self, record: logging.LogRecord) -> None:
        data = vars(record)
        job = Job(data["rule_name"], dict(data["wildcards"] or {}), data.get("reason") or "")
        if data["jobid"] not in self.jobs and job.deployment:
            self._deployment(job.deployment).total += 1
        self.jobs[data["jobid"]] = job

    def _deployment(self, name: str) -> DeploymentProgress:
        return self._deployments.setdefault(name, DeploymentProgress(name))

    def _finish(self, job_id: int) -> list[Message]:
        job = self.jobs.get(job_id)
        if job is None or job.rule == "all":
            return []
        self.finished.add(job.rule)
        if job.deployment is None:
            self.other_done += 1
            return []
        deployment = self._deployment(job.deployment)
        deployment.done += 1
        deployment.measured += deployment.state == RUNNING
        deployment.last = time.monotonic()
        if deployment.done < deployment.total:
            return []
        return self._change(deployment, DONE)

    def failures(self, older_than_s: float = HOLD_S) -> list[Message]:
        """The jobs that have failed for good, each once."""
        with self._lock:
            now = time.monotonic()
            due = [job for job, (when, _) in self._held.items() if now - when >= older_than_s]
            return [self._fail(job, self._held.pop(job)[1]) for job in due]

    @property
    def holds_failures(self) -> bool:
        return bool(self._held)

    def _fail(self, job_id: int, record: logging.LogRecord) -> Message:
        job = self.jobs.get(job_id, Job(vars(record)["rule_name"], {}))
        self._failures_shown += 1
        if job.deployment:
            self._deployment(job.deployment).failed += 1
        text = format_failure(
            self._failed(job, record),
            logs=list(dict.fromkeys(getattr(record, "log", None) or [])),
            show_logs=self._show_failed_logs,
            briefly=self._failures_shown > SHOWN_IN_FULL,
        )
        return Message(Level.ERROR, text)

    def _update_allocation(self, allocation: Mapping[str, Any]) -> list[Message]:
        name = re.sub(r"\.[0-9a-f]{8}$", "", str(allocation["name"]))
        deployment = self._deployment(name)
        state, reason = allocation.get("state"), allocation.get("reason")
        node = allocation.get("node")
        deployment.eta_s = allocation.get("eta_s")
        if deployment.total and deployment.done >= deployment.total:
            state = DONE
        elif state == "ended" and not self._left(deployment):
            state = FAILED
        elif state not in (PENDING, STARTING, RUNNING, FAILED):
            state, reason = PENDING, reason or "another allocation measures the rest"
        if state != deployment.state or (state == PENDING and reason and not deployment.reason):
            deployment.node, deployment.reason = node, reason
            return self._change(deployment, state)
        deployment.node, deployment.reason = node or deployment.node, reason
        return []

    def _left(self, deployment: DeploymentProgress) -> int:
        """Measurements that have neither been done nor failed."""
        held = [self.jobs.get(job) for job in self._held]
        failed = deployment.failed + sum(
            job is not None and job.deployment == deployment.name for job in held
        )
        return deployment.total - deployment.done - failed

    def stop(self) -> None:
        """The run is over: nothing of it is running any more."""
        with self._lock:
            for each in self._deployments.values():
                if each.state not in (DONE, FAILED):
                    each.state = FAILED if each.failed else STOPPED
                    each.reason = None

    def _change(self, deployment: DeploymentProgress, state: str) -> list[Message]:
        before = deployment.state
        if before == state == DONE:
            return []
        deployment.state = state
        if state == RUNNING:
            deployment.first, deployment.measured = time.monotonic(), 0
        text = f"{deployment.name}: {deployment.status}"
        if state == DONE:
            text += f", {pluralize(deployment.done, 'measurement')}"
        return [Message(Level.CHANGE, text)] if deployment.total else []

    def _message(self, record: logging.LogRecord) -> list[Message]:
        """What to print of a record that is a plain text."""
        text = (record.getMessage() if record.msg else "").strip()
        if not text or any(part in text for part in _REPEATED):
            return []
        if record.levelno >= logging.ERROR:
            if getattr(record, "exception", None) == "WorkflowError":  # its message says it all
                text = re.sub(r'^  File ".*", line \d+, in .*\n?', "", text, flags=re.MULTILINE)
            return [Message(Level.ERROR, text.rstrip())]
        if record.levelno >= logging.WARNING:
            repeated, self._last_warning = text == self._last_warning, text
            return [] if repeated else [Message(Level.WARNING, text)]
        if "snakemake_executor_plugin" in record.pathname:
            return _executor_message(text)
        return self._info(text)

    def _info(self, text: str) -> list[Message]:
        if text.startswith("Nothing to be done"):
            self.nothing_to_do = True
            return [Message(Level.INFO, text)]
        if text.startswith("Expected time:"):
            return [Message(Level.INFO, text)]
        if text.startswith("Terminating processes on user request"):
            self.interrupted = True
            return [Message(Level.WARNING, "Interrupted. Stopping engines and allocations …")]
        if text.startswith("Will exit after finishing currently running jobs"):
            self.interrupted = True
            return [Message(Level.WARNING, "Stopping after the jobs that are running now …")]
        if text.startswith("Complete log(s): "):
            self.log_files = text.partition(": ")[2]
        elif restarted := re.match(r"Trying to restart job (\d+)", text):
            return self._restart(int(restarted[1]))
        elif not self.workflow_started and not text.startswith(_ROUTINE):
            return [Message(Level.INFO, text)]  # for example the result of --lint or --unlock
        return []

    def _restart(self, job_id: int) -> list[Message]:
        if job_id not in self._held:
            return []  # its allocation has failed, which has been said
        _, record = self._held.pop(job_id)
        text = self._failed(self.jobs[job_id], record)
        return [Message(Level.WARNING, f"{text} Snakemake retries it.")]

    def _failed(self, job: Job, record: logging.LogRecord) -> str:
        """What has failed and the executor's reason, without the hint that Snakemake adds."""
        text = str(getattr(record, "rule_msg", None) or "")
        reason = text.partition("For further error details see")[0].strip()
        target = f" for {job.target}" if job.target else ""
        return f"Rule {job.rule} failed{target}" + (f": {reason}" if reason else ".")


def _executor_message(text: str) -> list[Message]:
    """What the executor logs beside the states of its allocations, such as its final summary."""
    lines = [line for line in text.splitlines() if "run the same command again" not in line]
    return [Message(Level.CHANGE, "\n".join(lines))]


def count_reasons(jobs: list[Job]) -> Counter[str]:
    """Why Snakemake runs jobs, without the files that it names."""
    return Counter(job.reason.partition(":")[0].strip().rstrip(".") for job in jobs)
