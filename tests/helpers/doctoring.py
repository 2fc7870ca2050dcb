"""The output of a small Slurm, for tests of `servegrid doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from servegrid.doctor import kinds, slurm
from servegrid.doctor.profile import Profile
from servegrid.doctor.report import Finding, Group
from servegrid.doctor.resources import ResourceRequest, build_request
from servegrid.doctor.shell import CommandResult
from servegrid.doctor.slurm_output import parse_nodes, parse_partitions, parse_settings
from servegrid.study.config import parse_study
from servegrid.study.grid import Study

PARTITIONS = """\
PartitionName=routage AllowGroups=ALL Default=YES QoS=N/A GraceTime=0 MaxTime=3-00:00:00 \
Nodes=bora001,sirocco[14-15] PreemptMode=OFF State=UP TotalNodes=3
PartitionName=preempt AllowGroups=ALL Default=NO QoS=N/A GraceTime=30 MaxTime=UNLIMITED \
Nodes=bora001 PreemptMode=REQUEUE State=UP TotalNodes=1
PartitionName=old AllowGroups=ALL Default=NO MaxTime=01:00:00 State=DOWN TotalNodes=1
"""
NODES = """\
NodeName=bora001 CPUEfctv=32 CPUTot=32 AvailableFeatures=bora,intel ActiveFeatures=bora,intel \
Gres=(null) OS=Linux 6.1 #1 SMP RealMemory=190000 State=IDLE Partitions=routage,preempt
NodeName=sirocco14 CPUTot=32 AvailableFeatures=sirocco,v100 ActiveFeatures=sirocco,v100 \
Gres=gpu:v100:2(S:0-1) RealMemory=380000 State=MIXED+PLANNED Partitions=routage
NodeName=sirocco15 CPUTot=64 AvailableFeatures=sirocco,v100 ActiveFeatures=sirocco,v100 \
Gres=gpu:v100:2 RealMemory=380000 State=DOWN* Partitions=routage Reason=power State=IDLE
"""
CONFIG = """\
Configuration data as of 2026-11-23T00:36:01
JobRequeue              = 1
KillWait                = 30 sec
MinJobAge               = 300 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SlurmctldParameters     = preempt_send_user_signal
AccountingStorageType   = accounting_storage/slurmdbd
AccountingStorageEnforce = associations,limits,qos
"""
FACTS = slurm.SlurmFacts(
    parse_settings(CONFIG),
    parse_partitions(PARTITIONS),
    parse_nodes(NODES),
    {"users": {"normal"}, "team": {"normal", "long"}},
)
V100 = {
    "slurm_partition": "routage",
    "slurm_constraint": "sirocco&v100",
    "slurm_exclusive": True,
    "slurm_mem": "0",
    "cpus_per_task": 16,
    "timeout_min": 720,
}
GROUP = Group("kind v100")


def request(**values: Any) -> ResourceRequest:
    profile = Profile(Path("p/config.yaml"), {}, Path("p/kinds.yaml"), {"v100": V100 | values})
    return build_request(profile, "v100", ())


def check(subject: str, facts: slurm.SlurmFacts = FACTS, **values: Any) -> Finding:
    found = list(kinds.check_kind(request(**values), facts, "kinds.yaml"))
    return next(each for each in found if each.subject.startswith(subject))


def study(gpu_count: int = 2, engine: str = "vllm") -> Study:
    deployment = {"model": "m", "checkpoint": "org/m", "quantization": "fp16", "engine": engine}
    return parse_study(
        {
            "study": "s",
            "workload": {"concurrency": 1, "input_len": 10},
            "deployments": [
                deployment | {"gpu": "v100", "gpu_count": gpu_count, "max_model_len": 2048}
            ],
        }
    )


def result(
    status: int = 0, stdout: str = "", stderr: str = "", seconds: float = 0.1
) -> CommandResult:
    return CommandResult(status, stdout, stderr, seconds)
