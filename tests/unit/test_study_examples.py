"""The studies in config/ contain the cells that they describe."""

from dataclasses import replace
from pathlib import Path

import pytest

from servegrid.errors import ConfigError
from servegrid.reference import data
from servegrid.study.config import load_study, parse_study
from servegrid.study.grid import Deployment

CONFIG = Path(__file__).parents[2] / "config"
ARTICLE = load_study(CONFIG / "inria-2024.yaml")
REHEARSAL = load_study(CONFIG / "rehearsal.yaml")


def test_the_articles_study_has_exactly_the_published_cells() -> None:
    keys = ["model", "quantization", "gpu", "gpu_count", "concurrency", "input_len", "output_len"]
    published = set(data.published_cells("inria-2024")[keys].itertuples(index=False, name=None))
    expanded = {
        tuple({**vars(trial.deployment), **vars(trial.workload)}[key] for key in keys)
        for trial in ARTICLE.trials
    }
    assert len(ARTICLE.trials) == len(published) == 392
    assert expanded == published
    assert {trial.workload.protocol for trial in ARTICLE.trials} == {"burst"}


def without_engine(deployment: Deployment) -> Deployment:
    return replace(deployment, name="", engine="", engine_args={})


def test_the_rehearsal_is_the_articles_study_on_another_engine() -> None:
    assert [without_engine(each) for each in REHEARSAL.deployments] == [
        without_engine(each) for each in ARTICLE.deployments
    ]
    assert [trial.workload for trial in REHEARSAL.trials] == [
        trial.workload for trial in ARTICLE.trials
    ]
    assert {each.engine for each in REHEARSAL.deployments} == {"emulated"}


def test_emulated_and_real_deployments_share_a_study_only_if_allowed() -> None:
    def entry(model: str, engine: str) -> dict[str, object]:
        fixed = {"checkpoint": "org/m", "quantization": "fp16", "gpu": "cpu", "max_model_len": 512}
        return {"model": model, "engine": engine} | fixed

    config = {
        "study": "mixed",
        "workload": {"concurrency": 1, "input_len": 10},
        "deployments": [entry("a", "vllm"), entry("b", "emulated")],
    }
    with pytest.raises(
        ConfigError, match="`b_fp16_emulated_cpu` is emulated and `a_fp16_vllm_cpu`"
    ):
        parse_study(config)
    assert len(parse_study(config | {"allow_emulated_mix": True}).trials) == 2
