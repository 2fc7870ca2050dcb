"""`servegrid doctor`: Slurm's own texts read, and judged both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from helpers.doctoring import CONFIG, FACTS, NODES, PARTITIONS, answers
from servegrid.doctor import slurm
from servegrid.doctor.commands import Answer
from servegrid.doctor.demands import Gpus, gpus_of
from servegrid.doctor.report import Finding, Status
from servegrid.doctor.slurm_facts import (
    accounts_of,
    fits,
    is_readable,
    minutes_of_limit,
    nodes_of_text,
    partitions_of,
    seconds_of,
    settings_of,
    version_of,
)


def test_slurms_texts_are_read() -> None:
    assert version_of("slurm-wlm 22.05.8") == (22, 5)
    assert version_of("") is None
    assert seconds_of("600 sec") == 600
    assert seconds_of("INFINITE") is None
    assert settings_of(CONFIG)["MinJobAge"] == "300 sec"
    assert accounts_of("team|long,normal\nteam|debug\n|x\n") == {
        "team": {"long", "normal", "debug"}
    }
    routage, preempt, old = partitions_of(PARTITIONS).values()
    assert (routage.is_default, routage.max_minutes, routage.state) == (True, 4320, "UP")
    assert (preempt.max_minutes, preempt.grace_s, preempt.preempt_mode) == (None, 30, "REQUEUE")
    assert (old.max_minutes, old.state) == (60, "DOWN")
    bora, busy, down = nodes_of_text(NODES)
    assert (bora.use, bora.gpus, bora.cpus, bora.memory_mb) == ("idle", (), 32, 190000)
    assert (busy.use, busy.gpus, busy.partitions) == (
        "busy",
        (Gpus("v100", 2),),
        frozenset({"routage"}),
    )
    assert (down.use, down.cpus) == ("out", 64)


@pytest.mark.parametrize(
    ("state", "use"),
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
def test_states_of_nodes(state: str, use: str) -> None:
    assert replace(FACTS.nodes[0], state=state).use == use


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
def test_time_limits(text: str, minutes: float | None) -> None:
    assert minutes_of_limit(text) == minutes


@pytest.mark.parametrize(
    ("constraint", "fit"),
    [("v100", True), ("V100", False), ("a&v100", True), ("a&b", False), ("a|b", True)],
)
def test_constraints(constraint: str, fit: bool) -> None:
    assert is_readable(constraint)
    assert fits(["a", "v100"], constraint) is fit


@pytest.mark.parametrize("constraint", ["[a|b]", "(a&b)|c", "a*2", ""])
def test_constraints_with_groups_are_left_to_slurm(constraint: str) -> None:
    assert not is_readable(constraint)


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
def test_gpus_of_a_gres(text: str, expected: list[Gpus]) -> None:
    assert gpus_of(text) == expected


# Slurm's programs and settings


def test_missing_programs_are_one_failure() -> None:
    found = list(slurm.judge_tools(lambda _: answers(), lambda _: None))
    assert [each.status for each in found] == [Status.FAIL]
    assert "sbatch, srun" in found[0].found


def test_programs_without_a_cluster_are_a_failure() -> None:
    refused = answers(1, stderr="fatal: Could not establish a configuration source")
    found = list(slurm.judge_tools(lambda _: refused, lambda name: name))
    assert [each.status for each in found] == [Status.FAIL]
    assert "configuration source" in found[0].found


def test_without_sacct_there_is_a_warning() -> None:
    found = list(
        slurm.judge_tools(
            lambda _: answers(stdout="slurm-wlm 22.05.8\n"),
            lambda name: None if name == "sacct" else name,
        )
    )
    assert [each.status for each in found] == [Status.OK, Status.WARN]


UP = answers(stdout="Slurmctld(primary) at vm is UP\n")


@pytest.mark.parametrize(
    ("ping", "squeue", "sacct", "statuses"),
    [
        (UP, answers(stdout="1|RUNNING|a\n"), answers(), [Status.OK] * 3),
        (UP, answers(), None, [Status.OK] * 2),
        (UP, answers(seconds=9), answers(1, stderr="disabled"), ["OK", "WARN", "WARN"]),
        (UP, answers(1, stderr="no"), answers(), ["OK", "FAIL", "OK"]),
        (answers(stdout="Slurmctld(primary) at vm is DOWN"), answers(), answers(), ["FAIL"]),
        (Answer(None, stderr="no answer within 20 s"), answers(), answers(), ["FAIL"]),
    ],
)
def test_who_answers(
    ping: Answer, squeue: Answer, sacct: Answer | None, statuses: Sequence[str]
) -> None:
    assert [each.status for each in slurm.judge_answers(ping, squeue, sacct)] == list(statuses)


def setting(subject: str, **changes: str) -> Finding:
    facts = replace(FACTS, settings={**FACTS.settings, **changes})
    found = slurm.judge_settings(facts, ["routage", "preempt"])
    return next(each for each in found if each.subject == subject)


def test_settings_that_do_no_harm() -> None:
    found = list(slurm.judge_settings(FACTS, ["routage", "preempt"]))
    assert {each.status for each in found} == {Status.OK}


@pytest.mark.parametrize(
    ("subject", "changes"),
    [
        ("JobRequeue", {"JobRequeue": "0"}),
        ("MinJobAge", {"MinJobAge": "10 sec"}),
        ("preemption in preempt", {"SlurmctldParameters": "(null)"}),
    ],
)
def test_settings_that_are_warned_of(subject: str, changes: dict[str, str]) -> None:
    found = setting(subject, **changes)
    assert found.status is Status.WARN
    assert found.remedy


def test_records_that_are_never_purged_are_fine() -> None:
    assert setting("MinJobAge", MinJobAge="0 sec").status is Status.OK


@pytest.mark.parametrize(
    ("type_", "mode", "grace_s", "status", "words"),
    [
        ("preempt/none", "REQUEUE", 0, Status.OK, "none"),
        ("preempt/partition_prio", "OFF", 0, Status.OK, "none"),
        ("preempt/partition_prio", "REQUEUE", 60, Status.OK, "warned 60 s before"),
        ("preempt/partition_prio", "REQUEUE", 0, Status.WARN, "without a warning"),
        ("preempt/partition_prio", "GANG,SUSPEND", 60, Status.WARN, "stopped while they measure"),
        ("preempt/qos", "OFF", 0, Status.WARN, "by qos"),
    ],
)
def test_preemption(type_: str, mode: str, grace_s: int, status: Status, words: str) -> None:
    partition = replace(FACTS.partitions["preempt"], preempt_mode=mode, grace_s=grace_s)
    settings = {"PreemptType": type_, "SlurmctldParameters": "preempt_send_user_signal"}
    found = slurm.judge_preemption(settings, partition)
    assert found.status is status
    assert words in found.found
