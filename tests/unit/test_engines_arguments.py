"""Deployments as vLLM's arguments, for versions of vLLM with more or fewer options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers.deployments import SMALL_VLLM
from servegrid.engines import arguments
from servegrid.errors import ConfigError
from servegrid.study.grid import Deployment

ON_CPU = SMALL_VLLM
ON_GPUS = replace(ON_CPU, name="small_fp16_vllm_2xv100", gpu="v100", gpu_count=2)

OPTIONS = {
    "--model",
    "--served-model-name",
    "--max-model-len",
    "--max-num-seqs",
    "--tensor-parallel-size",
    "-tp",
    "--seed",
    "--generation-config",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--shutdown-timeout",
    "--gpu-memory-utilization",
    "--dtype",
    "--enforce-eager",
    "--no-enforce-eager",
    "--kv-cache-memory-bytes",
    "--disable-log-stats",
    "--hf-overrides",
    "--middleware",
    "--max-num-batched-tokens",
    "--speculative-config",
    "--enable-lora",
    "--no-enable-lora",
    "--lora-modules",
    "--max-loras",
    "--max-lora-rank",
}
PARALLEL = {
    "--pipeline-parallel-size",
    "--data-parallel-size",
    "--prefill-context-parallel-size",
    "--decode-context-parallel-size",
    "--enable-expert-parallel",
}
LACKING = {"--shutdown-timeout", "--kv-cache-memory-bytes", "--generation-config"}


def rendered(
    deployment: Deployment, options: set[str] = OPTIONS, **more: Any
) -> dict[str, list[str]]:
    """The words of the command line, by flag."""
    deployment = replace(deployment, engine_args=more)
    defaults = arguments.default_arguments(deployment, "/models/small", 1 << 20)
    flags: dict[str, list[str]] = {}
    for word in arguments.format_arguments(deployment, defaults, options, "0.32.0"):
        if word.startswith("--"):
            flag = word
            assert flag not in flags
            flags[flag] = []
        else:
            flags[flag].append(word)
    return flags


COMMON = {
    "--model": ["/models/small"],
    "--served-model-name": ["small"],
    "--max-model-len": ["1024"],
    "--max-num-seqs": ["16"],
    "--seed": ["0"],
    "--generation-config": ["vllm"],
    "--no-enable-prefix-caching": [],
    "--shutdown-timeout": ["15"],
}


def test_a_cpu_deployment_uses_eager_mode_bfloat16_and_a_fixed_kv_cache() -> None:
    assert rendered(ON_CPU) == COMMON | {
        "--tensor-parallel-size": ["1"],
        "--dtype": ["bfloat16"],
        "--enforce-eager": [],
        "--kv-cache-memory-bytes": ["1048576"],
    }


def test_a_gpu_deployment_uses_tensor_parallelism_and_a_fraction_of_the_memory() -> None:
    assert rendered(ON_GPUS) == COMMON | {
        "--tensor-parallel-size": ["2"],
        "--gpu-memory-utilization": ["0.9"],
    }


@pytest.mark.parametrize(
    ("gpu_count", "engine_args", "tensor"),
    [
        (16, {"data_parallel_size": 4}, 4),
        (16, {"data-parallel-size": 4}, 4),
        (8, {"pipeline_parallel_size": 2}, 4),
        (16, {"pipeline_parallel_size": 2, "data_parallel_size": 4}, 2),
        (8, {"data_parallel_size": 8, "enable_expert_parallel": True}, 1),
        (8, {"enable_expert_parallel": True}, 8),
        (8, {"prefill_context_parallel_size": 2}, 4),
        (8, {"decode_context_parallel_size": 2}, 8),  # uses the GPUs of tensor parallel again
        (4, {"data_parallel_size": None}, 4),
    ],
)
def test_tensor_parallelism_uses_what_the_other_dimensions_leave(
    gpu_count: int, engine_args: dict[str, Any], tensor: int
) -> None:
    flags = rendered(replace(ON_GPUS, gpu_count=gpu_count), OPTIONS | PARALLEL, **engine_args)
    assert flags["--tensor-parallel-size"] == [str(tensor)]
    copies = next((value for key, value in engine_args.items() if key.startswith("data")), None)
    assert flags.get("--data-parallel-size") == (None if copies is None else [str(copies)])


def test_a_cpu_has_no_gpus_to_share() -> None:
    flags = rendered(ON_CPU, OPTIONS | PARALLEL, data_parallel_size=2)
    assert (flags["--tensor-parallel-size"], flags["--data-parallel-size"]) == (["1"], ["2"])


def test_defaults_that_an_older_vllm_lacks_are_left_out() -> None:
    assert LACKING & rendered(ON_CPU).keys() == LACKING
    assert LACKING & rendered(ON_CPU, OPTIONS - LACKING).keys() == set()


def test_engine_args_override_the_defaults() -> None:
    flags = rendered(ON_GPUS, enable_prefix_caching=True, gpu_memory_utilization=0.8, dtype="half")
    assert flags["--enable-prefix-caching"] == []
    assert "--no-enable-prefix-caching" not in flags
    assert flags["--gpu-memory-utilization"] == ["0.8"]
    assert flags["--dtype"] == ["half"]


def test_null_removes_a_default() -> None:
    assert "--gpu-memory-utilization" not in rendered(ON_GPUS, gpu_memory_utilization=None)


def test_mappings_become_json_and_lists_become_words() -> None:
    flags = rendered(
        ON_GPUS,
        hf_overrides={"b": 1, "a": [2]},
        middleware=["one", "two"],
        max_num_batched_tokens=2048,
        disable_log_stats=True,
    )
    assert flags["--hf-overrides"] == ['{"a": [2], "b": 1}']
    assert flags["--middleware"] == ["one", "two"]
    assert flags["--max-num-batched-tokens"] == ["2048"]
    assert flags["--disable-log-stats"] == []


def test_speculative_decoding_is_passed_as_json() -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    flags = rendered(ON_CPU, speculative_config=ngram)
    assert flags["--speculative-config"] == [
        '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}'
    ]


def test_false_becomes_the_negative_flag_or_nothing() -> None:
    assert "--disable-log-stats" not in rendered(ON_GPUS, disable_log_stats=False)
    assert "--no-enforce-eager" in rendered(ON_CPU, enforce_eager=False)


def test_an_unknown_argument_is_refused_with_similar_names() -> None:
    with pytest.raises(ConfigError) as caught:
        rendered(ON_GPUS, max_num_batched_tokns=1)
    message = str(caught.value)
    assert "`small_fp16_vllm_2xv100`: engine_args.max_num_batched_tokns" in message
    assert "vLLM 0.32.0 has no option --max-num-batched-tokns" in message
    assert "Did you mean `max_num_batched_tokens`" in message
    with pytest.raises(ConfigError, match=r"no option --zzz\. Remove it\."):
        rendered(ON_GPUS, zzz=1)


def test_a_file_of_arguments_is_refused_because_no_record_shows_it() -> None:
    with pytest.raises(ConfigError, match=r"engine_args\.config .* Write them into engine_args"):
        rendered(ON_GPUS, OPTIONS | {"--config"}, config="vllm.yaml")


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("max_model_len", "own key `max_model_len`"),
        ("model", "own key `checkpoint`"),
        ("api_key", "servegrid"),
        ("port", "servegrid"),
        ("uds", "servegrid"),
        ("api-key", "servegrid"),
    ],
)
def test_arguments_that_servegrid_sets_itself_are_refused(key: str, instead: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"engine_args.{key.replace('-', '_')} is set by .*{instead}"
    ):
        rendered(ON_CPU, **{key: "x"})


@pytest.mark.parametrize("key", ["tensor_parallel_size", "tensor-parallel-size"])
def test_gpu_count_says_how_many_gpus_share_the_model_and_a_cpu_has_none(key: str) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is set by .*own key `gpu_count`"):
        rendered(ON_GPUS, **{key: 2})
    assert rendered(ON_CPU, tensor_parallel_size=2)["--tensor-parallel-size"] == ["2"]


GIB = 1 << 30
SMOLLM2 = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_size": 576,
}


@pytest.mark.parametrize("value", ["--api-key=x", "-x", ["fine", "--port"]])
def test_a_value_that_would_be_an_option_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"engine_args\.dtype: .* begins with a hyphen"):
        rendered(ON_CPU, dtype=value)


def test_the_kv_cache_holds_all_requests_if_they_are_small() -> None:
    # 30 layers × 3 heads × 64 × (key + value) × 2 bytes = 23,040 bytes a token; 16 × 1024 tokens,
    # and the block of 128 tokens that vLLM does not use.
    unused = 23_040 * 128
    wanted = 23_040 * 16 * 1024 + unused
    assert arguments.kv_cache_bytes(ON_CPU, SMOLLM2, 64 * GIB) == wanted
    derived = {key: value for key, value in SMOLLM2.items() if key != "head_dim"}
    assert arguments.kv_cache_bytes(ON_CPU, derived, 64 * GIB) == wanted
    # Without num_key_value_heads, all 9 heads have a key and a value.
    unshared = {key: value for key, value in SMOLLM2.items() if key != "num_key_value_heads"}
    four = replace(ON_CPU, max_num_seqs=4)
    assert (
        arguments.kv_cache_bytes(four, unshared, 64 * GIB)
        == 3 * (wanted - unused) // 4 + 3 * unused
    )
    single = replace(ON_CPU, engine_args={"dtype": "float32"})
    assert arguments.kv_cache_bytes(single, SMOLLM2, 64 * GIB) == 2 * wanted


def test_the_kv_cache_is_bounded_but_holds_one_request() -> None:
    many = replace(ON_CPU, max_num_seqs=256)
    assert arguments.kv_cache_bytes(many, SMOLLM2, 64 * GIB) == GIB
    assert arguments.kv_cache_bytes(many, SMOLLM2, 2 * GIB) == GIB // 2
    long = replace(ON_CPU, max_model_len=100_000)
    assert arguments.kv_cache_bytes(long, SMOLLM2, 64 * GIB) == 23_040 * 128 * 783
    assert arguments.kv_cache_bytes(many, {"model_type": "other"}, 64 * GIB) == GIB
    one = replace(ON_CPU, max_num_seqs=1, max_model_len=256)
    assert arguments.kv_cache_bytes(one, SMOLLM2, 64 * GIB) == 23_040 * 3 * 128
