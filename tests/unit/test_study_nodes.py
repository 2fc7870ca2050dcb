"""What a deployment can be on several nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers.deployments import EMULATED_ENTRY, SMALL_VLLM
from servegrid.errors import ConfigError
from servegrid.study.deployment import Deployment, parse_deployment
from servegrid.study.nodes import (
    nodes_problem,
    site_problem,
    version_problem,
    workers_per_node,
)


def on_gpus(count: int, engine: str = "vllm", **engine_args: Any) -> Deployment:
    return replace(SMALL_VLLM, gpu="a100", gpu_count=count, engine=engine, engine_args=engine_args)


@pytest.mark.parametrize(
    ("deployment", "nodes", "each"),
    [
        (on_gpus(4), 2, 2),
        (on_gpus(8), 2, 4),
        (on_gpus(8, pipeline_parallel_size=2), 4, 2),
        (replace(SMALL_VLLM, engine_args={"tensor_parallel_size": 2}), 2, 1),
    ],
)
def test_workers_are_divided_evenly(deployment: Deployment, nodes: int, each: int) -> None:
    assert nodes_problem(deployment, nodes) is None
    assert workers_per_node(deployment, nodes) == each


@pytest.mark.parametrize(
    ("deployment", "nodes", "words"),
    [
        (on_gpus(3), 2, "its 3 workers cannot be divided evenly among 2 nodes"),
        (SMALL_VLLM, 2, "its 1 workers cannot be divided evenly among 2 nodes"),
        (on_gpus(4, data_parallel_size=2), 2, "(`replicas`, data parallelism) on one node only"),
        (on_gpus(4, prefill_context_parallel_size=2), 2, "not prefill context parallelism"),
        (on_gpus(4, "llamacpp"), 2, "starts llamacpp on one node only"),
        (on_gpus(0, "external"), 2, "starts external on one node only"),
        (on_gpus(4, distributed_executor_backend="ray"), 2, "supports only `mp`, not `ray`"),
    ],
)
def test_what_cannot_run_on_several_nodes_runs_on_one(
    deployment: Deployment, nodes: int, words: str
) -> None:
    assert words in str(nodes_problem(deployment, nodes))
    assert nodes_problem(deployment, 1) is None


def test_an_emulated_engine_runs_anywhere() -> None:
    assert nodes_problem(on_gpus(3, "emulated"), 2) is None
    assert version_problem(on_gpus(4, "emulated"), 2, "0.10.1.1") is None


@pytest.mark.parametrize(
    ("version", "refused"),
    [("0.10.1.1", True), ("0.11.2", True), ("0.12.0", False), ("0.32.0+cpu", False), (None, False)],
)
def test_old_versions_of_vllm_are_refused(version: str | None, refused: bool) -> None:
    problem = version_problem(on_gpus(4), 2, version)
    assert bool(problem) is refused
    assert version_problem(on_gpus(4), 1, version) is None


def test_a_demanded_network_is_a_part_of_the_specification() -> None:
    entry = EMULATED_ENTRY | {"network": "infiniband"}
    deployment = parse_deployment(entry, "deployments[0]")
    assert deployment.spec["network"] == "infiniband"
    assert Deployment.from_spec(deployment.spec) == deployment
    # Deployments that demand nothing keep their specification, and so their results.
    plain = parse_deployment(EMULATED_ENTRY, "deployments[0]")
    assert "network" not in plain.spec
    assert Deployment.from_spec(plain.spec) == plain


@pytest.mark.parametrize("changes", [{"gpu": "cpu", "gpu_count": 0}, {"engine": "llamacpp"}])
def test_only_an_engine_that_can_use_infiniband_can_be_held_to_it(changes: dict[str, Any]) -> None:
    entry = EMULATED_ENTRY | {"network": "infiniband"} | changes
    with pytest.raises(ConfigError, match=r"deployments\[0\]\.network: only vLLM on GPUs"):
        parse_deployment(entry, "deployments[0]")


PLACE = "kinds.yaml: a100"
TWO_GPUS = {"gpus_of_node": 2, "interface": "ib0"}


@pytest.mark.parametrize(
    ("deployment", "nodes", "kind", "vllm", "words"),
    [
        (on_gpus(4), 1, TWO_GPUS | {"nodes": 1}, None, ".nodes: 1 × gpus_of_node 2 is less than"),
        (on_gpus(4), 2, {"gpus_of_node": 2}, None, "Set `interface`"),
        (on_gpus(4), 2, TWO_GPUS, "0.10.1.1", "another environment (`python` of the kind)"),
        (on_gpus(3), 2, TWO_GPUS, None, "its 3 workers cannot be divided evenly"),
    ],
)
def test_a_site_that_cannot_run_a_deployment_is_named_with_file_key_and_remedy(
    deployment: Deployment, nodes: int, kind: dict[str, Any], vllm: str | None, words: str
) -> None:
    problem = site_problem(deployment, nodes, kind, PLACE, vllm)
    assert problem and PLACE in problem and words in problem and deployment.name in problem


@pytest.mark.parametrize(
    ("deployment", "nodes", "kind"),
    [
        (on_gpus(4), 2, TWO_GPUS),
        (on_gpus(4), 1, {}),  # the site does not say how many GPUs a node has
        (on_gpus(4, "emulated"), 2, {"gpus_of_node": 2}),  # starts nothing on the other node
        (SMALL_VLLM, 1, {}),
    ],
)
def test_a_site_that_can_has_no_problem(
    deployment: Deployment, nodes: int, kind: dict[str, Any]
) -> None:
    assert site_problem(deployment, nodes, kind, PLACE, "0.32.0") is None
