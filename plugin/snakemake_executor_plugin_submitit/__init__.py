"""Snakemake executor: jobs with the same resource `allocation` share one submitit job.

In this job, a service (any context manager, see `allocation.ServiceFactory`) starts once. The jobs
then run one after another, in the order of their resource `order`, each in its own process. Every
other job is submitted alone.
"""

# No `from __future__ import annotations`, and Optional instead of `| None`: Snakemake reads the
# types of the settings at run time.
import asyncio
import contextlib
import math
import os
import signal
import sys
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

from snakemake_executor_plugin_submitit import container
from snakemake_executor_plugin_submitit.jobs import (
    allocation_name,
    job_key,
    job_log,
    job_order,
    job_params,
    job_seconds,
    parse_arguments,
    to_json_data,
)
from snakemake_executor_plugin_submitit.manager import AllocationManager
from snakemake_executor_plugin_submitit.progress import Progress
from snakemake_executor_plugin_submitit.spool import Task
from snakemake_executor_plugin_submitit.submission import (
    Parameters,
    check_folder,
    check_function_name,
    check_python,
    choose_cluster,
    import_function,
    load_kinds,
    resolve_python,
)
from snakemake_executor_plugin_submitit.tracking import AllocationSpec, Failure, QueuedJob
from snakemake_executor_plugin_submitit.unlock import record_before_locking


def _interrupt_on_sigterm() -> None:
    """Let SIGTERM end the main process as Ctrl-C does, with all allocations.

    Snakemake's own handler, set after the executor was created, waits for all jobs that were
    handed to the executor. Whoever has sent the signal does not wait that long.
    """

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing may interrupt the cancelling
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, interrupt)


@dataclass
class ExecutorSettings(ExecutorSettingsBase):  # type: ignore[misc]
    cluster: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "slurm or local (default: slurm if it is installed, else local)"},
    )
    service: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "module:function that returns the context manager of an allocation's service. "
            "It is called with the name of the allocation and the params and resources of its "
            "first job (default: no service)"
        },
    )
    follower: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "module:function that returns the context manager of the service's part on "
            "each further node of an allocation with several nodes. Both functions then get the "
            "nodes as fourth argument (default: only the first node runs a process)"
        },
    )
    check: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "module:function that is called before an allocation is submitted, with its "
            "name, params, resources and submission parameters. If it raises an exception, the "
            "allocation is not submitted (default: no check)"
        },
    )
    kinds: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "YAML file with the submission parameters of each kind of node, a value of "
            "the resource `kind` (default: none)"
        },
    )
    max_allocations: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "maximum number of allocations at the same time (default: unlimited on slurm, "
            "1 on local)",
            "type": int,
        },
    )
    preload: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "comma-separated modules that an allocation imports once for all its jobs "
            "(default: none)"
        },
    )
    records: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "folder for one JSON file per ended allocation that had a service "
            "(default: none)"
        },
    )
    idle_timeout: int = field(
        default=15,
        metadata={"help": "seconds that an allocation without jobs waits for more jobs"},
    )
    folder: str = field(
        default=".snakemake/submitit",
        metadata={"help": "folder for the queues and logs of allocations"},
    )

    def __post_init__(self) -> None:
        record_before_locking()


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
    _poll_s = 0.5  # needed before __post_init__

    def __post_init__(self) -> None:
        settings = self.workflow.executor_settings
        if self.workflow.remote_execution_settings.precommand:
            raise WorkflowError(
                "--precommand does not work with the submitit executor. "
                "Write the command under `setup` of a kind in the file of submitit-kinds."
            )
        if settings.max_allocations is not None and settings.max_allocations < 1:
            raise WorkflowError(
                f"submitit-max-allocations: {settings.max_allocations} is less than 1. "
                "Use 1 or more."
            )
        check_python(sys.executable)
        self._cluster = choose_cluster(settings.cluster)
        self._folder = folder = Path(settings.folder).absolute()
        if self._cluster == "slurm":
            check_folder(folder)
            self._poll_s = 2.0  # there may be hundreds of journals on a shared file system
        self._service = check_function_name(settings.service, "submitit-service")
        self._follower = check_function_name(settings.follower, "submitit-follower")
        check = check_function_name(settings.check, "submitit-check")
        self._check = import_function(check, "submitit-check")
        self._start = Path(self.workflow.rundir)  # before --directory
        self._kinds_path = self._start / settings.kinds if settings.kinds else None
        self._kinds = load_kinds(self._kinds_path) if self._kinds_path else {}
        self._manager: AllocationManager[JobExecutorInterface] = AllocationManager(
            folder,
            self._cluster,
            max_allocations=settings.max_allocations or (1 if self._cluster == "local" else None),
            idle_timeout=settings.idle_timeout,
            report=self._report,
            records=Path(settings.records).absolute() if settings.records else None,
            preload=tuple(filter(None, (settings.preload or "").replace(" ", "").split(","))),
            modules=str(Path(self.workflow.main_snakefile).absolute().parent),
        )
        self._outcomes: dict[JobExecutorInterface, Failure | None] = {}

    def additional_general_args(self) -> str:
        # A single job does not need the solver.
        return "--quiet progress rules host --scheduler greedy"

    async def sleep(self) -> None:
        await asyncio.sleep(self._poll_s)

    def run_job(self, job: JobExecutorInterface) -> None:
        self.run_jobs([job])

    def run_jobs(self, jobs: list[JobExecutorInterface]) -> None:
        _interrupt_on_sigterm()
        for job in jobs:  # before one of them is submitted
            self._kind_parameters(job)
        batch = []
        for job in sorted(jobs, key=lambda job: str(job.jobid).zfill(12)):
            self.run_job_pre(job)
            task = self._task(job)
            name = allocation_name(job) or f"{job.name}-{task.key}"
            spec = partial(self._spec, job, name)
            batch.append((name, QueuedJob(job, task, spec, job_seconds(job, "expected_s"))))
            self.report_job_submission(SubmittedJobInfo(job))
        self._manager.put(batch)

    async def check_active_jobs(
        self, active_jobs: list[SubmittedJobInfo]
    ) -> AsyncGenerator[SubmittedJobInfo, None]:
        if not active_jobs:  # the first calls come before __post_init__
            return
        for outcome in self._manager.poll():
            if outcome.failure and outcome.failure.allocation:
                self._report_allocation_failure(outcome.jobs, outcome.failure)
            self._outcomes.update((job, outcome.failure) for job in outcome.jobs)
        for info in active_jobs:
            if info.job not in self._outcomes:
                yield info
            elif (failure := self._outcomes.pop(info.job)) is None:
                self.report_job_success(info)
            elif failure.allocation:
                self.workflow.scheduler.error_callback(info.job)
            else:
                logs = [] if job_log(info.job) else [failure.log]
                self.report_job_error(info, msg=f"{failure.message} ", aux_logs=logs)

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        self._manager.cancel()

    def shutdown(self) -> None:
        self._manager.close()
        super().shutdown()

    def _task(self, job: JobExecutorInterface) -> Task:
        return Task(
            key=job_key(job),
            argv=parse_arguments(self.format_job_exec(job)),
            cwd=self.workflow.workdir_init,
            log=job_log(job),
            order=job_order(job),
        )

    def _spec(self, job: JobExecutorInterface, name: str) -> AllocationSpec:
        """The allocation whose first job this is. Raises WorkflowError if the check refuses it."""
        rule = f"{job.name}: resources"
        resources = {
            key: to_json_data(value, f"{rule}.{key}") for key, value in job.resources.items()
        }
        is_shared = allocation_name(job) is not None
        params = job_params(job) if is_shared else {}
        service = self._service if is_shared else None
        follower = self._follower if service else None
        kind = self._kind_parameters(job)
        place = f"{self._kinds_path}: {job.resources.get('kind')}" if kind else rule
        try:
            parameters = Parameters.build(self._cluster, resources, kind, follower is not None)
        except WorkflowError as error:
            raise WorkflowError(f"Allocation {name}: not submitted. {place}: {error}") from None
        spec = AllocationSpec(
            name=name,
            service=service,
            params={
                key: to_json_data(value, f"{job.name}: params.{key}")
                for key, value in params.items()
            },
            resources={key: value for key, value in resources.items() if key[0] != "_"},
            parameters=parameters,
            is_reusable=is_shared,
            follower=follower if parameters.on_all_nodes else None,
            start_s=job_seconds(job, "expected_start_s") or 0.0,
            later_s=self._later_s(name) if is_shared else 0.0,
        )
        if self._check and is_shared:
            try:
                self._check(name, spec.params, spec.resources, spec.parameters.values)
            except Exception as error:
                raise WorkflowError(
                    f"Allocation {name}: not submitted. {place}: {error}"
                ) from error
        return spec

    def _later_s(self, name: str) -> float | None:
        """What the allocation's jobs that Snakemake has not handed over yet are expected to take.

        There are such jobs if more are ready than `--jobs` allows. None if that is not known.
        """
        # One step, because the scheduler changes this set in its own thread.
        ready = tuple(self.workflow.dag.ready_jobs)
        later = [job_seconds(job, "expected_s") for job in ready if allocation_name(job) == name]
        return None if None in later else math.fsum(filter(None, later))

    def _kind_parameters(self, job: JobExecutorInterface) -> dict[str, Any]:
        """The parameters of the job's kind of node, with the absolute path of its Python."""
        kind = str(job.resources.get("kind", ""))
        if not self._kinds or not kind:
            return {}
        if kind not in self._kinds:
            raise WorkflowError(
                f"{job.name}: resources: kind `{kind}` is not in {self._kinds_path}. "
                f"Use one of: {', '.join(self._kinds)}."
            )
        resolved = ("python", "container")
        parameters = {key: each for key, each in self._kinds[kind].items() if key not in resolved}
        location = f"{self._kinds_path}: {kind}"
        parameters |= resolve_python(self._kinds[kind], job.resources, self._start, location)
        return parameters | self._container(self._kinds[kind], job, location)

    def _container(
        self, kind: dict[str, Any], job: JobExecutorInterface, location: str
    ) -> dict[str, Any]:
        """The kind's container, which sees the folders of the workflow; empty without one."""
        if "container" not in kind or job.resources.get("environment") == "main":
            return {}
        snakefile = Path(self.workflow.main_snakefile).absolute().parent
        folders = (self._start, Path(self.workflow.workdir_init), self._folder, snakefile)
        try:
            found = container.resolve(kind["container"], self._start, folders, os.environ)
        except container.ContainerError as error:
            raise WorkflowError(f"{location}.container.{error}") from None
        return {"container": found}

    def _report(self, text: str, progress: Optional[Progress] = None) -> None:  # noqa: UP045
        """Log a line. Logger plugins find the allocation's progress in the record."""
        self.logger.info(text, extra={"allocation": progress.to_dict()} if progress else None)

    def _report_allocation_failure(
        self, jobs: Sequence[JobExecutorInterface], failure: Failure
    ) -> None:
        """Log one error for all jobs of a failed allocation."""
        assert failure.allocation is not None
        rules = Counter(job.name for job in jobs)
        counts = ", ".join(f"{number} of {rule}" for rule, number in rules.items())
        lines = [failure.message, f"Jobs not done: {counts}."]
        lines += [f"Log: {failure.log}"] if failure.log else []
        self.logger.error(
            "\n    ".join(line for text in lines for line in text.splitlines()),
            extra={"allocation": failure.allocation.to_dict()},
        )
