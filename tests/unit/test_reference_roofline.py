"""The roofline, calculated by hand with round numbers, and compared with published figures."""

from dataclasses import replace
from pathlib import Path

import pytest

from servegrid.analysis.efficiency import find_hardware
from servegrid.errors import ConfigError
from servegrid.reference import data
from servegrid.reference.roofline import (
    Hardware,
    ModelShape,
    burst_bound,
    deployment_hardware,
    latency_bound,
    model_shape,
)
from servegrid.study.config import load_study
from servegrid.study.grid import Deployment

ROOT = Path(__file__).parents[2]
MISTRAL = load_study(ROOT / "config/rehearsal.yaml").deployments[0]

# 10 GB of weights at 1 TB/s take 10 ms per step. 5e9 parameters are 1e10 FLOP per token: 1 ms.
DENSE = ModelShape(5e9, 5e9, 0, 1, 1, kv_bytes_per_token=1e6, weight_bytes=10e9)
GPU = Hardware(bandwidth=1e12, flops=1e13)
# 2e9 shared parameters and eight experts of 1e9; a token uses two: 10e9 in total, 4e9 active.
# 1 byte per parameter.
SPARSE = ModelShape(10e9, 4e9, 0, 8, 2, kv_bytes_per_token=0, weight_bytes=10e9)


def test_one_short_request_is_limited_by_reading_the_weights() -> None:
    times = latency_bound(DENSE, GPU, concurrency=1, input_len=5)
    assert times.ttft_s == pytest.approx(0.010)  # the arithmetic takes less: 5 tokens × 1 ms
    assert times.itl_s == pytest.approx(0.010 + 5 * 1e6 / 1e12)
    assert times.e2el_s(100) == pytest.approx(0.010 + 99 * 0.010005)


def test_many_requests_are_limited_by_arithmetic() -> None:
    times = latency_bound(DENSE, GPU, concurrency=100, input_len=10)
    assert times.ttft_s == pytest.approx(1000 * 1e-3)
    assert times.itl_s == pytest.approx(100 * 1e-3)  # reading: 10 ms + 1 ms of KV cache


def test_a_long_context_is_limited_by_reading_the_kv_cache() -> None:
    # 8 requests × 2000 tokens × 1 MB = 16 GB, plus 10 GB of weights
    assert latency_bound(DENSE, GPU, 8, 2000).itl_s == pytest.approx(0.026)


@pytest.mark.parametrize(
    ("tokens", "gigabytes"),
    [
        (1, 2 + 2),  # the shared part and two experts
        (2, 2 + 8 * (1 - 0.75**2)),  # both tokens miss an expert with probability 0.75²
        (1000, 10),
    ],
)
def test_a_mixture_of_experts_reads_the_experts_that_the_tokens_use(
    tokens: int, gigabytes: float
) -> None:
    assert SPARSE.read_bytes(tokens) == pytest.approx(gigabytes * 1e9)


def test_the_bound_of_a_burst_by_hand() -> None:
    # Reading: 10 steps × 10 GB, and 9 × 5 tokens × 1 MB of KV cache.
    assert burst_bound(DENSE, GPU, 1, 5, 10) == pytest.approx(0.1 + 0.000045)
    # Arithmetic: 100 × (10 + 9) tokens × 1 ms.
    assert burst_bound(DENSE, GPU, 100, 10, 10) == pytest.approx(1.9)
    # All tokens can use the same two experts: 4 GB per step, however many there are.
    assert burst_bound(SPARSE, Hardware(1e12, 1e30), 1000, 10, 10) == pytest.approx(0.04)
    # An embedding of 1e9 parameters is not read (2 GB less). 1 × 3 tokens use 3e9 parameters each
    # in the layers; the output layer's 1e9 count for two output tokens.
    shape = ModelShape(5e9, 5e9, 1e9, 1, 1, kv_bytes_per_token=0, weight_bytes=10e9)
    assert burst_bound(shape, Hardware(1e12, 1e30), 1, 2, 2) == pytest.approx(0.016)
    assert burst_bound(shape, Hardware(1e30, 1e12), 1, 2, 2) == pytest.approx(0.018 + 0.004)


@pytest.mark.parametrize("key", ["speculative_config", "speculative-config", "speculative.types"])
def test_there_is_no_bound_with_speculative_decoding(key: str) -> None:
    """A step may give several tokens for one read of the weights."""
    assert find_hardware(MISTRAL) is not None
    assert find_hardware(replace(MISTRAL, engine_args={key: {"method": "ngram"}})) is None
    assert find_hardware(replace(MISTRAL, engine_args={key: None})) is not None


def test_no_published_cell_is_faster_than_its_bound() -> None:
    published = data.published_cells("inria-2024")
    checked = 0
    for deployment in load_study(ROOT / "config/inria-2024.yaml").deployments:
        cells = published[
            (published["model"] == deployment.model)
            & (published["quantization"] == deployment.quantization)
        ].dropna()
        assert len(cells) > 40
        for row in cells.to_dict("records"):
            least = burst_bound(
                model_shape(deployment),
                deployment_hardware(deployment),
                row["concurrency"],
                row["input_len"],
                100,
            )
            # The table has one decimal, so 1.8 can mean 1.75.
            assert row["seconds_per_100_tokens"] - 0.05 > least, (deployment.name, row)
            checked += 1
    assert checked == 365


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model": "gpt-5"}, "model `gpt-5`"), ({"quantization": "int3"}, "`int3`")],
)
def test_unknown_models_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_shape(Deployment(**(vars(MISTRAL) | change)))


def test_unknown_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpu `tpu` is not known\. Use one of v100-16gb"):
        deployment_hardware(Deployment(**(vars(MISTRAL) | {"gpu": "tpu"})))
