"""The profile that `servegrid init-profile` proposes, from recorded output of Slurm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from servegrid.cli import init_profile
from servegrid.cli.main import main
from servegrid.doctor import shell, slurm
from servegrid.doctor.profile_files import check_name, render_files
from servegrid.doctor.proposal import Proposal, propose
from servegrid.doctor.shell import CommandResult
from servegrid.doctor.slurm import Rights, SlurmFacts
from servegrid.doctor.slurm_output import (
    Account,
    Limit,
    parse_associations,
    parse_nodes,
    parse_partitions,
    parse_qos,
)
from servegrid.errors import ConfigError
from snakemake_executor_plugin_submitit.kinds import validate_kind

UP = "State=UP TotalNodes=9"


def node(name: str, partitions: str, features: str = "(null)", gres: str = "(null)") -> str:
    """A line as Slurm 22.05 and 24.11 print it with --oneliner, shortened."""
    return (
        f"NodeName={name} Arch=x86_64 CoresPerSocket=16 CPUAlloc=0 CPUEfctv=64 CPUTot=64 "
        f"AvailableFeatures={features} ActiveFeatures={features} Gres={gres} "
        f"OS=Linux 6.1 #1 SMP RealMemory=512000 AllocMem=0 State=IDLE Partitions={partitions} "
    )


def facts(partitions: Sequence[str], nodes: Sequence[str]) -> SlurmFacts:
    return SlurmFacts(
        {"PreemptType": "preempt/none"},
        parse_partitions("\n".join(f"PartitionName={each}" for each in partitions)),
        parse_nodes("\n".join(nodes)),
    )


def kinds(known: SlurmFacts, rights: Rights | None = None) -> dict[str, dict[str, Any]]:
    proposal = propose(known, rights or Rights())
    assert [validate_kind(kind.values) for kind in proposal.kinds] == [[]] * len(proposal.kinds)
    return {kind.name: kind.values for kind in proposal.kinds}


WHOLE = {"slurm_exclusive": True, "cpus_per_task": 64, "slurm_mem": "0", "timeout_min": 720}


def test_typed_gres_choose_the_nodes() -> None:
    found = kinds(
        facts(
            [f"gpu Default=YES MaxTime=2-00:00:00 {UP}"],
            [
                node("a1", "gpu", gres="gpu:a100:4(S:0-1)"),
                node("a2", "gpu", gres="gpu:a100:4(S:0-1)"),
                node("v1", "gpu", gres="gpu:v100:2,nvme:1"),
                node("c1", "gpu"),
            ],
        )
    )
    assert found == {
        # No feature is only on the node without GPUs.
        "cpu": {"slurm_partition": "gpu", "slurm_exclude": "a1,a2,v1"} | WHOLE,
        "a100": {"slurm_partition": "gpu", "gpus_of_node": 4, "slurm_gres": "gpu:a100:4"} | WHOLE,
        "v100": {"slurm_partition": "gpu", "gpus_of_node": 2, "slurm_gres": "gpu:v100:2"} | WHOLE,
    }


def test_untyped_gres_need_features() -> None:
    found = kinds(
        facts(
            [f"all Default=YES MaxTime=08:00:00 {UP}"],
            [
                node("g1", "all", "gpu,a100,80gb", "gpu:4"),
                node("g2", "all", "gpu,v100", "gpu:2"),
                node("c1", "all", "skylake"),
            ],
        )
    )
    part = WHOLE | {"slurm_partition": "all", "timeout_min": 480}
    assert found == {
        "cpu": {"slurm_constraint": "skylake"} | part,
        "a100-80gb": {"slurm_constraint": "a100", "gpus_of_node": 4, "slurm_gres": "gpu:4"} | part,
        "v100": {"slurm_constraint": "v100", "gpus_of_node": 2, "slurm_gres": "gpu:2"} | part,
    }


def test_features_only_need_whole_nodes_and_a_check() -> None:
    known = facts(
        [f"routage Default=YES MaxTime=3-00:00:00 {UP}"],
        [
            node("bora1", "routage", "bora,intel"),
            node("sirocco1", "routage", "sirocco,intel,v100"),
            node("sirocco2", "routage", "sirocco,amd,A100,2gpu"),
        ],
    )
    part = WHOLE | {"slurm_partition": "routage", "gpus_per_node": 0}
    found = kinds(known)
    assert found["v100"] == {"slurm_constraint": "v100", "gpus_of_node": 1} | part
    assert found["a100"] == {"slurm_constraint": "A100", "gpus_of_node": 2} | part
    assert found["cpu"]["slurm_constraint"] == "bora"
    (v100,) = [kind for kind in propose(known, Rights()).kinds if kind.name == "v100"]
    (count,) = [choice for choice in v100.choices if choice.key == "gpus_of_node"]
    assert "CHECK THIS" in count.why


def test_the_best_of_several_partitions_is_taken() -> None:
    found = kinds(
        replace(
            facts(
                [
                    f"short Default=YES MaxTime=00:30:00 {UP}",
                    f"gpu MaxTime=4-00:00:00 {UP}",
                    f"preempt PreemptMode=REQUEUE MaxTime=UNLIMITED {UP}",
                    "drained MaxTime=UNLIMITED State=DRAIN",
                    f"private AllowAccounts=others MaxTime=UNLIMITED {UP}",
                    f"root RootOnly=YES MaxTime=UNLIMITED {UP}",
                ],
                [
                    node("g1", "short,gpu,preempt,drained,private,root", gres="gpu:h100:8"),
                    node("c1", "short,preempt,drained,private,root"),
                ],
            ),
            settings={"PreemptType": "preempt/partition_prio", "PreemptMode": "OFF"},
        ),
        Rights(accounts={"mine": Account(frozenset({"normal"}), "normal")}, default_account="mine"),
    )
    # Only one partition has the GPU node alone; of the others, only `short` has no preemption.
    assert found["h100"]["slurm_partition"] == "gpu"
    assert found["h100"]["timeout_min"] == 720
    assert (found["cpu"]["slurm_partition"], found["cpu"]["timeout_min"]) == ("short", 30)
    assert "slurm_account" not in found["h100"]


def test_mig_slices_share_their_node() -> None:
    found = kinds(
        facts(
            [f"gpu Default=YES MaxTime=1-00:00:00 {UP}"],
            [
                node("m1", "gpu", "a100", "gpu:1g.10gb:7(S:0)"),
                node("m2", "gpu", "h100", "gpu:nvidia_h100_80gb_hbm3:1,gpu:h100_2g.20gb:3"),
            ],
        )
    )
    assert set(found) == {"a100-1g.10gb", "h100-2g.20gb", "h100-80gb-hbm3"}
    assert found["a100-1g.10gb"] == {
        "slurm_partition": "gpu",
        "gpus_of_node": 1,
        "slurm_gres": "gpu:1g.10gb:1",
        "slurm_exclusive": False,
        "cpus_per_task": 9,  # 64 / 7
        "slurm_mem": "73142M",  # 512000 / 7
        "timeout_min": 720,
    }
    assert found["h100-80gb-hbm3"]["slurm_gres"] == "gpu:nvidia_h100_80gb_hbm3:1"
    assert found["h100-2g.20gb"]["slurm_gres"] == "gpu:h100_2g.20gb:1"


def test_a_limit_of_the_user_leads_to_a_shared_node() -> None:
    rights = Rights(
        parse_associations("team|normal,long|normal|2-00:00:00|\n"),
        "team",
        parse_qos("normal|04:00:00||cpu=96,gres/gpu=1\nlong|||\n"),
    )
    (kind,) = propose(
        facts([f"gpu MaxTime=UNLIMITED {UP}"], [node("a1", "gpu", gres="gpu:a100:4")]), rights
    ).kinds
    assert kind.values == {
        "slurm_partition": "gpu",
        "gpus_of_node": 1,
        "slurm_gres": "gpu:a100:1",
        "slurm_exclusive": False,
        "cpus_per_task": 16,
        "slurm_mem": "128000M",
        "timeout_min": 240,
    }
    why = {choice.key: choice.why for choice in kind.choices}
    assert "a node has 4, but QoS normal allows 1" in why["gpus_of_node"]
    assert why["timeout_min"] == "minutes: the limit of QoS normal"


def test_account_and_qos_are_named_where_the_default_ones_are_not_admitted() -> None:
    rights = Rights(
        parse_associations("a|normal|normal||\nb|normal,gpu|normal||\n"), "a", parse_qos("gpu|||\n")
    )
    partition = f"gpu AllowAccounts=b,c AllowQos=gpu MaxTime=UNLIMITED {UP}"
    found = kinds(facts([partition], [node("a1", "gpu", gres="gpu:a100:4")]), rights)
    assert found["a100"]["slurm_account"] == "b"
    assert found["a100"]["slurm_qos"] == "gpu"


def test_hardware_that_the_user_cannot_use_is_noted() -> None:
    proposal = propose(
        facts(
            [f"all MaxTime=UNLIMITED {UP}", f"secret AllowGroups=army MaxTime=UNLIMITED {UP}"],
            [node("c1", "all"), node("x1", "secret", gres="gpu:h200:8")],
        ),
        Rights(groups=frozenset({"users"})),
    )
    assert [kind.name for kind in proposal.kinds] == ["cpu"]
    assert proposal.notes == (
        "h200: 1 node, but you can use no partition that has them and is up.",
    )


def test_the_same_gpu_in_other_numbers_is_another_kind() -> None:
    found = kinds(
        facts(
            [f"gpu MaxTime=UNLIMITED {UP}"],
            [
                node("a1", "gpu", "small", gres="gpu:a100:2"),
                node("a2", "gpu", "large", gres="gpu:a100:8"),
            ],
        )
    )
    assert found["a100-x2"]["slurm_constraint"] == "small"
    assert found["a100-x8"]["slurm_gres"] == "gpu:a100:8"
    assert found["a100-x8"]["slurm_constraint"] == "large"


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("normal|||", {"normal": Limit()}),
        ("a|1-12:00:00|gres/gpu=4|gres/gpu=2,mem=1T", {"a": Limit(2160.0, 2, None)}),
        ("a||cpu=64,gres/gpu:a100=1|", {"a": Limit(None, None, 64)}),
        ("", {}),
    ],
)
def test_limits_of_qos_are_parsed(text: str, limits: Mapping[str, Limit]) -> None:
    assert parse_qos(text) == limits


def test_the_associations_of_an_account_are_one() -> None:
    assert parse_associations("a|x,y|x|01:00:00|cpu=8\na|z|||\n\n") == {
        "a": Account(frozenset("xyz"), "x", Limit())
    }


# The files


def test_each_choice_has_a_comment() -> None:
    known = facts([f"gpu MaxTime=UNLIMITED {UP}"], [node("a1", "gpu", "fast", "gpu:a100:4")])
    proposal = propose(known, Rights())
    files = render_files("site", Path("profiles/site"), proposal)
    assert set(files) == {"config.yaml", "kinds.yaml"}
    assert yaml.safe_load(files["kinds.yaml"]) == {"a100": proposal.kinds[0].values}
    options = yaml.safe_load(files["config.yaml"])
    assert options["submitit-kinds"] == "profiles/site/kinds.yaml"
    assert options["set-resources"]["measure"]["socket"] == "tcp"
    assert max(map(len, files["kinds.yaml"].splitlines())) <= 100
    lines = files["kinds.yaml"].splitlines()
    keys = [number for number, line in enumerate(lines) if line.startswith("  slurm_")]
    assert len(keys) == 4
    assert all(lines[number - 1].startswith("  # ") for number in keys)


def test_the_options_are_those_of_the_profile_of_plafrim() -> None:
    root = Path(__file__).parents[2]
    ours = yaml.safe_load(render_files("x", Path("profiles/x"), Proposal(()))["config.yaml"])
    theirs = yaml.safe_load((root / "profiles/plafrim/config.yaml").read_text(encoding="utf-8"))
    assert ours | {"submitit-kinds": ""} == theirs | {"submitit-kinds": ""}


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "default", "a b"])
def test_a_wrong_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        check_name(name)


# The command


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small Slurm: its programs print recorded text."""
    outputs = {
        "--version": "slurm-wlm 22.05.8\n",
        "ping": "Slurmctld(primary) at vm is UP\n",
        "config": "PreemptType = preempt/none\nMinJobAge = 300 sec\n",
        "partition": f"PartitionName=gpu Default=YES MaxTime=1-00:00:00 {UP}\n",
        "node": node("a1", "gpu", gres="gpu:a100:4") + "\n",
        "--test-only": "",
        "-n": "",
        "-h": "",
    }

    def run(command: Sequence[str], timeout_s: float = 0) -> CommandResult:
        found = [text for word, text in outputs.items() if word in command]
        if command[0].startswith("/") or not found:
            return shell.run_command(command, timeout_s or 60)
        return CommandResult(0, found[0])

    monkeypatch.setattr("servegrid.doctor.run_command", run)
    monkeypatch.setattr(slurm.check_programs, "__defaults__", (lambda name: name,))
    monkeypatch.setattr(slurm.query_responses, "__defaults__", (lambda name: name,))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_writes_a_profile_and_ends_with_the_verdict(
    scripted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init-profile", "site"]) == 0
    output = capsys.readouterr().out
    assert "a100: 1 node (1 idle): a1" in output
    assert output.splitlines()[-1].endswith("0 failures")
    written = yaml.safe_load((scripted / "profiles/site/kinds.yaml").read_text(encoding="utf-8"))
    assert written["a100"]["slurm_gres"] == "gpu:a100:4"
    assert [path.name for path in (scripted / "profiles").iterdir()] == ["site"]


def test_an_existing_folder_is_not_replaced(
    scripted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scripted / "profiles/site").mkdir(parents=True)
    assert main(["init-profile", "site"]) == 2
    assert "profiles/site: exists. Use another name" in capsys.readouterr().err
    assert list((scripted / "profiles/site").iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "profiles" / "site"
    folder.mkdir(parents=True)
    (folder / "kinds.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        init_profile.write_folder(folder, {"kinds.yaml": "other"})
    assert (folder / "kinds.yaml").read_text(encoding="utf-8") == "mine"


def test_without_slurm_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["init-profile", "site"]) == 2
    assert "not on the PATH: sbatch" in capsys.readouterr().err
    assert not (tmp_path / "profiles").exists()
