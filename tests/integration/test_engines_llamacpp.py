"""The engine llama.cpp: serving, failed starts, and that nothing remains after the end."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tokenizers import Tokenizer

from helpers.demo_model import DemoModel
from helpers.serving import EngineProcess, http_client
from helpers.sources import check_counted_tokens, sourced_workloads
from servegrid.analysis.buffering import describe_buffering
from servegrid.analysis.reasoning import reasoning_columns
from servegrid.analysis.server_metrics import speculation_columns
from servegrid.client import measure
from servegrid.engines import Site, start_engine
from servegrid.errors import ConfigError, EngineError
from servegrid.study.grid import Deployment, Workload

pytestmark = pytest.mark.crowded


def site(demo_model: DemoModel, **more: Any) -> Site:
    return Site(**{"models": demo_model.models, "startup_s": 120.0} | more)


def complete(client: httpx.Client, prompt: str | list[int], tokens: int) -> dict[str, Any]:
    response = client.post(
        "/v1/completions",
        json={
            "model": "smollm2-135m-instruct",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        },
        timeout=120,
    )
    response.raise_for_status()
    body: dict[str, Any] = response.json()
    return body


def metric(client: httpx.Client, name: str) -> float:
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(f"llamacpp:{name} "):
            return float(line.split()[1])
    raise AssertionError(f"no metric {name}")


def test_it_serves_the_model_and_processes_every_prompt_in_full(
    demo_model: DemoModel, llamacpp_deployment: Deployment, tmp_path: Path
) -> None:
    with (
        start_engine(llamacpp_deployment, site(demo_model)) as engine,
        http_client(engine.endpoint) as client,
    ):
        assert complete(client, "The capital of France is", 3)["choices"][0]["text"].startswith(
            " Paris"
        )
        prompt = list(range(1000, 1200))
        before = metric(client, "prompt_tokens_total")
        for _ in range(3):
            usage = complete(client, prompt, 4)["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (200, 4)
        assert metric(client, "prompt_tokens_total") - before == 3 * 200
        assert metric(client, "prompt_tokens_cached_total") == 0
        for workload, file in sourced_workloads(tmp_path):
            measured = measure(
                engine.endpoint, workload, demo_model.folder, "sources", source_file=file
            )
            assert measured.errors == [None] * (workload.requests or 0), workload
            check_counted_tokens(measured.requests)
        assert metric(client, "prompt_tokens_cached_total") == 0

        assert engine.facts["quantization"] == "Q4_1"
        assert engine.facts["max_model_len"] == 512
        assert engine.facts["max_num_seqs"] == 8
        assert engine.facts["kv_capacity_tokens"] == 8 * 512
        assert engine.facts["parameters"] == 134_515_008
        assert engine.endpoint.api_key
        assert engine.endpoint.api_key not in repr(engine.facts)


def test_a_request_can_fill_the_context_but_not_exceed_it(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    with (
        start_engine(llamacpp_deployment, site(demo_model)) as engine,
        http_client(engine.endpoint) as client,
    ):
        usage = complete(client, [1000] * 500, 12)["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (500, 12)
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            complete(client, [1000] * 513, 1)


def test_all_slots_are_used_and_the_server_stays_healthy(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    with (
        start_engine(llamacpp_deployment, site(demo_model)) as engine,
        http_client(engine.endpoint) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        requests = [pool.submit(complete, client, [1000 + n] * 8, 40) for n in range(12)]
        running = waiting = 0.0
        while not all(request.done() for request in requests):
            running = max(running, metric(client, "requests_processing"))
            waiting = max(waiting, metric(client, "requests_deferred"))
            assert engine.healthy()
            time.sleep(0.02)
        assert (running, waiting) == (8, 4)
        assert [r.result()["usage"]["completion_tokens"] for r in requests] == [40] * 12


THINKING = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content is defined and message.reasoning_content -%}
{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"""
"""The model answers as if it had begun to reason, and never ends that."""


def test_a_chat_with_a_template_of_its_own_whose_reasoning_is_told_apart(
    demo_model: DemoModel, llamacpp_deployment: Deployment, tmp_path: Path
) -> None:
    file = tmp_path / "thinking.jinja"
    file.write_text(THINKING, encoding="utf-8")
    deployment = replace(llamacpp_deployment, api="chat", chat_template=str(file))
    workload = Workload("burst", 2, 31, 12, 2, warmup_waves=0)
    with start_engine(deployment, site(demo_model)) as engine:
        measured = measure(engine.endpoint, workload, demo_model.folder, "a chat")
        facts = engine.facts
    assert facts["chat_template"].keys() == {"thinking.jinja"}
    assert measured.errors == [None] * 2
    tokenizer = Tokenizer.from_file(str(demo_model.folder / "tokenizer.json"))
    around = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    added = len(tokenizer.encode(around.format("Hello"), add_special_tokens=False).ids) - 1
    assert measured.facts["prompt_tokens_added"] == added
    for row in measured.requests.to_pylist():
        assert (row["completion_tokens"], row["reasoning_tokens"]) == (12, 12)
        assert row["reasoning_tokens_estimated"]  # llama.cpp does not count them
        assert row["first_token_ns"] and row["first_output_token_ns"] is None
    assert reasoning_columns(measured.requests) == {
        "reasoning_tokens_mean": 12,
        "responses_without_answer": 2,
    }


def test_speculative_decoding_is_counted_and_does_not_look_held_back(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    """n-grams need no second model. The small model repeats itself, so drafts are accepted."""
    deployment = replace(
        llamacpp_deployment,
        engine_args={
            **llamacpp_deployment.engine_args,
            "speculative.types": ["COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE"],
            "speculative.ngram_simple.size_n": 2,
            "speculative.ngram_simple.size_m": 8,
        },
    )
    workload = Workload("burst", 2, 31, 80, 2, warmup_waves=0)
    with start_engine(deployment, site(demo_model)) as engine:
        measured = measure(engine.endpoint, workload, demo_model.folder, "drafts")
    assert measured.errors == [None] * 2
    for row in measured.requests.to_pylist():
        assert 0 < row["accepted_draft_tokens"] <= row["draft_tokens"]
        assert row["completion_tokens"] == sum(row["chunk_tokens"]) == 80
    assert describe_buffering(measured.requests) is None
    record = {"metrics_before": None, "metrics_after": None}
    rate = speculation_columns(record, measured.requests)["spec_decode_acceptance_rate"]
    assert rate is not None and 0 < rate <= 1


def test_requests_without_the_api_key_are_refused(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    with start_engine(llamacpp_deployment, site(demo_model)) as engine:
        with http_client(replace(engine.endpoint, api_key="another")) as client:
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 401
        (pid,) = engine.pids()
        assert engine.endpoint.api_key
        assert engine.endpoint.api_key not in " ".join(psutil.Process(pid).cmdline())


def test_it_listens_on_a_unix_socket_that_only_its_user_can_reach(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    with start_engine(llamacpp_deployment, site(demo_model, socket="unix")) as engine:
        assert engine.endpoint.socket
        socket = Path(engine.endpoint.socket)
        assert socket.is_socket()
        assert socket.parent.stat().st_mode & 0o777 == 0o700
        with http_client(engine.endpoint) as client:
            assert complete(client, "a b c", 2)["usage"]["completion_tokens"] == 2
        (pid,) = engine.pids()
        assert psutil.Process(pid).net_connections("inet") == []
    assert not socket.parent.exists()


def test_a_second_engine_starts_after_the_first(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    pids = set()
    for _ in range(2):
        with start_engine(llamacpp_deployment, site(demo_model)) as engine:
            assert engine.healthy()
            pids |= set(engine.pids())
        assert not engine.healthy()
    assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids))


def test_a_killed_engine_is_not_healthy_and_leaves_nothing_behind(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    with start_engine(llamacpp_deployment, site(demo_model, socket="unix")) as engine:
        (pid,) = engine.pids()
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while engine.healthy():
            assert time.monotonic() < deadline
    assert engine.endpoint.socket
    assert not Path(engine.endpoint.socket).parent.exists()
    assert not psutil.pid_exists(pid)


def test_a_damaged_model_is_reported_in_one_line(
    demo_model: DemoModel, llamacpp_deployment: Deployment, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(demo_model.gguf.read_bytes()[:50_000_000])
    with (
        pytest.raises(EngineError, match="corrupted or incomplete") as caught,
        start_engine(replace(llamacpp_deployment, checkpoint=str(damaged)), site(demo_model)),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert llamacpp_deployment.name in str(caught.value)


def test_a_misspelt_argument_is_refused_with_a_suggestion(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    misspelt = replace(llamacpp_deployment, engine_args={"cache_promt": True})
    with (
        pytest.raises(ConfigError, match=r"engine_args\.cache_promt.*Did you mean `cache_prompt`"),
        start_engine(misspelt, site(demo_model)),
    ):
        pass


def test_a_context_longer_than_the_models_context_is_refused(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    long = replace(llamacpp_deployment, max_model_len=8448, max_num_seqs=1)
    with (
        pytest.raises(
            ConfigError,
            match="max_model_len 8448 is more than the model's context length, 8192 tokens",
        ),
        start_engine(long, site(demo_model)),
    ):
        pass


def test_missing_gpus_are_reported(demo_model: DemoModel, llamacpp_deployment: Deployment) -> None:
    on_gpus = replace(llamacpp_deployment, gpu="a100", gpu_count=64)
    with (
        pytest.raises(EngineError, match="needs 64 GPUs of kind `a100`, but"),
        start_engine(on_gpus, site(demo_model)),
    ):
        pass


def test_a_start_that_takes_too_long_is_stopped(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    before = set(psutil.Process().children())  # another test's server can run
    with (
        pytest.raises(EngineError, match="did not start in time"),
        start_engine(llamacpp_deployment, site(demo_model, startup_s=0.0)),
    ):
        pass
    assert set(psutil.Process().children()) <= before


@pytest.mark.parametrize(
    ("signal_number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)],
)
@pytest.mark.parametrize("moment", ["starting", "up"])
def test_a_signal_ends_it_and_leaves_nothing_behind(
    demo_model: DemoModel,
    llamacpp_deployment: Deployment,
    tmp_path: Path,
    signal_number: signal.Signals,
    status: int,
    moment: str,
) -> None:
    with EngineProcess(llamacpp_deployment, demo_model.models, tmp_path, socket="unix") as serving:
        if moment == "up":
            serving.wait_until_up()
        else:
            time.sleep(0.2)
        assert serving.send_signal(signal_number) == status


def test_signals_of_the_scheduler_do_not_stop_the_engine(
    demo_model: DemoModel, llamacpp_deployment: Deployment
) -> None:
    with start_engine(llamacpp_deployment, site(demo_model)) as engine:
        (pid,) = engine.pids()
        for signal_number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(pid, signal_number)
        time.sleep(0.2)
        assert engine.healthy()
