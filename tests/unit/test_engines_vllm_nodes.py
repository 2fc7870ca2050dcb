"""What vLLM gets on each of several nodes."""

from __future__ import annotations

from servegrid.engines.vllm_nodes import node_arguments, node_environment, visible_devices


def test_the_arguments_differ_in_the_rank_only() -> None:
    first, second = (node_arguments(rank, 2, "10.7.0.1", 29500) for rank in (0, 1))
    assert first == [
        *("--nnodes", "2", "--node-rank", "0"),
        *("--master-addr", "10.7.0.1", "--master-port", "29500"),
        *("--distributed-executor-backend", "mp"),
    ]
    assert second == [*first[:3], "1", *first[4:]]


def test_no_library_has_to_guess_the_network() -> None:
    # https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html: `=` matches exactly.
    assert node_environment("10.7.0.2", "ib0") == {
        "VLLM_HOST_IP": "10.7.0.2",
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "=ib0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def test_a_node_shows_as_many_gpus_as_it_has_workers() -> None:
    def visible(given: str | None, workers: int) -> str:
        environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
        return visible_devices(environment, workers)["CUDA_VISIBLE_DEVICES"]

    assert visible(None, 2) == "0,1"
    assert visible("2,3", 2) == "2,3"
    assert visible("GPU-b,GPU-a,GPU-c", 2) == "GPU-b,GPU-a"
