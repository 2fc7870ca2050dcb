"""Deployments as settings of llama.cpp."""

from __future__ import annotations

import enum
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.deployments import SMALL_VLLM
from servegrid.engines.llamacpp import find_gguf, llamacpp_settings
from servegrid.engines.llamacpp_server import apply_settings
from servegrid.errors import ConfigError, ModelError

DEPLOYMENT = replace(
    SMALL_VLLM,
    name="small_q4_llamacpp_cpu",
    checkpoint="small.gguf",
    quantization="q4_1",
    engine="llamacpp",
    max_num_seqs=8,
)


def test_each_slot_has_the_full_context_and_prompt_caches_are_off() -> None:
    settings = llamacpp_settings(DEPLOYMENT, Path("/models/small.gguf"), threads=6)
    assert settings["model.path"] == "/models/small.gguf"
    assert settings["n_parallel"] == 8
    assert settings["n_ctx"] == 8 * 1024
    assert settings["cpuparams.n_threads"] == settings["cpuparams_batch.n_threads"] == 6
    assert settings["n_gpu_layers"] == 0
    assert settings["cache_prompt"] is False
    assert settings["cache_ram_mib"] == settings["n_cache_reuse"] == 0
    on_gpu = replace(DEPLOYMENT, gpu="a100", gpu_count=1)
    assert llamacpp_settings(on_gpu, Path("small.gguf"), 6)["n_gpu_layers"] == -1


def test_engine_args_override_the_settings() -> None:
    chosen = replace(DEPLOYMENT, engine_args={"cache_prompt": True, "n_ubatch": 256})
    settings = llamacpp_settings(chosen, Path("small.gguf"), 2)
    assert settings["cache_prompt"] is True
    assert settings["n_ubatch"] == 256


@pytest.mark.parametrize(
    ("key", "instead"), [("n_ctx", "own key `max_model_len`"), ("port", "servegrid")]
)
def test_arguments_that_servegrid_sets_itself_are_refused(key: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine_args\.{key} is set by .*{instead}"):
        llamacpp_settings(replace(DEPLOYMENT, engine_args={key: 1}), Path("small.gguf"), 2)


class Kind(enum.IntEnum):
    F16 = 1
    Q8_0 = 8


class Parameters:
    """As strict as llama.cpp's parameters."""

    __slots__ = ("cpuparams", "kind", "kinds", "model_alias", "n_ctx")

    def __init__(self) -> None:
        self.kind = Kind.F16
        self.kinds = [Kind.F16]
        self.model_alias: set[str] = set()
        self.n_ctx = 0
        self.cpuparams = SimpleNamespace(n_threads=-1)


def test_settings_can_be_nested_attributes_enumerations_and_sets() -> None:
    parameters = Parameters()
    apply_settings(
        {"n_ctx": 4, "cpuparams.n_threads": 2, "kind": "Q8_0", "model_alias": ["small"]},
        parameters,
    )
    assert (parameters.n_ctx, parameters.cpuparams.n_threads) == (4, 2)
    assert (parameters.kind, parameters.model_alias) == (Kind.Q8_0, {"small"})
    apply_settings({"kinds": ["Q8_0", "F16"]}, parameters)
    assert parameters.kinds == [Kind.Q8_0, Kind.F16]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"n_ctxt": 1},
            r"engine_args\.n_ctxt: llama\.cpp has no such setting\. Did you mean `n_ctx`",
        ),
        (
            {"nothing.like.it": 1},
            r"engine_args\.nothing\.like\.it: llama\.cpp has no such setting\. Remove it\.",
        ),
        ({"kinds": ["Q9"]}, r"engine_args\.kinds: llama\.cpp does not accept \['Q9'\]"),
        ({"kind": "Q9"}, r"engine_args\.kind: llama\.cpp does not accept 'Q9'"),
    ],
)
def test_unknown_settings_and_values_are_refused_with_their_key(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        apply_settings(settings, Parameters())


def test_a_folder_with_one_gguf_file_is_accepted(tmp_path: Path) -> None:
    folder = replace(DEPLOYMENT, checkpoint=str(tmp_path))
    with pytest.raises(ModelError, match="contains 0 GGUF files"):
        find_gguf(folder, tmp_path)
    (tmp_path / "one.gguf").write_bytes(b"GGUF....")
    assert find_gguf(folder, tmp_path) == tmp_path / "one.gguf"
    (tmp_path / "two.gguf").write_bytes(b"GGUF....")
    with pytest.raises(ModelError, match=r"contains 2 GGUF files\. .*path of a GGUF file"):
        find_gguf(folder, tmp_path)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    other = replace(DEPLOYMENT, checkpoint=str(tmp_path / "model.safetensors"))
    with pytest.raises(ModelError, match="is not a GGUF file"):
        find_gguf(other, tmp_path)
