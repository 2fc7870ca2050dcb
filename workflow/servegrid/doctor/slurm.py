"""Checks Slurm itself: its programs, its responses, and the settings that affect allocations."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from servegrid.doctor.report import Finding, Group
from servegrid.doctor.shell import CommandResult, RunCommand
from servegrid.doctor.slurm_output import (
    Account,
    Limit,
    Node,
    Partition,
    parse_accounts,
    parse_associations,
    parse_nodes,
    parse_partitions,
    parse_qos,
    parse_seconds,
    parse_settings,
    parse_version,
)
from servegrid.study.text import pluralize

REQUIRED = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
SLOW_S = 5.0
MIN_JOB_AGE_S = 60
TOOLS, CONTROLLER, SETTINGS = Group("tools"), Group("slurm"), Group("settings of slurm")


@dataclass(frozen=True)
class SlurmFacts:
    """What the controller has reported; empty if it has reported nothing.

    `accounts` contains the QoS of each account; None if Slurm does not report them. `errors` says
    why `settings`, `partitions`, `nodes` or `accounts` is empty.
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    partitions: Mapping[str, Partition] = field(default_factory=dict)
    nodes: Sequence[Node] = ()
    accounts: Mapping[str, set[str]] | None = None
    errors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rights:
    """What this user may use; None if Slurm does not say it. `qos` has the limits of each QoS."""

    accounts: Mapping[str, Account] | None = None
    default_account: str | None = None
    qos: Mapping[str, Limit] = field(default_factory=dict)
    groups: frozenset[str] | None = None


def user_name() -> str:
    """The name of this process's user in Slurm."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def user_filter() -> list[str]:
    """The option that limits squeue to this process's user, if the machine knows this user."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return []
    return ["-u", str(os.getuid())]


def query_facts(run: RunCommand, cluster: str | None = None) -> SlurmFacts:
    """Query the controller and the accounting; `cluster` is not the one of this machine."""
    scontrol = ["scontrol", *([f"--clusters={cluster}"] if cluster else [])]
    settings = run([*scontrol, "show", "config"])
    partitions = run([*scontrol, "--all", "--oneliner", "show", "partition"])
    nodes = run([*scontrol, "--all", "--oneliner", "show", "node"])
    where = [f"user={user_name()}", *([f"cluster={cluster}"] if cluster else [])]
    accounts = run(["sacctmgr", "-n", "-P", "show", "assoc", *where, "format=account,qos"])
    results = {"settings": settings, "partitions": partitions, "nodes": nodes, "accounts": accounts}
    return SlurmFacts(
        settings=parse_settings(settings.stdout) if settings.ok else {},
        partitions=parse_partitions(partitions.stdout) if partitions.ok else {},
        nodes=parse_nodes(nodes.stdout) if nodes.ok else (),
        accounts=parse_accounts(accounts.stdout) if accounts.ok else None,
        errors={name: result.message for name, result in results.items() if not result.ok},
    )


def query_rights(run: RunCommand) -> Rights:
    """Query the accounting and this machine for what this user may use."""
    show = ["sacctmgr", "-n", "-P", "show"]
    accounts = run(
        [*show, "assoc", f"user={user_name()}", "format=account,qos,defaultqos,maxwall,maxtres"]
    )
    user = run([*show, "user", user_name(), "format=defaultaccount"])
    qos = run([*show, "qos", "format=name,maxwall,maxtres,maxtrespu"])
    groups = run(["id", "-Gn"])
    return Rights(
        accounts=parse_associations(accounts.stdout) if accounts.ok else None,
        default_account=user.stdout.strip() or None if user.ok else None,
        qos=parse_qos(qos.stdout) if qos.ok else {},
        groups=frozenset(groups.stdout.split()) if groups.ok else None,
    )


def check_programs(
    run: RunCommand, which: Callable[[str], str | None] = shutil.which
) -> Iterator[Finding]:
    """Check Slurm's programs. Without them, nothing else about Slurm can be checked."""
    missing = [name for name in REQUIRED if which(name) is None]
    if missing:
        yield TOOLS.fail(
            "Slurm's programs",
            f"not on the PATH: {', '.join(missing)}",
            "Run this on a login node of the cluster; Slurm may need `module load slurm`. "
            "Without Slurm, use --profile profiles/local.",
        )
        return
    result = run(["sbatch", "--version"])
    if parse_version(result.stdout) is None:
        yield TOOLS.fail(
            "sbatch --version",
            result.message,
            "Run this on a login node of the cluster: the programs find no cluster here.",
        )
        return
    yield TOOLS.ok("Slurm's programs", f"{result.stdout.strip()}; {', '.join(REQUIRED)}")
    if which("sacct") is None:
        yield TOOLS.warn(
            "sacct",
            "not on the PATH",
            "You can ignore this: squeue is enough. The records of ended allocations contain "
            "fewer details.",
        )
    else:
        yield TOOLS.ok("sacct", "on the PATH")


def check_responses(
    ping: CommandResult, squeue: CommandResult, sacct: CommandResult | None
) -> Iterator[Finding]:
    """Check that Slurm answers. Without its controller, nothing else can be checked."""
    if not ping.ok or " is UP" not in ping.stdout:
        yield CONTROLLER.fail(
            "controller",
            f"scontrol ping: {ping.message}",
            "Wait, or ask the cluster's administrators: no job can be submitted now.",
        )
        return
    yield CONTROLLER.ok("controller", " ".join(ping.stdout.split()))
    if not squeue.ok:
        yield CONTROLLER.fail(
            "squeue",
            squeue.message,
            "Ask the administrators: without squeue, servegrid cannot follow its allocations.",
        )
    elif squeue.seconds > SLOW_S:
        yield CONTROLLER.warn(
            "squeue",
            f"takes {squeue.seconds:.1f} s to answer",
            "You can ignore this if the cluster is busy at the moment. Otherwise servegrid "
            "notices only later that an allocation has started or ended.",
        )
    else:
        jobs = pluralize(len(squeue.stdout.splitlines()), "job")
        yield CONTROLLER.ok("squeue", f"answers in {squeue.seconds:.2f} s; {jobs} of {user_name()}")
    if sacct is None:
        return
    if sacct.ok:
        yield CONTROLLER.ok("sacct", f"answers in {sacct.seconds:.2f} s")
    else:
        yield CONTROLLER.warn(
            "sacct",
            f"accounting is off or restricted: {sacct.message}",
            "You can ignore this: servegrid only needs squeue.",
        )


def query_responses(
    run: RunCommand, which: Callable[[str], str | None] = shutil.which
) -> tuple[CommandResult, CommandResult, CommandResult | None]:
    """The results of `scontrol ping`, squeue and sacct; None if sacct is not installed."""
    return (
        run(["scontrol", "ping"]),
        run(["squeue", "-h", "-r", "-t", "all", *user_filter(), "-o", "%i|%T|%N"]),
        run(["sacct", "-X", "-n", "-P", "-S", "now-1hours", "-o", "jobid"])
        if which("sacct")
        else None,
    )


def check_settings(facts: SlurmFacts, partitions: Sequence[str]) -> Iterator[Finding]:
    """Check settings of Slurm that decide how allocations in these partitions end."""
    settings = facts.settings
    if not settings:
        error = facts.errors.get("settings", "reports nothing")
        yield SETTINGS.skip("scontrol show config", error)
        return
    for name in partitions:
        if name in facts.partitions:
            yield check_preemption(settings, facts.partitions[name])
    if settings.get("JobRequeue") == "0":
        yield SETTINGS.warn(
            "JobRequeue",
            "0: Slurm does not requeue jobs when their node fails",
            "You can ignore this: servegrid continues in another allocation, which waits in the "
            "queue again.",
        )
    else:
        yield SETTINGS.ok("JobRequeue", f"{settings.get('JobRequeue', 'not reported')}")
    yield _check_min_job_age(settings.get("MinJobAge", ""))
    kill_wait = settings.get("KillWait", "not reported")
    yield SETTINGS.ok("KillWait", f"{kill_wait} between SIGTERM and SIGKILL")
    storage = settings.get("AccountingStorageType", "not reported").rpartition("/")[2]
    enforced = settings.get("AccountingStorageEnforce", "not reported")
    yield SETTINGS.ok("accounting", f"{storage}, enforces {enforced}")
    max_jobs = settings.get("MaxJobCount", "not reported")
    yield SETTINGS.ok("MaxJobCount", f"at most {max_jobs} jobs of all users together")


def preempt_mode(settings: Mapping[str, str], partition: Partition) -> str | None:
    """What preemption does to jobs of a partition, such as `REQUEUE`; None: there is none."""
    by = settings.get("PreemptType", "(null)").rpartition("/")[2]
    mode = partition.preempt_mode or settings.get("PreemptMode", "OFF")
    return None if by in ("none", "(null)", "") or (by != "qos" and mode == "OFF") else mode


def check_preemption(settings: Mapping[str, str], partition: Partition) -> Finding:
    """Check what preemption in a partition does to its allocations."""
    subject = f"preemption in {partition.name}"
    mode = preempt_mode(settings, partition)
    if mode is None:
        return SETTINGS.ok(subject, "none")
    by = settings["PreemptType"].rpartition("/")[2]
    text = f"by {by}, {mode}"
    if {"SUSPEND", "GANG"} & set(mode.split(",")):
        return SETTINGS.warn(
            subject,
            f"{text}: Slurm may suspend jobs during a measurement",
            "Use a partition without preemption: suspension makes the measured times wrong.",
        )
    both = settings.get("SlurmctldParameters", "") + settings.get("PreemptParameters", "")
    if partition.grace_s and "send_user_signal" in both:
        return SETTINGS.ok(subject, f"{text}, with a warning {partition.grace_s} s before")
    return SETTINGS.warn(
        subject,
        f"{text}, without a warning to the job (GraceTime {partition.grace_s} s)",
        "You can ignore this: only the current cell is lost and measured again. If preemption is "
        "frequent, use another partition.",
    )


def _check_min_job_age(value: str) -> Finding:
    age_s = parse_seconds(value)
    if age_s is not None and 0 < age_s < MIN_JOB_AGE_S:
        return SETTINGS.warn(
            "MinJobAge",
            f"{value}: after this time, squeue no longer shows an ended job",
            f"Ask the administrators for {MIN_JOB_AGE_S} s or more (Slurm's default is 300). Until "
            "then, servegrid may report an ended allocation as lost.",
        )
    return SETTINGS.ok("MinJobAge", value or "not reported")
