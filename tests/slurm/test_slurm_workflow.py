"""The workflow with PlaFRIM's profile, on a private Slurm with PlaFRIM's features."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from helpers.cluster import Cluster
from helpers.processes import wait_for_end
from helpers.tokenizing import make_tokenizer
from slurm.conftest import KIND, Workspace

pytestmark = [pytest.mark.crowded, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
REHEARSAL = yaml.safe_load((ROOT / "config/rehearsal.yaml").read_text())
FEW = {"include": [{"concurrency": [1, 8], "input_len": [31, 21]}]}


class Study(Workspace):
    """A folder for the results of the repository's own workflow."""

    def study(self, config: dict[str, Any], *arguments: str) -> str:
        path = self.folder / "study.yaml"
        path.write_text(yaml.safe_dump(config))
        options = [
            *("--snakefile", str(ROOT / "Snakefile"), "--configfile", str(path), "--nocolor"),
            *("--profile", str(ROOT / "profiles/plafrim")),
            *("--submitit-kinds", str(ROOT / "profiles/plafrim/kinds.yaml")),
        ]
        process = self.launch(*options, *arguments)
        output = wait_for_end(process, self.log, 800)
        return f"{output}\nstatus {process.returncode}"

    def cells(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "results/tables/cells.parquet")

    def records_by_deployment(self) -> dict[str, dict[str, Any]]:
        """The records of allocations, by the name of the deployment."""
        paths = (self.folder / "results/logs/allocations").iterdir()
        records = [json.loads(path.read_text()) for path in paths]
        return {each["allocation"]["name"].rpartition(".")[0]: each for each in records}


def model_in(folder: Path) -> dict[str, str]:
    """The keys of a deployment for a folder that has a tokenizer and no weights."""
    return dict.fromkeys(("checkpoint", "tokenizer"), str(make_tokenizer(folder)))


@pytest.fixture
def study(cluster: Cluster, tmp_path: Path) -> Iterator[Study]:
    workspace = Study(tmp_path / "work", cluster)
    try:
        yield workspace
    finally:
        workspace.close()


@pytest.mark.slow
def test_an_old_vllm_on_several_nodes_is_refused_before_submission(study: Study) -> None:
    environment = study.folder / "environment"
    (environment / "lib/python3.11/site-packages/vllm-0.10.1.1.dist-info").mkdir(parents=True)
    (environment / "bin").mkdir()
    (environment / "bin/python").symlink_to(sys.executable)
    four = [each for each in REHEARSAL["deployments"] if each.get("gpu_count") == 4]
    real = [each | {"engine": "vllm"} | model_in(study.folder / "model") for each in four]
    real[0].pop("engine_args")
    kind = {"gpus_of_node": 2, "interface": "lo", "python": str(environment / "bin/python")}
    study.kinds(**{"a100-40gb": KIND | kind})
    output = study.study(REHEARSAL | FEW | {"deployments": real}, "--submitit-kinds", "kinds.yaml")
    assert output.endswith("status 1")
    assert "kinds.yaml: a100-40gb: deployment `mixtral-8x22b_awq-4bit_vllm_4xa100-40gb`" in output
    assert "vLLM 0.10.1.1 of the kind `a100-40gb` cannot start on several nodes" in output
    assert study.queue() == []


@pytest.mark.slow
def test_a_missing_environment_is_refused_before_submission(study: Study) -> None:
    some = [each for each in REHEARSAL["deployments"] if each["gpu"] == "v100-16gb"][:1]
    real = [each | {"engine": "vllm"} | model_in(study.folder / "model") for each in some]
    real[0].pop("engine_args")
    study.kinds(**{"v100-16gb": KIND | {"python": ".venv-none/bin/python"}})
    output = study.study(REHEARSAL | FEW | {"deployments": real}, "--submitit-kinds", "kinds.yaml")
    assert output.endswith("status 1")
    assert "v100-16gb.python: " in output
    assert "/.venv-none/bin/python does not exist. Create this environment" in output
    assert "submitted as" not in output


@pytest.mark.slow
def test_an_allocation_with_fewer_gpus_than_needed_is_refused_on_the_node(study: Study) -> None:
    some = [each for each in REHEARSAL["deployments"] if each["gpu"] == "v100-16gb"][:1]
    gres = {"slurm_constraint": "v100", "slurm_gres": "gpu:v100:1"}
    study.kinds(**{"v100-16gb": KIND | gres})
    config = REHEARSAL | FEW | {"deployments": some}
    output = study.study(config, "--submitit-kinds", "kinds.yaml")
    assert output.endswith("status 1")
    assert "this allocation has 1 of 2 GPUs on node sirocco1" in output
    assert "slurm_gres or gpus_per_node" in output
    study.kinds(**{"v100-16gb": KIND | gres | {"slurm_gres": "gpu:v100:2"}})
    measured = "results/tables/cells.parquet"
    output = study.study(config, measured, "--submitit-kinds", "kinds.yaml")
    assert output.endswith("status 0"), output[-6000:]
