"""What an allocation refuses, before it is submitted and before anything comes up in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from servegrid.errors import ConfigError, EngineError
from servegrid.run.service import check_allocated_gpus, check_servable
from servegrid.study.config import load_study
from servegrid.study.grid import Trial

CONFIG = Path(__file__).parents[2] / "config"
ARTICLE = load_study(CONFIG / "inria-2024.yaml")
FOUR_A100 = next(trial for trial in ARTICLE.trials if trial.deployment.gpu_count == 4)
TWO_V100 = ARTICLE.deployments[0]


def params(trial: Trial) -> dict[str, str]:
    return {"spec": trial.spec_json}


def test_a_real_engine_on_several_nodes_is_refused_with_reason_and_remedy() -> None:
    told = r"needs 4 GPUs on 2 nodes.*brings vllm up on one.*`exclude`"
    with pytest.raises(ConfigError, match=told):
        check_servable("a", params(FOUR_A100), {}, {"nodes": 2})
    check_servable("a", params(FOUR_A100), {}, {"nodes": 1})
    check_servable("a", params(FOUR_A100), {}, {})


def test_an_emulated_one_may_rehearse_them() -> None:
    deployment = replace(FOUR_A100.deployment, engine="emulated")
    check_servable("a", params(replace(FOUR_A100, deployment=deployment)), {}, {"nodes": 2})


@pytest.mark.parametrize(
    "env",
    [
        {},  # not on Slurm
        {"CUDA_VISIBLE_DEVICES": ""},
        {"SLURM_JOB_ID": "7"},  # no GRES: whole nodes bring their GPUs along
        {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0,1"},
        {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "2,3,5"},
        {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_NUM_NODES": "2"},
    ],
)
def test_enough_gpus_or_no_knowledge_of_them(env: dict[str, str]) -> None:
    check_allocated_gpus(TWO_V100, env)


@pytest.mark.parametrize("visible", ["", "0"])
def test_fewer_gpus_than_needed_are_refused(visible: str) -> None:
    env = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": visible, "SLURMD_NODENAME": "sirocco14"}
    found = len(visible)
    with pytest.raises(EngineError, match=f"has {found} of 2 GPUs on node sirocco14.*slurm_gres"):
        check_allocated_gpus(TWO_V100, env)
