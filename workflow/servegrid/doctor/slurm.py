"""Slurm itself: its programs, its answers and the settings that decide over allocations."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from servegrid.doctor.commands import Answer, Ask
from servegrid.doctor.report import Finding, Group
from servegrid.doctor.slurm_facts import (
    Node,
    Partition,
    accounts_of,
    nodes_of_text,
    partitions_of,
    seconds_of,
    settings_of,
    version_of,
)

NEEDED = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
SLOW_S = 5.0
FORGETS_S = 60
TOOLS, CONTROLLER, SETTINGS = Group("tools"), Group("slurm"), Group("settings of slurm")


@dataclass(frozen=True)
class Facts:
    """What the controller reported; empty if it reported nothing."""

    settings: Mapping[str, str] = field(default_factory=dict)
    partitions: Mapping[str, Partition] = field(default_factory=dict)
    nodes: Sequence[Node] = ()
    accounts: Mapping[str, set[str]] | None = None
    """QoS by account; None where Slurm does not say."""
    silence: Mapping[str, str] = field(default_factory=dict)
    """Why `settings`, `partitions`, `nodes` or `accounts` is empty, in Slurm's own words."""


def user() -> str:
    """The name under which Slurm knows this process."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def gather(ask: Ask) -> Facts:
    """Ask the controller and the accounting for all that is judged."""
    settings = ask(["scontrol", "show", "config"])
    partitions = ask(["scontrol", "--all", "--oneliner", "show", "partition"])
    nodes = ask(["scontrol", "--all", "--oneliner", "show", "node"])
    accounts = ask(
        ["sacctmgr", "-n", "-P", "show", "assoc", f"user={user()}", "format=account,qos"]
    )
    answers = {"settings": settings, "partitions": partitions, "nodes": nodes, "accounts": accounts}
    return Facts(
        settings=settings_of(settings.stdout) if settings.good else {},
        partitions=partitions_of(partitions.stdout) if partitions.good else {},
        nodes=nodes_of_text(nodes.stdout) if nodes.good else (),
        accounts=accounts_of(accounts.stdout) if accounts.good else None,
        silence={name: each.complaint for name, each in answers.items() if not each.good},
    )


def judge_tools(ask: Ask, which: Callable[[str], str | None] = shutil.which) -> Iterator[Finding]:
    """One FAIL where Slurm's programs are missing; the rest cannot be judged then."""
    missing = [name for name in NEEDED if which(name) is None]
    if missing:
        yield TOOLS.fail(
            "Slurm's programs",
            f"not on the PATH: {', '.join(missing)}",
            "Run this on a login node of the cluster, where Slurm may need `module load slurm`; "
            "without Slurm use --profile profiles/local.",
        )
        return
    answer = ask(["sbatch", "--version"])
    version = version_of(answer.stdout)
    if version is None:
        yield TOOLS.fail(
            "sbatch --version",
            answer.complaint,
            "Run this on a login node of the cluster: here the programs know none.",
        )
        return
    text = f"{answer.stdout.strip()}; {', '.join(NEEDED)}"
    yield TOOLS.ok("Slurm's programs", text)
    if which("sacct") is None:
        yield TOOLS.warn(
            "sacct",
            "not on the PATH",
            "Nothing: allocations are watched by squeue; how they ended is known less exactly.",
        )
    else:
        yield TOOLS.ok("sacct", "on the PATH")


def judge_answers(ping: Answer, squeue: Answer, sacct: Answer | None) -> Iterator[Finding]:
    """Who answers. Where the controller or squeue does not, nothing else can be judged."""
    if not ping.good or " is UP" not in ping.stdout:
        yield CONTROLLER.fail(
            "controller",
            f"scontrol ping: {ping.complaint}",
            "Wait, or ask the cluster's administrators: no job can be submitted now.",
        )
        return
    yield CONTROLLER.ok("controller", " ".join(ping.stdout.split()))
    if not squeue.good:
        yield CONTROLLER.fail(
            "squeue",
            squeue.complaint,
            "Ask the administrators: without squeue servegrid cannot follow its allocations.",
        )
    elif squeue.seconds > SLOW_S:
        yield CONTROLLER.warn(
            "squeue",
            f"answers after {squeue.seconds:.1f} s",
            "Nothing, if the cluster is busy for a moment; else allocations are noticed late.",
        )
    else:
        jobs = len(squeue.stdout.splitlines())
        yield CONTROLLER.ok(
            "squeue", f"answers after {squeue.seconds:.2f} s; {jobs} jobs of {user()}"
        )
    if sacct is None:
        return
    if sacct.good:
        yield CONTROLLER.ok("sacct", f"answers after {sacct.seconds:.2f} s")
    else:
        yield CONTROLLER.warn(
            "sacct",
            f"accounting is off or restricted: {sacct.complaint}",
            "Nothing: servegrid only needs squeue.",
        )


def ask_answers(
    ask: Ask, which: Callable[[str], str | None] = shutil.which
) -> tuple[Answer, Answer, Answer | None]:
    """The controller's ping, this user's queue, and the accounting where it is installed."""
    return (
        ask(["scontrol", "ping"]),
        ask(["squeue", "-h", "-r", "-t", "all", "-u", user(), "-o", "%i|%T|%N"]),
        ask(["sacct", "-X", "-n", "-P", "-S", "now-1hours", "-o", "jobid"])
        if which("sacct")
        else None,
    )


def judge_settings(facts: Facts, partitions: Sequence[str]) -> Iterator[Finding]:
    """Settings of Slurm that decide how allocations end; `partitions` are those in use."""
    settings = facts.settings
    if not settings:
        yield SETTINGS.skip("scontrol show config", facts.silence.get("settings", "says nothing"))
        return
    for name in partitions:
        if name in facts.partitions:
            yield judge_preemption(settings, facts.partitions[name])
    if settings.get("JobRequeue") == "0":
        yield SETTINGS.warn(
            "JobRequeue",
            "0: Slurm does not requeue the jobs of a lost node",
            "Nothing: servegrid continues by a further allocation, which queues anew.",
        )
    else:
        yield SETTINGS.ok("JobRequeue", f"{settings.get('JobRequeue', 'not reported')}")
    yield _judge_min_job_age(settings.get("MinJobAge", ""))
    yield SETTINGS.ok("KillWait", f"{settings.get('KillWait', 'not reported')}, from TERM to KILL")
    storage = settings.get("AccountingStorageType", "not reported").rpartition("/")[2]
    enforced = settings.get("AccountingStorageEnforce", "not reported")
    yield SETTINGS.ok("accounting", f"{storage}, enforces {enforced}")
    yield SETTINGS.ok(
        "MaxJobCount", f"{settings.get('MaxJobCount', 'not reported')} jobs of all users"
    )


def judge_preemption(settings: Mapping[str, str], partition: Partition) -> Finding:
    """What preemption in a partition means for its allocations."""
    subject = f"preemption in {partition.name}"
    by = settings.get("PreemptType", "(null)").rpartition("/")[2]
    mode = partition.preempt_mode or settings.get("PreemptMode", "OFF")
    if by in ("none", "(null)", "") or (by != "qos" and mode == "OFF"):
        return SETTINGS.ok(subject, "none")
    text = f"by {by}, {mode}"
    if {"SUSPEND", "GANG"} & set(mode.split(",")):
        return SETTINGS.warn(
            subject,
            f"{text}: jobs may be stopped while they measure",
            "Use a partition without it: times that span a stop mean nothing.",
        )
    both = settings.get("SlurmctldParameters", "") + settings.get("PreemptParameters", "")
    if partition.grace_s and "send_user_signal" in both:
        return SETTINGS.ok(subject, f"{text}, warned {partition.grace_s} s before")
    return SETTINGS.warn(
        subject,
        f"{text}, without a warning to the job (GraceTime {partition.grace_s} s)",
        "Nothing must be done: only the cell in hand is lost and measured again. Where it "
        "happens often, use another partition.",
    )


def _judge_min_job_age(value: str) -> Finding:
    age = seconds_of(value)
    if age is not None and 0 < age < FORGETS_S:
        return SETTINGS.warn(
            "MinJobAge",
            f"{value}: squeue forgets ended jobs after that",
            "Ask the administrators for 60 s or more (Slurm's default is 300); until then an "
            "allocation that has ended may be reported as lost.",
        )
    return SETTINGS.ok("MinJobAge", value or "not reported")
