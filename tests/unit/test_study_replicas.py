"""Several replicas of a model behind one endpoint, measured as one deployment."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from helpers.deployments import EMULATED_ENTRY, EXTERNAL_ENTRY
from servegrid.analysis.efficiency import cell_bound, find_hardware
from servegrid.analysis.titles import deployment_title
from servegrid.doctor.environments import Environment, check_start
from servegrid.doctor.report import Status
from servegrid.engines.arguments import kv_cache_bytes, worker_cores
from servegrid.engines.emulated import parse_settings
from servegrid.errors import ConfigError
from servegrid.reference.memory import find_device, place
from servegrid.reference.roofline import ModelShape
from servegrid.run.service import check_servable
from servegrid.study.config import parse_study
from servegrid.study.deployment import Deployment, parse_deployment
from servegrid.study.grid import Workload
from servegrid.study.nodes import nodes_problem, version_problem

ENTRY: dict[str, Any] = {
    "model": "small",
    "checkpoint": "models/small",
    "quantization": "fp16",
    "engine": "vllm",
    "gpu": "a100-40gb",
    "max_model_len": 512,
    "max_num_seqs": 8,
}
NAME = "small_fp16_vllm_4xa100-40gb"


def deployment(**keys: Any) -> Deployment:
    return parse_deployment(ENTRY | keys, "deployments[0]")


def study(**keys: Any) -> dict[str, Any]:
    workload = {"concurrency": 4, "input_len": 31}
    return {"study": "s", "workload": workload, "deployments": [ENTRY | keys]}


def test_vllm_s_data_parallelism_serves_the_replicas_and_gpu_count_is_their_sum() -> None:
    found = deployment(replicas=2)
    assert (found.gpu_count, found.node_gpus, found.replicas) == (2, 2, 2)
    assert found.name == "small_fp16_vllm_2xa100-40gb_replicas-2"
    assert found.engine_args == {"data_parallel_size": 2}
    assert found.parallelism.tensor == 1
    assert found.max_running == 16
    assert Deployment.from_spec(found.spec) == found
    eight = deployment(replicas=2, gpu_count=8, engine_args={"pipeline_parallel_size": 2})
    assert (eight.parallelism.tensor, eight.parallelism.workers) == (2, 8)
    on_cpu = deployment(replicas=2, gpu="cpu")
    assert (on_cpu.name, on_cpu.gpu_count) == ("small_fp16_vllm_cpu_replicas-2", 0)


def test_one_replica_is_the_same_deployment_as_before() -> None:
    assert deployment(replicas=1).digest == deployment().digest
    assert deployment(replicas=2).digest != deployment(gpu_count=2).digest


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"engine": "llamacpp", "gpu": "cpu", "tokenizer": "models/small", "replicas": 2},
            "deployments[0].replicas: only `vllm` and `emulated` serve several replicas behind one "
            "endpoint, `llamacpp` does not. Remove the key, and measure one replica",
        ),
        (EXTERNAL_ENTRY | {"replicas": 2}, "give `gpu_count` and `max_num_seqs` of all replicas"),
        (
            {"replicas": 2, "gpu_count": 3},
            "deployments[0].gpu_count: 3 GPUs cannot be divided evenly among 2 replicas. "
            "`gpu_count` counts the GPUs of all replicas: set it to 2 times those of one.",
        ),
        (
            {"replicas": 2, "engine_args": {"data-parallel-size": 2}},
            "engine_args.data_parallel_size is set by the deployment's own key `replicas`",
        ),
        (
            EMULATED_ENTRY | {"engine_args": {"replicas": 2}},
            "engine_args.replicas is set by the deployment's own key `replicas`",
        ),
        (
            {"replicas": 2, "gpu_count": 6, "engine_args": {"pipeline_parallel_size": 2}},
            "gpu_count 6 is not a multiple of 4",
        ),
    ],
)
def test_replicas_that_cannot_be_are_refused(keys: dict[str, Any], message: str) -> None:
    entry = keys if "model" in keys else ENTRY | keys
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_deployment(entry, "deployments[0]")


def test_the_schema_wants_a_whole_number_from_1_on() -> None:
    for value in (0, 1.5, "2", [1, 2]):
        with pytest.raises(ConfigError, match=r"deployments\[0\]\.replicas: "):
            parse_study(study(replicas=value))


def test_replicas_can_be_swept_against_tensor_parallelism() -> None:
    found = parse_study(study(gpu_count=4, sweep={"replicas": [1, 2, 4]})).deployments
    assert [(each.name, each.parallelism.tensor, each.replicas) for each in found] == [
        (f"{NAME}_replicas-1", 4, 1),
        (f"{NAME}_replicas-2", 2, 2),
        (f"{NAME}_replicas-4", 1, 4),
    ]
    sizes = parse_study(study(replicas=2, sweep={"tensor_parallel_size": [1, 2]})).deployments
    assert [(each.gpu_count, each.parallelism.tensor) for each in sizes] == [(2, 1), (4, 2)]
    both = parse_study(study(sweep={"replicas": [2], "tensor_parallel_size": [2]})).deployments
    assert [(each.gpu_count, each.parallelism.tensor) for each in both] == [(4, 2)]
    with pytest.raises(ConfigError, match="Did you mean `replicas`"):
        parse_study(study(sweep={"replica": [1, 2]}))


def test_a_filter_can_name_the_replicas() -> None:
    config = copy.deepcopy(study(gpu_count=4, sweep={"replicas": [1, 2]}))
    config["exclude"] = [{"replicas": 2}]
    assert [each.replicas for each in parse_study(config).deployments] == [1]


def test_replicas_on_several_nodes_are_refused_with_a_way_out() -> None:
    problem = nodes_problem(deployment(replicas=2, gpu_count=8), 2)
    assert problem and "needs 8 GPUs on 2 nodes, but servegrid starts the 2 replicas" in problem
    assert "the capacity plan says how many you need" in problem


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [("0.10.1.1", True), ("0.11.0", False), ("0.19.1", False), ("0.32.0+cpu", False)],
)
def test_a_vllm_whose_engine_has_no_replicas_is_refused(version: str, is_refused: bool) -> None:
    problem = version_problem(deployment(replicas=2), 1, version)
    assert bool(problem) is is_refused
    if problem:
        assert f"has 2 replicas, but vLLM {version} of the kind `a100-40gb`" in problem
    assert version_problem(deployment(), 1, version) is None


def test_the_replicas_of_an_emulated_engine_have_the_timing_of_their_gpus() -> None:
    entry = EMULATED_ENTRY | {"gpu_count": 4, "replicas": 2}
    settings, timing, _ = parse_settings(parse_deployment(entry, "deployments[0]"))
    assert settings.replicas == 2
    # Mistral on two V100, 8 requests of 480 tokens: 3.0 s per 100 tokens, times 0.001.
    times = timing(8, 480)
    assert times is not None and times.e2el_s(100) == pytest.approx(0.003)


SHAPE = ModelShape(
    params=8e9,
    active_params=8e9,
    embedding_params=0,
    experts=1,
    active_experts=1,
    kv_bytes_per_token=0,
    weight_bytes=16e9,
)
MIXTURE = ModelShape(
    params=10e9,
    active_params=4e9,
    embedding_params=0,
    experts=8,
    active_experts=2,
    kv_bytes_per_token=0,
    weight_bytes=20e9,
)
"""6 experts that a token does not use have 6e9 parameters, so all 8 have 8e9 of 10e9."""


def test_the_bound_is_that_of_the_busiest_replica() -> None:
    """16 GB at 1555 GB/s per A100; decoding reads the weights 100 times per 100 tokens."""
    two, one = deployment(replicas=2), deployment(gpu_count=2)
    workload = Workload("burst", 2, input_len=1, output_len=100, requests=2)
    once = 100 * 16e9 / 1555e9
    for requests in (1.0, 2.0):
        bound = cell_bound(two, SHAPE, find_hardware(two), workload, requests)
        assert bound == pytest.approx(once)
        assert cell_bound(one, SHAPE, find_hardware(one), workload, requests) == pytest.approx(
            once / 2
        )


def test_replicas_have_the_weights_each_but_share_experts() -> None:
    device = find_device("a100-40gb")
    placed = place(deployment(replicas=2, gpu_count=4), SHAPE, device)
    assert (placed.weights, placed.copies) == (8e9, 2)  # 16 GB on 2 GPUs
    mixed = place(deployment(replicas=2, gpu_count=4), MIXTURE, device)
    # 4 GB without the experts on 2 GPUs, and 16 GB of experts on 4.
    assert mixed.weights == pytest.approx(2e9 + 4e9)


def test_the_replicas_of_a_cpu_have_cores_and_memory_of_their_own() -> None:
    def alone(core: int) -> frozenset[int]:
        return frozenset({core})

    def paired(core: int) -> frozenset[int]:
        return frozenset({core % 4, core % 4 + 4})

    assert worker_cores([0, 1], 2, alone) == "0|1"
    assert worker_cores(range(8), 2, paired) == "0,1|2,3"
    assert worker_cores([0, 4], 2, paired) == "0|4"  # better than no core at all
    assert worker_cores([0, 1, 2, 3, 4], 2, alone) == "0,1|2,3"
    assert worker_cores([0], 2, alone) == "nobind"
    many = {"gpu": "cpu", "max_num_seqs": 256, "max_model_len": 1024}
    sizes = {"num_hidden_layers": 30, "num_attention_heads": 9, "hidden_size": 576}
    gib = 1 << 30
    assert kv_cache_bytes(deployment(**many), sizes, 64 * gib) == gib
    assert kv_cache_bytes(deployment(**many, replicas=2), sizes, 64 * gib) == gib // 2


def test_the_doctor_checks_the_vllm_of_a_kind_with_replicas() -> None:
    on_nodes = [(deployment(replicas=2), 1)]
    for version, status in (("0.10.1.1", Status.FAIL), ("0.32.0", Status.OK)):
        environment = Environment((3, 12, 0), {"vllm": version})
        (found,) = check_start("a100-40gb", environment, on_nodes, "kinds.yaml")
        assert found.status is status
    assert found.found == "vLLM 0.32.0 can start several replicas"


def test_a_vllm_without_replicas_is_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    (tmp_path / "lib/python3.12/site-packages/vllm-0.10.1.1.dist-info").mkdir(parents=True)
    site = {"nodes": 1, "python": str(tmp_path / "bin/python")}
    trial = parse_study(study(replicas=2)).trials[0]
    with pytest.raises(ConfigError, match=r"has 2 replicas, but vLLM 0\.10\.1\.1"):
        check_servable("a", {"spec": trial.spec_json}, {}, site)


@pytest.mark.parametrize(
    ("keys", "hardware"),
    [
        ({"gpu": "cpu", "gpu_count": 0, "replicas": 2}, "CPU in 2 replicas"),
        ({"gpu": "h100", "gpu_count": 4, "replicas": 2}, "4 × H100 in 2 replicas"),
        ({"gpu": "h100", "gpu_count": 4, "replicas": 1}, "4 × H100"),
        ({"gpu": "h100", "gpu_count": 4, "replicas": None}, "4 × H100"),
    ],
)
def test_titles_say_how_many_replicas_there_are(keys: dict[str, Any], hardware: str) -> None:
    row = {"model": "m", "quantization": "q", "engine": "vllm", "engine_version": None} | keys
    assert deployment_title(pd.DataFrame([row])) == f"m · q · {hardware} · vLLM"
