"""`servegrid doctor`: kinds of nodes compared with Slurm; each check passes and fails."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from submitit.slurm.slurm import _make_sbatch_string

from helpers.doctoring import FACTS, V100, check, request, result, study
from servegrid.doctor import kinds, slurm
from servegrid.doctor.profile import Profile
from servegrid.doctor.report import Status
from servegrid.doctor.resources import Gpus, build_request
from snakemake_executor_plugin_submitit.submission import Parameters


def test_a_kind_that_fits_has_only_ok_findings() -> None:
    found = list(kinds.check_kind(request(gpus_per_node=2), FACTS, "kinds.yaml"))
    assert {each.status for each in found} == {Status.OK}
    assert check("nodes", gpus_per_node=2).found == "2 nodes (1 busy, 1 out)"
    assert check("partition", gpus_per_node=2).found == "up, time limit 72 h, 12 h requested"
    assert check("CPUs").found == "32 to 64 CPUs, 371 GiB of memory per node; 16 CPUs requested"


@pytest.mark.parametrize(
    ("subject", "values", "status", "words"),
    [
        ("partition", {"slurm_partition": "Routage"}, Status.FAIL, "Did you mean `routage`?"),
        ("partition", {"slurm_partition": "old"}, Status.FAIL, "Wait until it is up"),
        ("partition", {"timeout_min": 4321}, Status.FAIL, "at most 4320 minutes"),
        ("partition", {"timeout_min": 4320}, Status.OK, ""),
        ("partition", {"slurm_partition": "preempt", "timeout_min": 9999}, Status.OK, ""),
        ("nodes", {"slurm_constraint": "sirocco&V100"}, Status.FAIL, "v100"),
        ("nodes", {"slurm_constraint": "[sirocco|v100]"}, Status.SKIP, ""),
        ("nodes", {"slurm_partition": "preempt"}, Status.FAIL, "bora"),
        ("CPUs", {"cpus_per_task": 64}, Status.OK, ""),
        ("CPUs", {"cpus_per_task": 65}, Status.FAIL, "Lower cpus_per_task"),
        ("CPUs", {"slurm_mem": "400G"}, Status.FAIL, "memory"),
        ("CPUs", {"mem_gb": 300}, Status.OK, ""),
        ("GPUs", {"gpus_per_node": 0}, Status.WARN, "slurm_gres: gpu:v100:2"),
        ("GPUs", {"slurm_gres": "gpu:v100:2"}, Status.OK, ""),
        ("GPUs", {"gpus_per_node": "v100:2"}, Status.OK, ""),
        ("GPUs", {"slurm_gres": "gpu:V100:2"}, Status.FAIL, "case-sensitive"),
        ("GPUs", {"gpus_per_node": 4}, Status.FAIL, "gpu:v100:2"),
        ("GPUs", {"gpus_of_node": 4}, Status.WARN, "Correct gpus_of_node"),
        ("GPUs", {"slurm_constraint": "bora", "gpus_per_node": 2}, Status.FAIL, "gpus_per_node: 0"),
        ("GPUs", {"slurm_constraint": "bora", "gpus_per_node": 0}, Status.OK, ""),
        ("account", {"slurm_account": "team", "slurm_qos": "long"}, Status.OK, ""),
        ("account", {"slurm_account": "other"}, Status.FAIL, "Correct slurm_account"),
        ("QoS", {"slurm_account": "users", "slurm_qos": "long"}, Status.FAIL, "slurm_qos"),
        ("QoS", {"slurm_qos": "huge"}, Status.FAIL, "slurm_qos"),
    ],
)
def test_a_kind_is_compared_with_slurm(
    subject: str, values: dict[str, Any], status: Status, words: str
) -> None:
    found = check(subject, **values)
    assert found.status is status
    assert words in found.remedy


def test_a_runtime_must_be_requested() -> None:
    found = check("partition", timeout_min="soon")
    assert found.status is Status.FAIL
    assert "runtime" in found.remedy


def test_without_a_partition_the_default_is_used() -> None:
    assert check("partition", slurm_partition="").subject == "partition routage"
    facts = replace(FACTS, partitions={"old": FACTS.partitions["old"]})
    assert check("partition", facts, slurm_partition="").status is Status.FAIL


def test_nodes_out_of_service_are_a_warning() -> None:
    facts = replace(FACTS, nodes=[replace(each, state="DOWN") for each in FACTS.nodes])
    assert check("nodes", facts).status is Status.WARN
    assert kinds.are_nodes_out(request(), facts)
    assert not kinds.are_nodes_out(request(), FACTS)
    assert not kinds.are_nodes_out(request(slurm_constraint="nowhere"), facts)
    refused = result(1, stderr="Requested node configuration is not available")
    assert kinds.check_test_submission(request(), refused, nodes_out=True).status is Status.SKIP


def test_too_few_nodes_for_one_deployment_are_a_warning() -> None:
    wide = replace(request(), max_nodes=3)
    found = {each.subject: each for each in kinds.check_kind(wide, FACTS, "kinds.yaml")}
    assert found["nodes sirocco&v100"].status is Status.WARN


def test_what_slurm_does_not_report_is_skipped() -> None:
    facts = slurm.SlurmFacts(errors={"nodes": "Access denied", "accounts": "off"})
    found = list(kinds.check_kind(request(slurm_account="team"), facts, "kinds.yaml"))
    assert {each.status for each in found} == {Status.SKIP}
    assert "Access denied" in [each.found for each in found]


def test_a_required_account_must_exist() -> None:
    assert check("account", replace(FACTS, accounts={})).status is Status.FAIL


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"gpus_per_node": 0, "slurm_account": "team", "timeout_min": 90.5},
        {"gpus_per_node": "v100:2", "slurm_qos": "long", "slurm_exclusive": False},
        {"slurm_gres": "gpu:v100:2", "gpus_of_node": 2},
        {"mem_gb": 2.5, "slurm_mem": False, "slurm_exclude": "a[1-2]"},
        {"slurm_additional_parameters": {"hint": "nomultithread"}, "nodes": 2},
        {"slurm_additional_parameters": {"clusters": "gpu", "wckey": "b"}, "slurm_wckey": "a"},
        {"slurm_wckey": "project", "signal_delay_s": 120, "timeout_min": 3},
        {"timeout_min": 2},
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "emulated"])
def test_the_options_of_sbatch_are_those_of_submitit(
    values: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    kind = V100 | values
    profile = Profile(Path("p/config.yaml"), {}, None, {"v100": kind})
    parameters = Parameters.build("slurm", {"gpus": 2}, kind).for_slurm()
    script = _make_sbatch_string("true", tmp_path, **parameters)
    written = [
        word
        for line in script.splitlines()
        if line.startswith("#SBATCH ")
        for word in shlex.split(line.removeprefix("#SBATCH "))
    ]
    of_each_job = ("--job-name=", "--output=")
    options = build_request(profile, "v100", study(2, engine).deployments).sbatch_options()
    assert set(options) == {line for line in written if not line.startswith(of_each_job)}


def test_the_study_s_gpus_are_requested_by_default() -> None:
    profile = Profile(Path("config.yaml"), {}, None, {"v100": {"gpus_of_node": 2}})
    emulated = build_request(profile, "v100", study(4, "emulated").deployments)
    assert emulated.gpus == Gpus(None, 2)
    assert {"--nodes=2", "--cpus-per-task=1", "--gpus-per-node=2"} < set(emulated.sbatch_options())


def test_slurm_s_own_message_is_shown() -> None:
    good = result(stderr="sbatch: Job 7 to start at 2026-11-23T00:36:01 using 32 processors")
    assert kinds.check_test_submission(request(), good).found.startswith("would start at 2026")
    bad = kinds.check_test_submission(
        request(), result(1, stderr="allocation failure: Invalid qos")
    )
    assert bad.status is Status.FAIL
    assert "Invalid qos" in bad.found
    assert "sbatch --test-only " in bad.remedy
    assert " --nodes=1 " in bad.remedy
    assert "'--constraint=sirocco&v100'" in bad.remedy
