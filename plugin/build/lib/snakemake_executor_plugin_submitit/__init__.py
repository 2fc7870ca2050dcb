"""Snakemake executor: jobs with the same resource `allocation` share one submitit job.

In that job a service, any context manager, is up once for all of them, and they run against it
one after another, in the order of their resource `order`, each in its own process. Every other
job gets a submitit job of its own. What a service is, `allocation.ServiceFactory` says.
"""

# No `from __future__ import annotations`, and Optional instead of `| None`: Snakemake reads the
# types of the settings at run time.
import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.jobs import JobExecutorInterface
from snakemake_interface_executor_plugins.settings import CommonSettings, ExecutorSettingsBase

from snakemake_executor_plugin_submitit.jobs import (
    allocation_of,
    argv_of,
    job_order,
    key_of,
    log_of,
    params_of,
    plain,
)
from snakemake_executor_plugin_submitit.manager import AllocationManager
from snakemake_executor_plugin_submitit.spool import Task
from snakemake_executor_plugin_submitit.submission import (
    Parameters,
    checked_name,
    choose_cluster,
    loaded,
    python_of,
    read_kinds,
)
from snakemake_executor_plugin_submitit.tracking import AllocationSpec, Failure, Queued
from snakemake_executor_plugin_submitit.unlock import hold


@dataclass
class ExecutorSettings(ExecutorSettingsBase):  # type: ignore[misc]
    cluster: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "slurm or local (default: slurm where it is installed, else local)"},
    )
    service: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "module:function that returns the context manager to be entered in each "
            "allocation; it is called with the allocation's name and the params and resources "
            "of its first job"
        },
    )
    check: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "module:function that is called before an allocation is submitted, with its "
            "name, params, resources and submission parameters; what it raises refuses it"
        },
    )
    kinds: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "YAML file that maps values of the resource `kind` to the submission "
            "parameters of that kind of node"
        },
    )
    max_allocations: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "most allocations at once (default: unlimited on slurm, 1 on local)",
            "type": int,
        },
    )
    preload: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "modules, separated by commas, that the jobs of an allocation import anyway: "
            "they are imported once"
        },
    )
    records: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "folder that keeps a JSON file of each allocation that has ended"},
    )
    idle_timeout: int = field(
        default=15, metadata={"help": "seconds that an idle allocation waits for further jobs"}
    )
    folder: str = field(
        default=".snakemake/submitit",
        metadata={"help": "where queues and logs of allocations are kept"},
    )


common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    pass_default_storage_provider_args=True,
    pass_default_resources_args=True,
    pass_envvar_declarations_to_cmd=False,
    auto_deploy_default_storage_provider=False,
)


class Executor(RemoteExecutor):  # type: ignore[misc]
    _poll_s = 0.5  # asked for before __post_init__ as well

    def __post_init__(self) -> None:
        settings = self.workflow.executor_settings
        if self.workflow.remote_execution_settings.precommand:
            raise WorkflowError(
                "--precommand is not for this executor: give the kind of node a `setup` instead."
            )
        if settings.max_allocations is not None and settings.max_allocations < 1:
            raise WorkflowError("submitit-max-allocations: at least 1 allocation must be allowed.")
        self._cluster = choose_cluster(settings.cluster)
        if self._cluster == "slurm":
            self._poll_s = 2.0  # hundreds of journals, perhaps, on a shared file system
        self._service = checked_name(settings.service, "submitit-service")
        self._check = loaded(checked_name(settings.check, "submitit-check"), "submitit-check")
        hold()
        self._start = Path(self.workflow.rundir)  # before --directory
        self._kinds_path = self._start / settings.kinds if settings.kinds else None
        self._kinds = read_kinds(self._kinds_path) if self._kinds_path else {}
        self._manager: AllocationManager[JobExecutorInterface] = AllocationManager(
            Path(settings.folder).absolute(),
            self._cluster,
            max_allocations=settings.max_allocations or (1 if self._cluster == "local" else None),
            idle_timeout=settings.idle_timeout,
            report=self._report_line,
            records=Path(settings.records).absolute() if settings.records else None,
            preload=tuple(filter(None, (settings.preload or "").replace(" ", "").split(","))),
        )
        self._outcomes: dict[JobExecutorInterface, Failure | None] = {}

    def additional_general_args(self) -> str:
        # One job needs no solver to be scheduled.
        return "--quiet progress rules host --scheduler greedy"

    async def sleep(self) -> None:
        await asyncio.sleep(self._poll_s)

    def run_job(self, job: JobExecutorInterface) -> None:
        self.run_jobs([job])

    def run_jobs(self, jobs: list[JobExecutorInterface]) -> None:
        for job in jobs:  # before any of them is submitted
            self._kind_of(job)
        batch = []
        for job in sorted(jobs, key=lambda job: str(job.jobid).zfill(12)):
            self.run_job_pre(job)
            task = self._task(job)
            name = allocation_of(job) or f"{job.name}-{task.key}"
            batch.append((name, Queued(job, task, partial(self._spec, job, name))))
            self.report_job_submission(SubmittedJobInfo(job))
        self._manager.put(batch)

    async def check_active_jobs(
        self, active_jobs: list[SubmittedJobInfo]
    ) -> AsyncGenerator[SubmittedJobInfo, None]:
        if not active_jobs:  # the first calls come before __post_init__
            return
        for outcome in self._manager.poll():
            if outcome.failure and outcome.failure.of_allocation:
                self._report_once(outcome.jobs, outcome.failure)
            self._outcomes.update((job, outcome.failure) for job in outcome.jobs)
        for info in active_jobs:
            if info.job not in self._outcomes:
                yield info
            elif (failure := self._outcomes.pop(info.job)) is None:
                self.report_job_success(info)
            elif failure.of_allocation:
                self.workflow.scheduler.error_callback(info.job)
            else:
                logs = [] if log_of(info.job) else [failure.log]
                self.report_job_error(info, msg=f"{failure.message} ", aux_logs=logs)

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        self._manager.cancel()

    def shutdown(self) -> None:
        self._manager.close()
        super().shutdown()

    def _task(self, job: JobExecutorInterface) -> Task:
        return Task(
            key=key_of(job),
            argv=argv_of(self.format_job_exec(job)),
            cwd=self.workflow.workdir_init,
            log=log_of(job),
            order=job_order(job),
        )

    def _spec(self, job: JobExecutorInterface, name: str) -> AllocationSpec:
        """What the allocation is to be of which this job is the first."""
        rule = f"{job.name}: resources"
        resources = {key: plain(value, f"{rule}.{key}") for key, value in job.resources.items()}
        of_its_own = allocation_of(job) is None
        params = {} if of_its_own else params_of(job)
        need = AllocationSpec(
            name=name,
            service=None if of_its_own else self._service,
            params={
                key: plain(value, f"{job.name}: params.{key}") for key, value in params.items()
            },
            resources={key: each for key, each in resources.items() if key[0] != "_"},
            parameters=Parameters.of(self._cluster, resources, self._kind_of(job)),
            is_reusable=not of_its_own,
        )
        if self._check and not of_its_own:
            try:
                self._check(name, need.params, need.resources, need.parameters.values)
            except Exception as error:
                raise WorkflowError(f"Allocation {name}: not submitted. {error}") from error
        return need

    def _kind_of(self, job: JobExecutorInterface) -> dict[str, Any]:
        """What the site says of the job's kind of node, with its Python as an absolute path."""
        kind = str(job.resources.get("kind", ""))
        if not self._kinds or not kind:
            return {}
        if kind not in self._kinds:
            raise WorkflowError(
                f"{job.name}: resources: kind `{kind}` is not in {self._kinds_path}. "
                f"Valid are: {', '.join(self._kinds)}."
            )
        where = f"{self._kinds_path}: {kind}"
        given = {key: value for key, value in self._kinds[kind].items() if key != "python"}
        return given | python_of(self._kinds[kind], job.resources, self._start, where)

    def _report_line(self, text: str, allocation: Optional[dict[str, Any]] = None) -> None:  # noqa: UP045
        """Log a line; logger plugins find the allocation's progress in the record."""
        self.logger.info(text, extra=None if allocation is None else {"allocation": allocation})

    def _report_once(self, jobs: Sequence[JobExecutorInterface], failure: Failure) -> None:
        """One error, however many jobs it concerns."""
        rules = Counter(job.name for job in jobs)
        concerned = ", ".join(f"{number} of {rule}" for rule, number in rules.items())
        lines = [failure.message, f"Jobs not done: {concerned}."]
        lines += [f"Log: {failure.log}"] if failure.log else []
        self.logger.error("\n    ".join(line for text in lines for line in text.splitlines()))
