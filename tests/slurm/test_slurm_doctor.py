"""`servegrid doctor` on a real Slurm that resembles PlaFRIM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.cluster import Cluster, Options, missing, private_cluster

ROOT = Path(__file__).parents[2]
PLAFRIM = ROOT / "profiles" / "plafrim"
LACKING = missing(Options())

pytestmark = [
    pytest.mark.crowded,
    pytest.mark.skipif(
        bool(LACKING),
        reason=f"{', '.join(LACKING)} missing: apt install slurmctld slurmd slurm-client munge",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = Options(grace_s=0, parameters={"MinJobAge": "30", "JobRequeue": "0"})
    with private_cluster(tmp_path_factory.mktemp("slurm"), options) as cluster:
        yield cluster


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The profile of PlaFRIM without its environments, which no test machine has."""
    kinds = yaml.safe_load((PLAFRIM / "kinds.yaml").read_text())
    for kind in kinds.values():
        kind.pop("python", None)
    options = yaml.safe_load((PLAFRIM / "config.yaml").read_text())
    options["submitit-kinds"] = str(tmp_path / "kinds.yaml")
    (tmp_path / "kinds.yaml").write_text(yaml.safe_dump(kinds))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


def change(site: Path, kind: str, **values: Any) -> None:
    file = site / "kinds.yaml"
    kinds = yaml.safe_load(file.read_text())
    kinds[kind] |= values
    kinds[kind] = {key: value for key, value in kinds[kind].items() if value is not None}
    file.write_text(yaml.safe_dump(kinds))


def doctor(env: Mapping[str, str], site: Path, *options: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "servegrid.cli.main", "doctor", "--profile", str(site)),
            *("--directory", str(site), *options),
        ],
        env=dict(env),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def after(lines: list[str], status: str, group: str = "") -> list[str]:
    """Lines with a status and the remedy below each, from the group of that name on."""
    start = lines.index(group) if group else 0
    end = lines.index("", start) if group else len(lines)
    found = lines[start:end]
    return [
        " ".join(f"{line} {below}".split())
        for line, below in zip(found, [*found[1:], ""], strict=True)
        if line.startswith(f"  {status}")
    ]


def test_the_profile_of_plafrim_fits_a_cluster_like_it(slurm: Cluster, site: Path) -> None:
    status, lines = doctor(slurm.env, site, "--configfile", "config/rehearsal.yaml")
    assert (status, after(lines, "FAIL")) == (0, [])
    a100 = after(lines, "OK", "kind a100-40gb")
    assert a100[0].startswith("OK partition routage up, time limit 72 h, 12 h requested")
    assert a100[1].startswith("OK nodes sirocco&a100 4 nodes (4 idle)")
    assert "would start at" in a100[-1]
    # The only deployment with four GPUs needs two nodes.
    assert "64 processors on nodes sirocco[21-22]" in a100[-1]
    (gpus,) = after(lines, "WARN", "kind a100-40gb")
    assert "Slurm manages gpu:a100:2 per node, but the kind requests none" in gpus
    assert "slurm_gres: gpu:a100:2" in gpus


def test_without_a_study_all_kinds_are_checked(slurm: Cluster, site: Path) -> None:
    status, lines = doctor(slurm.env, site)
    assert status == 0
    assert [line for line in lines if line.startswith("kind ")] == [
        "kind a100-40gb",
        "kind cpu",
        "kind v100-16gb",
    ]


def test_the_plafrim_profile_lacks_only_environments_here(slurm: Cluster) -> None:
    _, lines = doctor(slurm.env, PLAFRIM)
    assert all("bin/python" in line and "`make env-" in line for line in after(lines, "FAIL"))


def test_settings_of_the_cluster_are_checked(slurm: Cluster, site: Path) -> None:
    change(site, "cpu", slurm_partition="preempt")
    _, lines = doctor(slurm.env, site)
    warned = " ".join(after(lines, "WARN", "settings of slurm"))
    for words in (
        "preemption in preempt by partition_prio, REQUEUE, without a warning",
        "JobRequeue 0",
        "MinJobAge 30 sec",
    ):
        assert words in warned
    assert "accounting is off or restricted" in after(lines, "WARN", "slurm")[0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"slurm_partition": "rootage"}, "Did you mean `routage`?"),
        ({"slurm_constraint": "sirocco&V100"}, "Correct slurm_constraint of `v100-16gb`"),
        ({"timeout_min": 6000}, "Request at most 4320 minutes"),
        ({"cpus_per_task": 33}, "Lower cpus_per_task"),
        ({"gpus_per_node": "V100:2"}, "gpu:v100:2 (it is case-sensitive)"),
        ({"slurm_constraint": "bora", "gpus_per_node": 2}, "Set `gpus_per_node: 0`"),
    ],
)
def test_an_impossible_request_fails_with_a_remedy(
    slurm: Cluster, site: Path, values: dict[str, Any], words: str
) -> None:
    change(site, "v100-16gb", **values)
    status, lines = doctor(slurm.env, site)
    assert status == 1
    failures = after(lines, "FAIL", "kind v100-16gb")
    assert words in failures[0]
    # Slurm accepts a job that is too long for its partition, and never starts it.
    assert ("Slurm refuses" in failures[-1]) is ("timeout_min" not in values)
    assert after(lines, "FAIL", "kind a100-40gb") == []


def test_gpus_requested_by_name_are_found(slurm: Cluster, site: Path) -> None:
    change(site, "v100-16gb", slurm_gres="gpu:v100:2", gpus_per_node=None)
    status, lines = doctor(slurm.env, site)
    assert status == 0
    assert after(lines, "WARN", "kind v100-16gb") == []


def test_lost_nodes_are_counted(slurm: Cluster, site: Path) -> None:
    for node in ("sirocco14", "sirocco15"):
        slurm.lose_node(node)
    try:
        status, lines = doctor(slurm.env, site)
    finally:
        for node in ("sirocco14", "sirocco15"):
            slurm.resume_node(node)
    assert status == 0
    assert (
        "2 nodes (2 out): no node is available now, so allocations would wait"
        in after(lines, "WARN", "kind v100-16gb")[0]
    )


def test_without_slurm_on_the_path_there_is_one_failure(
    slurm: Cluster, site: Path, tmp_path: Path
) -> None:
    status, lines = doctor(slurm.env | {"PATH": str(tmp_path)}, site)
    assert status == 1
    (failure,) = after(lines, "FAIL")
    assert "not on the PATH: sbatch" in failure
    assert len(after(lines, "SKIP")) == 1


def test_a_dead_controller_is_one_failure(site: Path, tmp_path: Path) -> None:
    options = Options(parameters={"MessageTimeout": "2"})
    with private_cluster(tmp_path / "own", options) as cluster:
        cluster.lose_controller()
        status, lines = doctor(cluster.env, site)
    assert status == 1
    assert len(after(lines, "FAIL")) == 1
    assert "controller" in after(lines, "FAIL")[0]


def test_accounts_and_qos_are_compared(site: Path, tmp_path: Path) -> None:
    options = Options(accounting=True)
    if lacking := missing(options):
        pytest.skip(f"{', '.join(lacking)} missing: apt install slurmdbd mariadb-server")
    change(site, "cpu", slurm_account="users", slurm_qos="normal")
    change(site, "v100-16gb", slurm_account="nobody")
    change(site, "a100-40gb", slurm_qos="forever")
    with private_cluster(tmp_path / "own", options) as cluster:
        _, lines = doctor(cluster.env, site)
    assert after(lines, "WARN", "slurm") == []
    assert any("account and QoS users normal" in line for line in after(lines, "OK", "kind cpu"))
    assert "`nobody` is not one of yours" in after(lines, "FAIL", "kind v100-16gb")[0]
    assert "`forever` is not one of yours" in after(lines, "FAIL", "kind a100-40gb")[0]


def test_an_option_that_submitit_adds_is_tested(site: Path, tmp_path: Path) -> None:
    """submitit gives every job the wckey `submitit`, which a site can refuse."""
    enforced = {"TrackWCKey": "yes", "AccountingStorageEnforce": "associations,wckeys"}
    options = Options(accounting=True, parameters=enforced)
    if lacking := missing(options):
        pytest.skip(f"{', '.join(lacking)} missing: apt install slurmdbd mariadb-server")
    with private_cluster(tmp_path / "own", options) as cluster:
        status, lines = doctor(cluster.env, site)
    assert status == 1
    (refused,) = after(lines, "FAIL", "kind cpu")
    assert "Invalid wckey specification" in refused
    assert "--wckey=submitit" in refused


def test_the_network_between_two_nodes_is_measured(slurm: Cluster, site: Path) -> None:
    change(site, "a100-40gb", interface=None)
    status, lines = doctor(slurm.env, site, "--network", "a100-40gb")
    group = "network of kind a100-40gb"
    (node_1, node_2, loopback, *_) = after(lines, "OK", group)
    assert (
        "sirocco2" in node_1 and "sirocco2" in node_2 and "lo 127.0.0.1 (127.0.0.0/8, up" in node_1
    )
    # All nodes of this cluster are this machine.
    assert "lo 127.0.0.0/8" in loopback and "Gbit/s in one TCP connection" in loopback
    one_machine, proposal = after(lines, "WARN", group)
    assert "both are one machine" in one_machine
    assert "Write `interface: " in proposal and "for `a100-40gb` in " in proposal
    assert status in (0, 1)  # other checks may fail on this machine
    assert list(site.glob(".servegrid-network-*")) == []
    assert slurm.call("squeue", "-h", "-n", "servegrid-network", "-t", "PD,R") == ""
