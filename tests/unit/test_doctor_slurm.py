"""`servegrid doctor`: parsing Slurm's output; each check of Slurm passes and fails."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest

from helpers.doctoring import CONFIG, FACTS, NODES, PARTITIONS, request, result
from servegrid import doctor
from servegrid.doctor import slurm
from servegrid.doctor.report import Finding, Status
from servegrid.doctor.resources import Gpus, parse_gres
from servegrid.doctor.shell import CommandResult
from servegrid.doctor.slurm_output import (
    is_simple,
    matches,
    parse_accounts,
    parse_nodes,
    parse_partitions,
    parse_seconds,
    parse_settings,
    parse_time_limit,
    parse_version,
)


def test_slurm_s_output_is_parsed() -> None:
    assert parse_version("slurm-wlm 22.05.8") == (22, 5)
    assert parse_version("") is None
    assert parse_seconds("600 sec") == 600
    assert parse_seconds("INFINITE") is None
    assert parse_settings(CONFIG)["MinJobAge"] == "300 sec"
    assert parse_accounts("team|long,normal\nteam|debug\n|x\n") == {
        "team": {"long", "normal", "debug"}
    }
    routage, preempt, old = parse_partitions(PARTITIONS).values()
    assert (routage.is_default, routage.max_minutes, routage.state) == (True, 4320, "UP")
    assert (preempt.max_minutes, preempt.grace_s, preempt.preempt_mode) == (None, 30, "REQUEUE")
    assert (old.max_minutes, old.state) == (60, "DOWN")
    bora, busy, down = parse_nodes(NODES)
    assert (bora.availability, bora.gpus, bora.cpus, bora.memory_mb) == ("idle", (), 32, 190000)
    assert (busy.availability, busy.gpus, busy.partitions) == (
        "busy",
        (Gpus("v100", 2),),
        frozenset({"routage"}),
    )
    assert (down.availability, down.cpus) == ("out", 64)


@pytest.mark.parametrize(
    ("state", "availability"),
    [
        ("IDLE", "idle"),
        ("IDLE+CLOUD+POWERED_DOWN", "idle"),
        ("IDLE~", "idle"),
        ("ALLOCATED", "busy"),
        ("MIXED", "busy"),
        ("IDLE+DRAIN", "out"),
        ("IDLE*", "out"),
        ("DOWN", "out"),
    ],
)
def test_the_state_of_a_node_is_classified(state: str, availability: str) -> None:
    assert replace(FACTS.nodes[0], state=state).availability == availability


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("3-00:00:00", 4320),
        ("1-12", 2160),
        ("01:30:00", 90),
        ("90", 90),
        ("90:30", 90.5),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_parsed(text: str, minutes: float | None) -> None:
    assert parse_time_limit(text) == minutes


@pytest.mark.parametrize(
    ("constraint", "fit"),
    [("v100", True), ("V100", False), ("a&v100", True), ("a&b", False), ("a|b", True)],
)
def test_simple_constraints_are_evaluated(constraint: str, fit: bool) -> None:
    assert is_simple(constraint)
    assert matches(["a", "v100"], constraint) is fit


@pytest.mark.parametrize("constraint", ["[a|b]", "(a&b)|c", "a*2", ""])
def test_other_constraints_are_left_to_slurm(constraint: str) -> None:
    assert not is_simple(constraint)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu:v100:2(S:0-1)", [Gpus("v100", 2)]),
        ("nvme:1,gpu:2", [Gpus(None, 2)]),
        ("gpu:a100:2,gpu:v100:1", [Gpus("a100", 2), Gpus("v100", 1)]),
        ("gpu", [Gpus(None, 1)]),
        ("gpu:v100", [Gpus("v100", 1)]),
        ("(null)", []),
    ],
)
def test_a_gres_is_parsed(text: str, expected: list[Gpus]) -> None:
    assert parse_gres(text) == expected


# Slurm's programs and settings


def test_missing_programs_are_one_failure() -> None:
    found = list(slurm.check_programs(lambda _: result(), lambda _: None))
    assert [each.status for each in found] == [Status.FAIL]
    assert "sbatch, srun" in found[0].found


def test_programs_without_a_cluster_are_a_failure() -> None:
    refused = result(1, stderr="fatal: Could not establish a configuration source")
    found = list(slurm.check_programs(lambda _: refused, lambda name: name))
    assert [each.status for each in found] == [Status.FAIL]
    assert "configuration source" in found[0].found


def test_without_sacct_there_is_a_warning() -> None:
    found = list(
        slurm.check_programs(
            lambda _: result(stdout="slurm-wlm 22.05.8\n"),
            lambda name: None if name == "sacct" else name,
        )
    )
    assert [each.status for each in found] == [Status.OK, Status.WARN]


UP = result(stdout="Slurmctld(primary) at vm is UP\n")


@pytest.mark.parametrize(
    ("ping", "squeue", "sacct", "statuses"),
    [
        (UP, result(stdout="1|RUNNING|a\n"), result(), [Status.OK] * 3),
        (UP, result(), None, [Status.OK] * 2),
        (UP, result(seconds=9), result(1, stderr="disabled"), ["OK", "WARN", "WARN"]),
        (UP, result(1, stderr="no"), result(), ["OK", "FAIL", "OK"]),
        (result(stdout="Slurmctld(primary) at vm is DOWN"), result(), result(), ["FAIL"]),
        (CommandResult(None, stderr="no answer within 20 s"), result(), result(), ["FAIL"]),
    ],
)
def test_responses_are_checked(
    ping: CommandResult, squeue: CommandResult, sacct: CommandResult | None, statuses: Sequence[str]
) -> None:
    assert [each.status for each in slurm.check_responses(ping, squeue, sacct)] == list(statuses)


def setting(subject: str, **changes: str) -> Finding:
    facts = replace(FACTS, settings={**FACTS.settings, **changes})
    found = slurm.check_settings(facts, ["routage", "preempt"])
    return next(each for each in found if each.subject == subject)


def test_good_settings_have_no_warning() -> None:
    found = list(slurm.check_settings(FACTS, ["routage", "preempt"]))
    assert {each.status for each in found} == {Status.OK}


@pytest.mark.parametrize(
    ("subject", "changes"),
    [
        ("JobRequeue", {"JobRequeue": "0"}),
        ("MinJobAge", {"MinJobAge": "10 sec"}),
        ("preemption in preempt", {"SlurmctldParameters": "(null)"}),
    ],
)
def test_a_harmful_setting_is_a_warning(subject: str, changes: dict[str, str]) -> None:
    found = setting(subject, **changes)
    assert found.status is Status.WARN
    assert found.remedy


def test_jobs_that_are_never_forgotten_are_ok() -> None:
    assert setting("MinJobAge", MinJobAge="0 sec").status is Status.OK


@pytest.mark.parametrize(
    ("type_", "mode", "grace_s", "status", "words"),
    [
        ("preempt/none", "REQUEUE", 0, Status.OK, "none"),
        ("preempt/partition_prio", "OFF", 0, Status.OK, "none"),
        ("preempt/partition_prio", "REQUEUE", 60, Status.OK, "with a warning 60 s before"),
        ("preempt/partition_prio", "REQUEUE", 0, Status.WARN, "without a warning"),
        (
            "preempt/partition_prio",
            "GANG,SUSPEND",
            60,
            Status.WARN,
            "suspend jobs during a measurement",
        ),
        ("preempt/qos", "OFF", 0, Status.WARN, "by qos"),
    ],
)
def test_preemption_is_checked(
    type_: str, mode: str, grace_s: int, status: Status, words: str
) -> None:
    partition = replace(FACTS.partitions["preempt"], preempt_mode=mode, grace_s=grace_s)
    settings = {"PreemptType": type_, "SlurmctldParameters": "preempt_send_user_signal"}
    found = slurm.check_preemption(settings, partition)
    assert found.status is status
    assert words in found.found


@pytest.mark.parametrize(
    ("clusters", "asked"), [(None, []), ("gpu", ["--clusters=gpu"]), ("gpu,cpu", [])]
)
def test_the_cluster_of_a_kind_is_asked_about_its_nodes(
    monkeypatch: pytest.MonkeyPatch, clusters: str | None, asked: list[str]
) -> None:
    monkeypatch.setattr(slurm.check_programs, "__defaults__", (lambda name: name,))
    monkeypatch.setattr(slurm.query_responses, "__defaults__", (lambda name: name,))
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> CommandResult:
        commands.append(command)
        if "ping" in command:
            return UP
        text = {"node": NODES, "partition": PARTITIONS, "config": CONFIG}.get(command[-1], "")
        return result(stdout="slurm-wlm 24.11.5" if "--version" in command else text)

    extra = {"slurm_additional_parameters": {"clusters": clusters}} if clusters else {}
    found = list(doctor._check_slurm([request(**extra)], "kinds.yaml", run))
    nodes = [command for command in commands if command[-1] == "node"]
    assert [word for command in nodes for word in command if "clusters" in word] == asked
    (test,) = [command for command in commands if "--test-only" in command]
    assert (f"--clusters={clusters}" in test) is (clusters is not None)
    skipped = [each.found for each in found if each.subject == "nodes"]
    several = ["Slurm chooses one of the clusters gpu,cpu"]
    assert (skipped == several) is (clusters == "gpu,cpu")


@pytest.mark.parametrize("uid_is_known", [True, False])
def test_the_doctor_s_squeue_is_asked_by_user_id(
    monkeypatch: pytest.MonkeyPatch, uid_is_known: bool
) -> None:
    monkeypatch.setenv("USER", "somebody-else")
    if not uid_is_known:
        monkeypatch.setattr(slurm.pwd, "getpwuid", {}.__getitem__)
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> CommandResult:
        commands.append(command)
        return result()

    slurm.query_responses(run, lambda name: None)
    (squeue,) = [command for command in commands if command[0] == "squeue"]
    assert ("-u" in squeue) is uid_is_known
    assert "somebody-else" not in squeue
    assert not uid_is_known or squeue[squeue.index("-u") + 1] == str(os.getuid())
