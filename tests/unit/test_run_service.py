"""Checks of an allocation before it is submitted and before its engine starts."""

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


def test_a_real_engine_on_several_nodes_is_refused_with_a_remedy() -> None:
    message = r"needs 4 GPUs on 2 nodes.*starts vllm on one node only.*`exclude`"
    with pytest.raises(ConfigError, match=message):
        check_servable("a", params(FOUR_A100), {}, {"nodes": 2})
    check_servable("a", params(FOUR_A100), {}, {"nodes": 1})
    check_servable("a", params(FOUR_A100), {}, {})


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
