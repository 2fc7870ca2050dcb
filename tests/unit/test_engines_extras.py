"""Chat templates and LoRA adapters: what a study may ask for, what vLLM is told and recorded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.deployments import EMULATED_ENTRY, EXTERNAL_ENTRY, SMALL_VLLM
from helpers.scripted_server import completion, scripted_server
from servegrid.bundle.replicate import is_replicable
from servegrid.client import measure
from servegrid.engines import arguments
from servegrid.engines.extras import find_extras
from servegrid.errors import ConfigError, LoadError, ModelError
from servegrid.run.preflight import check_ready
from servegrid.study.config import parse_study
from servegrid.study.deployment import Deployment
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Study, Workload

ENTRY = {
    "model": "small",
    "checkpoint": "org/small",
    "quantization": "bf16",
    "engine": "vllm",
    "gpu": "cpu",
    "max_model_len": 1024,
}
WORKLOAD = {"concurrency": 2, "input_len": 31, "output_len": 4}


def study(entry: dict[str, Any] = ENTRY, workload: Any = WORKLOAD, **more: Any) -> Study:
    return parse_study({"study": "s", "workload": workload, "deployments": [entry | more]})


def adapter(folder: Path, rank: int = 8, **config: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, **config}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return str(folder)


def test_requests_name_the_adapters_in_turn() -> None:
    workload = Workload("burst", 2, 8, 3, 4, warmup_waves=0)
    with scripted_server(completion) as server:
        endpoint = Endpoint(server.url, "base", started_here=True, adapters=("sql", "chat"))
        measured = measure(endpoint, workload, None, "s")
        plain = measure(replace(endpoint, adapters=()), workload, None, "s")
    assert measured.errors == plain.errors == [None] * 4
    named = {each.headers["X-Request-Id"]: each.body["model"] for each in server.requests[:-5]}
    asked = {"probe": "sql", "0": "sql", "1": "chat", "2": "sql", "3": "chat"}
    assert named == {f"s/{name}": model for name, model in asked.items()}
    assert measured.requests["adapter"].to_pylist() == ["sql", "chat", "sql", "chat"]
    assert {each.body["model"] for each in server.requests[-5:]} == {"base"}
    assert plain.requests["adapter"].to_pylist() == [None] * 4


def test_vllm_loads_the_adapters_with_a_rank_that_fits_all(tmp_path: Path) -> None:
    lora = {
        "sql": adapter(tmp_path / "sql", 8),
        "chat": adapter(tmp_path / "chat", 4, rank_pattern={"q_proj": 20}),
    }
    found = find_extras(replace(SMALL_VLLM, lora=lora))
    options = ["--enable-lora", "--lora-modules", "--max-loras", "--max-lora-rank"]
    words = arguments.format_arguments(SMALL_VLLM, found.vllm_arguments, options, "0.32.0")
    assert words == [
        *("--enable-lora", "--lora-modules"),
        json.dumps({"name": "sql", "path": lora["sql"]}),
        json.dumps({"name": "chat", "path": lora["chat"]}),
        *("--max-loras", "2", "--max-lora-rank", "32"),
    ]
    weights = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert found.facts["lora"]["chat"]["adapter_model.safetensors"] == weights
    assert found.facts["lora"].keys() == {"sql", "chat"}


def test_a_chat_template_is_found_and_its_digest_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "plain.jinja").write_text(text)
    monkeypatch.chdir(tmp_path)
    found = find_extras(replace(SMALL_VLLM, api="chat", chat_template="plain.jinja"))
    assert found.vllm_arguments == {"chat_template": str(tmp_path / "plain.jinja")}
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert found.facts == {"chat_template": {"plain.jinja": {"bytes": 62, "sha256": digest}}}
    assert (find_extras(SMALL_VLLM).vllm_arguments, find_extras(SMALL_VLLM).facts) == ({}, {})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"lora\.sql `.*sql`: .*sql has no LoRA adapter: adapter_config\.json and"),
        ({"adapter_config.json": '{"r": 8}'}, "has no LoRA adapter"),
        ({"adapter_config.json": "{}", "adapter_model.bin": ""}, "has no rank `r`"),
        ({"adapter_config.json": "[8]", "adapter_model.bin": ""}, "has no rank `r`"),
        ({"adapter_config.json": "{", "adapter_model.bin": ""}, "has no rank `r`"),
        ({"adapter_config.json": '{"r": "8"}', "adapter_model.bin": ""}, "has no rank `r`"),
    ],
)
def test_a_missing_or_damaged_adapter_is_refused_before_submission(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    folder = tmp_path / "sql"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    wanted = study(lora={"sql": str(folder)})
    with pytest.raises(ModelError, match=rf"deployment `small_bf16_vllm_cpu`: .*{message}"):
        check_ready(wanted, tmp_path / "results" / "cells")


def test_a_missing_chat_template_is_refused_before_submission(tmp_path: Path) -> None:
    wanted = study(api="chat", chat_template=str(tmp_path / "none.jinja"))
    cells = tmp_path / "results" / "cells"
    with pytest.raises(
        ModelError, match=r"chat_template `.*none\.jinja`: .* cannot be read \(No s"
    ):
        check_ready(wanted, cells)
    (tmp_path / "none.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"none\.jinja is no text in UTF-8\. Name a template"):
        check_ready(wanted, cells)
    (tmp_path / "none.jinja").unlink()
    (tmp_path / "none.jinja").mkdir()
    with pytest.raises(ModelError, match=r"cannot be read \(Is a directory\)"):
        check_ready(wanted, cells)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            EMULATED_ENTRY | {"api": "chat"},
            r"deployments\[0\]\.api: not for the engine `emulated`",
        ),
        (EXTERNAL_ENTRY | {"api": "chat"}, r"api: not for the engine `external`\. .*endpoint\.api"),
        (EXTERNAL_ENTRY | {"lora": {"a": "b"}}, r"lora: .*name the adapter as `endpoint\.model`"),
        (EXTERNAL_ENTRY | {"chat_template": "a"}, "chat_template: not for the engine `external`"),
        (ENTRY | {"engine": "llamacpp", "lora": {"a": "b"}}, "lora: not for .* `llamacpp`"),
        (ENTRY | {"chat_template": "a"}, "chat_template: only chats .* Add `api: chat`"),
        (ENTRY | {"lora": {"small": "a"}}, r"lora: `small` is the name of the model\. Rename"),
        (ENTRY | {"lora": {}}, "lora"),
        (ENTRY | {"lora": {"a b": "c"}}, "lora"),
        (ENTRY | {"api": "responses"}, r"deployments\.0\.api|deployments\[0\]\.api"),
        (ENTRY | {"sweep": {"api": ["chat"]}}, r"sweep: `api` is no setting of the engine"),
    ],
)
def test_what_an_engine_cannot_serve_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(entry)


@pytest.mark.parametrize(("key", "own"), [("lora_modules", "lora"), ("chat_template",) * 2])
def test_arguments_that_have_a_key_of_their_own_are_refused(key: str, own: str) -> None:
    deployment = replace(SMALL_VLLM, engine_args={key: "x"})
    with pytest.raises(ConfigError, match=rf"engine_args\.{key} is set by .*own key `{own}`"):
        arguments.format_arguments(deployment, {}, [], "0.32.0")


def test_a_chat_gets_texts_and_no_token_ids() -> None:
    random = WORKLOAD | {"source": {"kind": "random"}}
    assert study(workload=random)
    with pytest.raises(ConfigError, match="a chat takes text"):
        study(workload=random, api="chat")


def test_the_keys_are_part_of_the_specification_only_if_they_are_set() -> None:
    (plain,) = study().deployments
    assert {"api", "chat_template", "lora"}.isdisjoint(plain.spec)
    assert study(api="completions").deployments == (plain,)
    more = {"api": "chat", "chat_template": "t.jinja", "lora": {"sql": "adapters/sql"}}
    (full,) = study(**more).deployments
    assert full.spec | more == full.spec
    assert Deployment.from_spec(json.loads(json.dumps(full.spec))) == full
    assert full.digest != plain.digest
    assert (full.is_chat, plain.is_chat) == (True, False)


@pytest.mark.parametrize("more", [{"lora": {"a": "/etc"}}, {"chat_template": "/etc/passwd"}])
def test_files_of_this_machine_are_never_replicated(more: dict[str, Any]) -> None:
    assert is_replicable(replace(SMALL_VLLM, api="chat"))
    assert not is_replicable(replace(SMALL_VLLM, api="chat", **more))


def test_an_adapter_that_the_server_does_not_know_is_one_error() -> None:
    from helpers.scripted_server import refusal

    with scripted_server(lambda _: refusal("The model `sql` does not exist.", 404)) as server:
        endpoint = Endpoint(server.url, "base", started_here=True, adapters=("sql",))
        with pytest.raises(LoadError, match="`sql` does not exist"):
            measure(endpoint, Workload("burst", 1, 8, 3, 1), None, "s")
