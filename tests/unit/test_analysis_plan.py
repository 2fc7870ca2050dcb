"""`servegrid plan`: memory, outlooks, times and costs, calculated by hand."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from servegrid.analysis import feasibility
from servegrid.analysis.capacity import HardwarePrices
from servegrid.analysis.feasibility import CANNOT, FITS, QUEUES, UNKNOWN, deployment_problem
from servegrid.analysis.plan import (
    CELL_OVERHEAD_S,
    Range,
    Site,
    StudyPlan,
    charged_gpus,
    plan_study,
    run_time,
    start_time,
)
from servegrid.analysis.predictor import load_calibration
from servegrid.analysis.published_tables import published_deployments
from servegrid.analysis.slo import Slo
from servegrid.errors import ConfigError
from servegrid.reference import data
from servegrid.reference.checkpoint import ModelFacts, find_model
from servegrid.reference.memory import find_device, place
from servegrid.reference.roofline import estimate_weight_bytes, model_shape
from servegrid.report.plan_report import plan_json, render_plan
from servegrid.study.config import load_study, parse_study
from servegrid.study.deployment import Deployment
from servegrid.study.grid import Study, Workload

ROOT = Path(__file__).parents[2]
GIB = 2**30
ARTICLE = load_study(ROOT / "config/inria-2024.yaml")
PUBLISHED = published_deployments()
MISTRAL, CODESTRAL_AWQ, CODESTRAL_GPTQ, _, MIXTRAL, LARGE_MIXTRAL, LLAMA = PUBLISHED
NOWHERE = Path("/nonexistent")


def plan(study: Study, **keys: Any) -> StudyPlan:
    facts = {each.name: find_model(each, NOWHERE) for each in study.deployments}
    return plan_study(study, facts, load_calibration(), **keys)


def problem(deployment: Deployment, config: dict[str, Any] | None = None) -> str | None:
    device = find_device(deployment.gpu)
    placement = place(deployment, model_shape(deployment), device)
    return deployment_problem(deployment, placement, device, config or {})


@pytest.mark.parametrize(
    ("deployment", "weights_gb", "kv_tokens"),
    [
        # Weights as published, in GB. The KV cache by hand: GPUs × (0.9 × GiB × 2³⁰ - 1.5e9) -
        # weights, / (layers × 2 × KV heads × 128 × 2 bytes).
        (MISTRAL, 14.5, (2 * (0.9 * 16 * GIB - 1.5e9) - 14.5e9) / (32 * 2 * 8 * 128 * 2)),
        (CODESTRAL_AWQ, 12.2, (0.9 * 40 * GIB - 1.5e9 - 12.2e9) / (56 * 2 * 8 * 128 * 2)),
        (CODESTRAL_GPTQ, 23.2, (2 * (0.9 * 16 * GIB - 1.5e9) - 23.2e9) / (56 * 2 * 8 * 128 * 2)),
        (PUBLISHED[3], 44.5, (2 * (0.9 * 40 * GIB - 1.5e9) - 44.5e9) / (56 * 2 * 8 * 128 * 2)),
        (MIXTRAL, 24.7, (2 * (0.9 * 40 * GIB - 1.5e9) - 24.7e9) / (32 * 2 * 8 * 128 * 2)),
        (LARGE_MIXTRAL, 73.6, (4 * (0.9 * 40 * GIB - 1.5e9) - 73.6e9) / (56 * 2 * 8 * 128 * 2)),
        (LLAMA, 39.8, (2 * (0.9 * 40 * GIB - 1.5e9) - 39.8e9) / (80 * 2 * 8 * 128 * 2)),
    ],
    ids=lambda value: value.name if isinstance(value, Deployment) else "",
)
def test_weights_and_kv_cache_of_the_published_deployments(
    deployment: Deployment, weights_gb: float, kv_tokens: float
) -> None:
    placement = place(deployment, model_shape(deployment), find_device(deployment.gpu))
    assert placement.weights * deployment.gpu_count / 1e9 == pytest.approx(weights_gb, rel=0.05)
    assert placement.capacity_tokens(4096) == pytest.approx(kv_tokens, rel=0.05)


def test_weights_from_bits_are_within_5_percent_of_the_published_sizes() -> None:
    checked = 0
    for name, row in data.models().iterrows():
        for quantization in ("fp16", "awq-4bit", "gptq-8bit"):
            if row[quantization] == row[quantization]:
                tables = row["params_b"] * 1e9, row["embedding_params_b"] * 1e9, bool(row["tied"])
                size = estimate_weight_bytes(*tables, quantization)
                assert size / 1e9 == pytest.approx(row[quantization], rel=0.05), name
                checked += 1
    assert checked == 15


def test_rows_of_models_agree_with_their_kv_heads() -> None:
    """128 dimensions per head, except where config.json says otherwise; latent attention: 576."""
    dims = {"smollm2-135m-instruct": 64, "gpt-oss-120b": 64}
    for name, row in data.models().iterrows():
        numbers = 2 * row["kv_heads"] * dims.get(str(name), 128)
        numbers = 576 if name == "deepseek-v3" else numbers
        assert row["kv_kib_per_token"] * 1024 == row["layers"] * numbers * 2, name


def test_parallelism_and_the_kv_cache_by_hand() -> None:
    shape, device = model_shape(MISTRAL), find_device("a100-40gb")
    sixteen = replace(MISTRAL, gpu="a100-40gb", gpu_count=16)
    # 8 KV heads on 16 GPUs: each is stored twice, so a GPU holds 1/8 of a sequence.
    assert place(sixteen, shape, device).kv_share == 1 / 8
    copies = replace(sixteen, engine_args={"data_parallel_size": 4, "pipeline_parallel_size": 2})
    placed = place(copies, shape, device)  # 2 GPUs of tensor × 2 of pipeline parallelism
    assert (placed.weights, placed.copies, placed.kv_share) == (14.5e9 / 4, 4, 1 / 4)
    small = replace(MISTRAL, engine_args={"num_gpu_blocks_override": 24, "block_size": 16})
    assert place(small, shape, device).capacity_tokens(384) == pytest.approx(24 * 16)
    half = replace(MISTRAL, engine_args={"kv_cache_dtype": "fp8"})
    assert model_shape(half).kv_bytes_per_token == model_shape(MISTRAL).kv_bytes_per_token / 2


def test_sliding_layers_keep_only_their_window() -> None:
    """Gemma 3 27B: 52 of 62 layers keep 1024 tokens of 8192 bytes each."""
    gemma = model_shape(replace(MISTRAL, model="gemma-3-27b", quantization="bf16"))
    per_layer = 2 * 16 * 128 * 2
    assert gemma.kv_cache_bytes(1000) == pytest.approx(62 * 1000 * per_layer)
    assert gemma.kv_cache_bytes(8000) == pytest.approx((10 * 8000 + 52 * 1024) * per_layer)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"quantization": "awq-4bit"}, {}, "`awq-4bit` needs compute capability 7.5"),
        ({"quantization": "bf16"}, {}, "`bf16` needs compute capability 8.0"),
        ({"engine_args": {"dtype": "bfloat16"}}, {}, "dtype bfloat16 needs"),
        ({"engine_args": {"kv_cache_dtype": "fp8_e4m3"}}, {}, "kv_cache_dtype fp8 needs"),
        ({}, {"quantization_config": {"quant_method": "awq"}}, "checkpoint's quantization `awq`"),
        ({"gpu_count": 3}, {}, "32 attention heads cannot be split over 3"),
        ({"max_model_len": 40_000}, {}, "more than the model's context of 32768"),
        ({"gpu_count": 1}, {}, "one request of max_model_len 4096 needs 0.50 GiB"),
        (
            {"model": "llama-3-70b", "max_model_len": 8192},
            {},
            r"weights of 65\.7 GiB per GPU are more than the usable 14\.4 GiB",
        ),
    ],
)
def test_what_cannot_work_on_a_v100_and_why(
    change: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    found = problem(replace(MISTRAL, **change), config)
    assert found is not None and re.search(message, found), found


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"gpu": "a100-40gb", "quantization": "awq-4bit"},
        {"gpu": "a100-40gb", "engine_args": {"dtype": "bfloat16"}},
        {"gpu": "mi300x-192gb", "quantization": "fp8"},  # its capability is not NVIDIA's
        {"engine_args": {"hf_overrides": {"rope": 1}}, "max_model_len": 40_000},
        {"gpu_count": 1, "engine_args": {"cpu_offload_gb": 10}},
        {"engine": "emulated", "quantization": "awq-4bit"},
    ],
)
def test_what_may_work_is_not_called_impossible(change: dict[str, Any]) -> None:
    assert problem(replace(MISTRAL, **change)) is None


def test_the_articles_study() -> None:
    made = plan(ARTICLE)
    assert (made.trials, made.measured) == (392 + 21, 0)
    mistral = made.deployments[0]
    assert mistral.problem is None and not mistral.labels
    by_name = {cell.workload.cell: cell for cell in mistral.cells}
    queued = by_name["burst-c128-i2193-o100"]
    # (0.9 × 16 GiB - 1.5e9 - 7.25e9) / 65536 bytes per token = 102,413 tokens: 44 × 2293.
    assert queued.outlook.status == QUEUES and "44 run at once" in str(queued.outlook.why)
    assert by_name["burst-c32-i2193-o100"].outlook.status == FITS
    for deployment in made.deployments:
        for cell in deployment.cells:
            assert cell.bound_s is not None and cell.expected_s is not None
            assert cell.bound_s < cell.expected_s.value
            assert cell.expected_s.low < cell.expected_s.value < cell.expected_s.high
        assert len(deployment.teach) == len(set(deployment.teach)) == 8


def study(workload: dict[str, Any], **entry: Any) -> Study:
    deployment = {
        "model": "mistral-7b",
        "checkpoint": "/nonexistent/mistral",
        "tokenizer": "/nonexistent/mistral",
        "quantization": "fp16",
        "engine": "vllm",
        "gpu": "a100-40gb",
        "max_model_len": 4096,
    }
    return parse_study(
        {
            "study": "s",
            "workload": {"input_len": 100, "concurrency": 4, **workload},
            "deployments": [deployment | entry],
        }
    )


def test_time_of_a_trial_by_hand() -> None:
    """A response takes 10 s (8 to 13)."""
    response, base = Range(10, 8, 13), Workload("burst", 4, 100, 100, requests=12)
    spent = run_time(base, response)  # 3 waves and a warm-up
    assert spent.value == pytest.approx(40 + CELL_OVERHEAD_S)
    assert (spent.low, spent.high) == pytest.approx((32 + CELL_OVERHEAD_S, 52 + CELL_OVERHEAD_S))
    users = replace(base, protocol="closed_loop", requests=32, think_time_s=2.0, warmup_waves=0)
    assert run_time(users, response).value == pytest.approx(8 * 12 + CELL_OVERHEAD_S)
    timed = replace(users, requests=None, duration_s=60.0)
    assert run_time(timed, response).value == pytest.approx(70 + CELL_OVERHEAD_S)
    opened = Workload("poisson", None, 100, 100, requests=2000, request_rate=5.0, warmup_waves=0)
    assert run_time(opened, response).value == pytest.approx(400 + 10 + CELL_OVERHEAD_S)


def test_hours_energy_and_cost_by_hand() -> None:
    two = study({"trials": 2, "bring_ups": 2}, gpu_count=2)
    (deployment,) = plan(two).deployments
    (cell,) = deployment.cells
    assert cell.run_s is not None and cell.expected_s is not None
    assert cell.run_s.value == pytest.approx(2 * cell.expected_s.value + CELL_OVERHEAD_S)
    first, second = deployment.allocations
    assert first.seconds is not None and second.seconds is not None
    assert first.seconds.value == pytest.approx(60 + 14.5 + 2 * cell.run_s.value)
    hours = deployment.gpu_hours
    assert hours is not None
    assert hours.value == pytest.approx(2 * (first.seconds.value + second.seconds.value) / 3600)
    energy = deployment.energy_kwh
    assert energy is not None and energy.value == pytest.approx(0.7 * 0.25 * hours.value)  # 250 W
    prices = HardwarePrices("EUR", {"a100-40gb": 8766.0}, 0.5, 4.0)  # 0.25 per hour
    cost = deployment.cost(prices)
    assert cost is not None
    assert cost.value == pytest.approx(0.5 * energy.value + 0.25 * hours.value)
    assert deployment.cost(replace(prices, prices={})) is None


def test_a_node_that_is_taken_whole_counts_with_all_its_gpus() -> None:
    whole = Site(gpus_of_node={"a100-40gb": 4})
    assert charged_gpus(replace(MISTRAL, gpu="a100-40gb", gpu_count=2), whole) == 4
    assert charged_gpus(replace(MISTRAL, gpu="a100-40gb", gpu_count=6), whole) == 8
    assert charged_gpus(replace(MISTRAL, gpu="v100-16gb", gpu_count=2), whole) == 2


def test_starts_of_engines() -> None:
    shape = model_shape(MISTRAL)
    assert start_time(MISTRAL, shape) == Range(74.5, 37.25, 149.0)
    assert start_time(replace(MISTRAL, engine="external"), shape).value == 0
    emulated = replace(MISTRAL, engine="emulated", engine_args={"startup_s": 2})
    assert start_time(emulated, shape) == Range(2, 2, 2)


def test_measured_trials_will_not_run() -> None:
    grid = study({"concurrency": [1, 2, 4]})
    done = frozenset(trial.id for trial in grid.trials[:2])
    all_open, rest = plan(grid), plan(grid, measured=done)
    assert [cell.missing for cell in rest.deployments[0].cells] == [0, 0, 1]
    assert rest.measured == 2 and rest.deployments[0].teach == ("burst-c4-i100-o100",)
    before, after = (each.deployments[0].gpu_hours for each in (all_open, rest))
    assert before is not None and after is not None and after.value < before.value
    everything = plan(grid, measured=frozenset(trial.id for trial in grid.trials))
    assert everything.deployments[0].allocations == ()  # no engine is started


def test_an_emulated_engine_is_as_much_faster_as_its_scale_says() -> None:
    arguments = {"timing": "roofline", "time_scale": 0.01, "slowdown": 2.0}
    fast = plan(study({}, engine="emulated", engine_args=arguments)).deployments[0].cells[0]
    real = plan(study({})).deployments[0].cells[0]
    assert fast.expected_s is not None and real.expected_s is not None
    assert fast.expected_s.value == pytest.approx(0.02 * real.expected_s.value)


def test_an_open_loop_above_what_is_completed_queues() -> None:
    loops = study({"protocol": "poisson", "request_rate": [0.1, 1000.0]}, max_num_seqs=8)
    slow, fast = plan(loops).deployments[0].cells
    assert slow.outlook.status == FITS
    assert fast.outlook.status == QUEUES and "1000 requests/s arrive" in str(fast.outlook.why)


def test_an_emulated_open_loop_has_the_requests_in_flight_of_real_time() -> None:
    """All times × 0.01: 1000 requests/s are to it what 10 requests/s are to the hardware."""
    real = plan(study({"protocol": "poisson", "request_rate": 10.0})).deployments[0].cells[0]
    fast = plan(
        study(
            {"protocol": "poisson", "request_rate": 1000.0},
            engine="emulated",
            engine_args={"timing": "roofline", "time_scale": 0.01},
        )
    )
    found = fast.deployments[0].cells[0].expected_s
    assert found is not None and real.expected_s is not None
    assert found.value == pytest.approx(0.01 * real.expected_s.value)
    alone = plan(study({"concurrency": 1})).deployments[0].cells[0].expected_s
    assert alone is not None and real.expected_s.value > 1.05 * alone.value  # several in flight


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_users_who_think_are_not_in_flight(scale: float) -> None:
    """With 4 in flight, 4 / T(4) requests/s are complete. Then 4 / T(4) × Z users think: 60 - 4."""
    engine: dict[str, Any] = {"max_num_seqs": 64}
    if scale != 1:
        engine |= {"engine": "emulated"}
        engine |= {"engine_args": {"timing": "roofline", "time_scale": scale}}
    four = plan(study({"concurrency": 4}, **engine)).deployments[0].cells[0].expected_s
    assert four is not None
    # A response has 100 tokens, so T(4) is the time per 100 tokens.
    thinking = {"protocol": "closed_loop", "concurrency": 60, "requests_per_user": 5}
    cells = (
        plan(study({**thinking, "think_time_s": 14 * four.value}, **engine)).deployments[0].cells
    )
    found = cells[0].expected_s
    assert found is not None and found.value == pytest.approx(four.value, rel=1e-3)


def test_the_rates_of_a_sweep_are_shown_with_three_digits() -> None:
    """A fraction of a predicted rate has many; the plan of a sweep had 5.33169 requests/s."""
    swept = study({"protocol": "poisson", "request_rate": "sweep"}, max_num_seqs=8)
    cells = plan(swept).deployments[0].cells
    above = next(each for each in cells if each.workload.rate_fraction == 1.3)
    sentence = re.fullmatch(
        r"([\d.]+) requests/s arrive, and about (\S+) are completed", above.outlook.why or ""
    )
    assert sentence is not None and len(sentence[1].replace(".", "").strip("0")) <= 3


def test_more_requests_than_max_num_seqs_queue() -> None:
    (cell,) = plan(study({"concurrency": 9}, max_num_seqs=8)).deployments[0].cells
    assert cell.outlook == (QUEUES, "9 requests, and max_num_seqs lets 8 run")


def test_a_burst_that_no_engine_can_finish_in_time_cannot_work() -> None:
    (cell,) = plan(study({"timeout_s": 0.5})).deployments[0].cells
    # 100 times 14.2 GB at 1555 GB/s are 0.9 s.
    assert cell.outlook.status == CANNOT and "less than 1 s" in str(cell.outlook.why)


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"gpu": "tpu"}, "gpu `tpu`"), ({"model": "new"}, "model `new`")],
)
def test_what_no_table_has_is_said_and_not_guessed(entry: dict[str, Any], message: str) -> None:
    made = plan(study({}, **entry))
    (deployment,) = made.deployments
    assert message in str(deployment.unknown)
    assert deployment.cells[0].outlook.status == UNKNOWN
    assert deployment.gpu_hours is None and deployment.kv_tokens is None
    prices = HardwarePrices("USD", {})
    assert "not predicted" in render_plan(made, prices, False)
    assert json.loads(plan_json(made, prices))["deployments"][0]["gpu_hours"] is None


def test_a_search_counts_the_cells_that_prove_its_frontier_once() -> None:
    """All cells have 0.1 tokens/s per user, so the heaviest proves it; none has 100,000."""
    searched = study({"concurrency": [1, 2], "input_len": [31, 119], "grid": "frontier"})
    assert len(searched.trials) == 12
    for rate, wanted in ((0.1, "burst-c2-i119-o100"), (1e5, "burst-c1-i31-o100")):
        made = plan(searched, slo=Slo(tokens_per_s_per_user=rate))
        (deployment,) = made.deployments
        assert deployment.search == {wanted}
        (allocation,) = deployment.allocations
        (cell,) = (each for each in deployment.cells if each.workload.cell == wanted)
        assert allocation.trials == 1
        assert allocation.seconds is not None and cell.run_s is not None
        assert allocation.seconds.high == pytest.approx(2 * (60 + 14.5) + cell.run_s.high)
        text = render_plan(made, HardwarePrices("USD", {}), False)
        assert "the search will measure about 1 of 4 cells" in text
        parsed = json.loads(plan_json(made, HardwarePrices("USD", {})))
        assert parsed["deployments"][0]["cells_that_the_search_takes"] == [wanted]


def test_a_wrong_number_names_deployment_and_key() -> None:
    with pytest.raises(ConfigError, match=r"engine_args\.gpu_memory_utilization: 'much' is not a"):
        plan(study({}, engine_args={"gpu_memory_utilization": "much"}))


def test_text_and_json_have_the_same_figures() -> None:
    made, prices = plan(ARTICLE), HardwarePrices("USD", {}, 0.2, 4.0)
    text, parsed = render_plan(made, prices, True), json.loads(plan_json(made, prices))
    assert "Study inria-2024: 7 deployments, 392 cells, 413 measurements, 0 of them done." in text
    first = parsed["deployments"][0]
    cell = next(each for each in first["cells"] if each["cell"] == "burst-c128-i2193-o100")
    assert cell["outlook"] == "will queue" and cell["why"] in text
    assert f"{cell['expected_s_per_100_tokens']['value']:.3g}" in text
    assert len(parsed["deployments"]) == 7
    assert first["memory"]["kv_bytes_per_token"] == 131072


@pytest.mark.slow
def test_a_plan_of_10000_cells_is_quick() -> None:
    """In CPU time, because other tests may run beside it. Wanted: 20 s with the imports."""
    large = study({"concurrency": list(range(1, 101)), "input_len": list(range(1, 101))})
    assert len(large.trials) == 10_000
    started = time.process_time()
    made = plan(large)
    plan_json(made, HardwarePrices("USD", {}))
    assert time.process_time() - started < 18


def test_a_checkpoint_that_is_here_is_read(tmp_path: Path) -> None:
    """By hand: attention 2 × 64 × 16 × (4 + 2), three matrices of 64 × 256, 2 layers, and an
    embedding of 1000 × 64, twice: 2 × (12288 + 49152) + 128000 = 250880 parameters."""
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 256,
        "vocab_size": 1000,
        "max_position_embeddings": 512,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 5000)
    here = replace(MISTRAL, model="mine", checkpoint=str(tmp_path))
    found = find_model(here, NOWHERE)
    assert found.source == str(tmp_path) and found.shape is not None
    assert (found.shape.params, found.shape.weight_bytes) == (250880, 5000)
    assert found.shape.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert found.shape.max_context == 512
    wide = replace(here, engine_args={"dtype": "float32"})
    assert (shape := find_model(wide, NOWHERE).shape) is not None
    assert (shape.weight_bytes, shape.kv_bytes_per_token) == (10000, 512)
    too_long = replace(here, max_model_len=1024)
    device = find_device("v100-16gb")
    placed = place(too_long, found.shape, device)
    message = feasibility.deployment_problem(too_long, placed, device, found.config)
    assert message is not None and "context of 512" in message


def test_shapes_of_sparse_latent_and_sliding_models() -> None:
    """DeepSeek-V3 has 671e9 parameters, 37e9 active, and 576 numbers per token and layer."""
    from servegrid.reference.checkpoint import shape_from_config

    deepseek = {
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "vocab_size": 129280,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    shape = shape_from_config(deepseek, 1.0)
    assert shape is not None
    assert shape.params == pytest.approx(671e9, rel=0.005)
    assert shape.active_params == pytest.approx(37.6e9, rel=0.02)
    assert (shape.kv_bytes_per_token, shape.kv_heads) == (61 * 576 * 2, 1)
    mixtral = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    shape = shape_from_config(mixtral, 1.0)
    assert shape is not None and shape.params == pytest.approx(46.7e9, rel=0.005)
    assert shape.active_params == pytest.approx(12.9e9, rel=0.005) and shape.sliding_layers == 0
    layers = ["sliding_attention", "full_attention"] * 16
    sliding = {**mixtral, "sliding_window": 128, "layer_types": layers}
    shape = shape_from_config(sliding, 1.0)
    assert shape is not None and (shape.sliding_window, shape.sliding_layers) == (128, 16)
    assert shape_from_config({"hidden_size": 4096}, 1.0) is None


def test_facts_name_their_source() -> None:
    assert find_model(MISTRAL, NOWHERE) == ModelFacts(model_shape(MISTRAL), "the table of models")
