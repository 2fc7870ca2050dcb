"""The demo's model, and a real engine for all who need just any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.demo_model import DemoModel
from helpers.deployments import DEMO_VLLM
from helpers.node_pair import Pair
from servegrid.engines import Site, start_engine
from servegrid.study import models
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Deployment


@pytest.fixture(scope="session")
def demo_model() -> DemoModel:
    """Prepared once per machine, in SERVEGRID_MODELS or the user's cache."""
    cache = models.default_folder()
    models.fetch(cache)
    return DemoModel(
        cache,
        models.locate("demo:smollm2-135m-instruct", cache),
        models.locate("demo:smollm2-135m-instruct.gguf", cache),
    )


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """An allocation of two nodes, which are two processes on this machine."""
    pair = Pair(tmp_path)
    try:
        yield pair
    finally:
        pair.close()


@pytest.fixture(scope="session")
def llamacpp_deployment() -> Deployment:
    return replace(
        DEMO_VLLM,
        name="smollm2-135m-instruct_q4_1_llamacpp_cpu",
        checkpoint="demo:smollm2-135m-instruct.gguf",
        quantization="q4_1",
        engine="llamacpp",
        engine_args={},
    )


@pytest.fixture(scope="session")
def llamacpp_endpoint(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> Iterator[tuple[Endpoint, Path]]:
    """A llama.cpp that serves the demo's model on TCP, and the folder of its tokenizer."""
    deployment = replace(llamacpp_deployment, max_model_len=1024, max_num_seqs=16)
    with start_engine(deployment, Site(models=demo_model.models, startup_s=120)) as engine:
        yield engine.endpoint, demo_model.folder
