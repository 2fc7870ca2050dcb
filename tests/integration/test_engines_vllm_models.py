"""The real vLLM on the CPU: drafts of n-grams, LoRA adapters, and reasoning in a chat.

A draft model, EAGLE and adapters for several GPUs need hardware that these tests do not have.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.demo_model import DemoModel
from helpers.deployments import DEMO_VLLM
from helpers.serving import EngineProcess, http_client
from servegrid.analysis.buffering import describe_buffering
from servegrid.analysis.metrics import knows_itl, streamed_tokens
from servegrid.analysis.server_metrics import speculation_columns
from servegrid.client import Measurement, measure
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Deployment, Workload
from servegrid.telemetry.server import counter_reader

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.chaos,
    pytest.mark.timeout(580),
]
BURST = Workload("burst", 2, 31, 60, 4, warmup_waves=0)


def served(
    deployment: Deployment, workload: Workload, demo_model: DemoModel, folder: Path
) -> tuple[Measurement, dict[str, Any]]:
    """A measurement on vLLM, and what it says about itself."""
    with EngineProcess(deployment, demo_model.models, folder) as serving:
        up = serving.wait_until_up()
        endpoint = Endpoint(**up["endpoint"])
        counters = counter_reader(endpoint)
        measured = measure(endpoint, workload, demo_model.folder, "a trial", counters)
        serving.finish()
    assert measured.errors == [None] * (workload.requests or 0)
    return measured, up["facts"]


def test_speculative_decoding_by_n_grams(demo_model: DemoModel, tmp_path: Path) -> None:
    """The small model repeats itself, so a part of the drafts is accepted."""
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 2,
    }
    deployment = replace(
        DEMO_VLLM, engine_args={**DEMO_VLLM.engine_args, "speculative_config": ngram}
    )
    measured, facts = served(deployment, BURST, demo_model, tmp_path)
    words = facts["engine_args"]
    assert json.loads(words[words.index("--speculative-config") + 1]) == ngram
    rows = measured.requests.to_pylist()
    assert [row["completion_tokens"] for row in rows] == [60] * 4
    assert [sum(row["chunk_tokens"]) for row in rows] == [60] * 4
    # A step gives at most the four drafted tokens and one of its own; chunks of several steps come
    # together only if the server is late.
    assert max(max(row["chunk_tokens"]) for row in rows) > 1
    record = {
        "metrics_before": measured.counters_before,
        "metrics_after": measured.counters_after,
    }
    found = speculation_columns(record, measured.requests)
    rate, length = found.values()
    assert rate is not None and 0 < rate <= 1
    assert length is not None and 1 < length <= 5
    # Each accepted token saves a chunk: it comes with the one of the model. The last step may
    # accept more tokens than the response has left.
    assert measured.counters_before and measured.counters_after
    name = "vllm:spec_decode_num_accepted_tokens_total"
    accepted = measured.counters_after[name] - measured.counters_before[name]
    chunks = sum(len(row["chunk_tokens"]) for row in rows)
    assert chunks <= 4 * 60 - accepted + 4 * 4
    assert knows_itl(measured.requests).all()
    assert describe_buffering(measured.requests) is None


LAYERS, HIDDEN, KV = 30, 576, 192
"""The demo's model: layers, hidden size, and the width of its keys and values."""


def make_adapter(folder: Path, scale: float) -> str:
    """A LoRA adapter of rank 8 with random weights; with scale 0, it changes nothing."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(LAYERS):
        for part, width in (("q_proj", HIDDEN), ("v_proj", KV)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            weights[f"{name}.lora_A.weight"] = torch.randn(8, HIDDEN, generator=generator)
            weights[f"{name}.lora_B.weight"] = scale * torch.randn(width, 8, generator=generator)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def test_lora_adapters_change_the_answers_of_the_requests_that_name_them(
    demo_model: DemoModel, tmp_path: Path
) -> None:
    lora = {
        "none": make_adapter(tmp_path / "none", 0.0),
        "random": make_adapter(tmp_path / "random", 1.0),
    }
    deployment = replace(DEMO_VLLM, lora=lora)
    with EngineProcess(deployment, demo_model.models, tmp_path) as serving:
        up = serving.wait_until_up()
        endpoint = Endpoint(**up["endpoint"])
        with http_client(endpoint) as client:
            names = {each["id"] for each in client.get("/v1/models").json()["data"]}
            texts = {
                model: client.post(
                    "/v1/completions",
                    json={
                        "model": model,
                        "prompt": "The capital of France is",
                        "max_tokens": 6,
                        "temperature": 0,
                    },
                ).json()["choices"][0]["text"]
                for model in (deployment.model, *lora)
            }
        measured = measure(endpoint, BURST, demo_model.folder, "a trial")
        serving.finish()
    assert names == {deployment.model, "none", "random"}
    assert texts[deployment.model] == texts["none"] != texts["random"]
    assert texts["none"].startswith(" Paris")
    assert measured.errors == [None] * 4
    assert measured.requests["adapter"].to_pylist() == ["none", "random"] * 2
    facts = up["facts"]["lora"]
    assert facts.keys() == lora.keys()
    digests = {facts[name]["adapter_model.safetensors"]["sha256"] for name in lora}
    assert len(digests) == 2 and None not in digests


THINKING = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\\n<think>\\n' }}"""


def test_the_reasoning_of_a_chat_with_a_template_of_its_own(
    demo_model: DemoModel, tmp_path: Path
) -> None:
    """The template opens the reasoning, and the small model never ends it.

    The parser of OLMo 3 knows the markers by their text, so it works with any tokenizer, and it
    does not count tokens.
    """
    file = tmp_path / "thinking.jinja"
    file.write_text(THINKING, encoding="utf-8")
    deployment = replace(
        DEMO_VLLM,
        api="chat",
        chat_template=str(file),
        engine_args={**DEMO_VLLM.engine_args, "reasoning_parser": "olmo3"},
    )
    measured, facts = served(deployment, replace(BURST, output_len=20), demo_model, tmp_path)
    assert facts["chat_template"].keys() == {"thinking.jinja"}
    assert measured.facts["prompt_form"] == "messages"
    # <|im_start|>user\n, <|im_end|>\n, <|im_start|>assistant\n and <think>\n: as llama.cpp counts.
    assert measured.facts["prompt_tokens_added"] == 13
    for row in measured.requests.to_pylist():
        assert (row["completion_tokens"], sum(row["chunk_tokens"])) == (20, 20)
        assert (row["reasoning_tokens"], row["reasoning_tokens_estimated"]) == (20, True)
        assert row["first_token_ns"] and row["first_output_token_ns"] is None
    assert streamed_tokens(measured.requests).tolist() == [20.0] * 4
