"""`servegrid init-profile` on clusters of five layouts. Jobs run with what it writes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import yaml

from helpers.cluster import Node, Options
from servegrid.doctor.profile import Profile
from servegrid.doctor.resources import build_request
from slurm.conftest import Workspace

pytestmark = [pytest.mark.crowded]

GPU = "PartitionName=gpu Default=YES MaxTime=2-00:00:00 DefaultTime=01:00:00 State=UP"
ALL = f"{GPU} Nodes=ALL"
WHOLE = {"slurm_exclusive": True, "slurm_mem": "0", "cpus_per_task": 32, "timeout_min": 720}
IN_GPU = WHOLE | {"slurm_partition": "gpu"}

TYPED = Options(
    (Node("a1", "x", "a100", 4), Node("v1", "x", "v100", 2), Node("c1", "x")), partitions=(ALL,)
)
UNTYPED = Options(
    (Node("a1", "gpu,a100,80gb", "", 4), Node("v1", "gpu,v100", "", 2), Node("c1", "cpu")),
    partitions=(ALL,),
)
FEATURES = Options(
    (Node("s1", "sirocco,v100,2gpu"), Node("s2", "sirocco,a100,2gpu"), Node("b1", "bora")),
    partitions=(ALL,),
)
PARTITIONS = Options(
    (Node("a1", "x", "a100", 4), Node("v1", "x", "v100", 2), Node("c1", "x")),
    partitions=(
        "PartitionName=short Default=YES Nodes=ALL MaxTime=00:30:00 State=UP",
        "PartitionName=a100 Nodes=a1 MaxTime=1-00:00:00 State=UP",
        "PartitionName=v100 Nodes=v1 MaxTime=05:00:00 State=UP",
        "PartitionName=batch Nodes=c1 MaxTime=INFINITE State=UP",
        "PartitionName=down Nodes=ALL MaxTime=INFINITE State=DOWN",
    ),
)
MIG = Options(
    (
        Node("m1", "a100", slices=(("1g.10gb", 4), ("3g.40gb", 1))),
        Node("a1", "x", "h100", 2),
    ),
    partitions=(ALL,),
)
LAYOUTS: list[tuple[Options, dict[str, dict[str, Any]], dict[str, str]]] = [
    (
        TYPED,
        {
            "a100": IN_GPU | {"slurm_gres": "gpu:a100:4", "gpus_of_node": 4},
            "v100": IN_GPU | {"slurm_gres": "gpu:v100:2", "gpus_of_node": 2},
            "cpu": IN_GPU | {"slurm_exclude": "a1,v1"},
        },
        {"a100": "a1", "v100": "v1", "cpu": "c1"},
    ),
    (
        UNTYPED,
        {
            "a100-80gb": IN_GPU
            | {"slurm_constraint": "a100", "slurm_gres": "gpu:4", "gpus_of_node": 4},
            "v100": IN_GPU | {"slurm_constraint": "v100", "slurm_gres": "gpu:2", "gpus_of_node": 2},
            "cpu": IN_GPU | {"slurm_constraint": "cpu"},
        },
        {"a100-80gb": "a1", "v100": "v1", "cpu": "c1"},
    ),
    (
        FEATURES,
        {
            "a100": IN_GPU | {"slurm_constraint": "a100", "gpus_of_node": 2, "gpus_per_node": 0},
            "v100": IN_GPU | {"slurm_constraint": "v100", "gpus_of_node": 2, "gpus_per_node": 0},
            "cpu": IN_GPU | {"slurm_constraint": "bora"},
        },
        {"a100": "s2", "v100": "s1", "cpu": "b1"},
    ),
    (
        PARTITIONS,
        {
            "a100": WHOLE
            | {"slurm_partition": "a100", "slurm_gres": "gpu:a100:4", "gpus_of_node": 4},
            "v100": WHOLE
            | {"slurm_partition": "v100", "slurm_gres": "gpu:v100:2", "gpus_of_node": 2}
            | {"timeout_min": 300},
            "cpu": WHOLE | {"slurm_partition": "batch"},
        },
        {"a100": "a1", "v100": "v1", "cpu": "c1"},
    ),
    (
        MIG,
        {
            "a100-1g.10gb": IN_GPU
            | {"slurm_gres": "gpu:1g.10gb:1", "gpus_of_node": 1, "slurm_exclusive": False}
            | {"cpus_per_task": 6, "slurm_mem": "38000M"},  # a fifth of the node
            "a100-3g.40gb": IN_GPU
            | {"slurm_gres": "gpu:3g.40gb:1", "gpus_of_node": 1, "slurm_exclusive": False}
            | {"cpus_per_task": 6, "slurm_mem": "38000M"},
            "h100": IN_GPU | {"slurm_gres": "gpu:h100:2", "gpus_of_node": 2},
        },
        {"a100-1g.10gb": "m1", "a100-3g.40gb": "m1", "h100": "a1"},
    ),
]


def init_profile(work: Workspace) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "servegrid.cli.main", "init-profile", "site"],
        cwd=work.folder,
        env=work.cluster.env,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.mark.parametrize(
    ("cluster", "expected", "nodes"),
    LAYOUTS,
    indirect=["cluster"],
    ids=["typed", "untyped", "features", "partitions", "mig"],
)
def test_the_profile_of_a_layout_passes_the_doctor_and_runs_jobs(
    work: Workspace,
    expected: dict[str, dict[str, Any]],
    nodes: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(work.folder)
    done = init_profile(work)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    folder = work.folder / "profiles" / "site"
    text = (folder / "kinds.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == expected
    assert done.stdout.splitlines()[-1].endswith(" 0 failures")
    assert "WARN  GPUs" not in done.stdout
    again = init_profile(work)
    assert (again.returncode, again.stdout) == (2, "")
    assert "profiles/site: exists" in again.stderr
    assert (folder / "kinds.yaml").read_text(encoding="utf-8") == text
    # Slurm starts a job of each kind on a node of this kind.
    profile = Profile.load(folder.relative_to(work.folder))
    for kind, node in nodes.items():
        options = build_request(profile, kind, ()).sbatch_options()
        found = work.cluster.call("srun", *options, "printenv", "SLURMD_NODENAME")
        assert (kind, found.strip()) == (kind, node)
