"""Tokenizers are opened in all forms, and refused with a remedy that is true, before a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from helpers.tokenizing import PATTERN, PIECES, make_tekken, make_tiktoken, make_tokenizer
from servegrid.client import prompts
from servegrid.errors import LoadError, ModelError
from servegrid.run.preflight import check_ready
from servegrid.study.config import parse_study
from servegrid.study.grid import Study, Workload
from servegrid.study.tokenizer import (
    MissingPackageError,
    TokenizerError,
    check_tokenizer,
    find_offsets,
    open_tokenizer,
)

TEXT = "the thé these 4.50 €"
WORKLOAD = Workload("burst", concurrency=1, input_len=40, output_len=5, requests=1)


def test_a_tekken_tokenizer_gives_the_ids_of_its_vocabulary(tmp_path: Path) -> None:
    ids, offsets = open_tokenizer(make_tekken(tmp_path)).encode(TEXT)
    # Ranks of the pieces, after 1000 special tokens; é and € are two and three bytes.
    pieces = [b"th", b"e", b" th", b"\xc3", b"\xa9", b" the", b"s", b"e", b" ", *[b"4", b".", b"5"]]
    pieces += [b"0", b" ", b"\xe2", b"\x82", b"\xac"]
    by_rank = {piece: 1000 + rank for rank, piece in enumerate(PIECES)}
    assert [PIECES[number - 1000] for number in ids[:6]] == pieces[:6]
    reference = tiktoken.Encoding(
        "reference",
        pat_str=PATTERN,
        mergeable_ranks={piece: rank for rank, piece in enumerate(PIECES)},
        special_tokens={},
    )
    assert ids == [1000 + number for number in reference.encode(TEXT)]
    assert by_rank[b"th"] == ids[0]
    assert offsets[:6] == [(0, 2), (2, 3), (3, 6), (6, 6), (6, 7), (7, 11)]
    assert "".join(TEXT[start:end] for start, end in offsets) == TEXT


def test_a_tiktoken_file_is_read_through_transformers(tmp_path: Path) -> None:
    ids, offsets = open_tokenizer(make_tiktoken(tmp_path)).encode(TEXT)
    assert b"".join(PIECES[number] for number in ids).decode() == TEXT
    assert len(ids) < len(TEXT.encode()), "pieces are merged"
    assert offsets[-1][1] == len(TEXT)


@pytest.mark.parametrize("make", [make_tokenizer, make_tekken, make_tiktoken])
def test_prompts_have_their_length_with_every_form(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    folder = make(tmp_path)
    for text in prompts.make_text_prompts(WORKLOAD, 3, folder, "cell"):
        assert len(open_tokenizer(folder).encode(text).ids) == 40
    for ids in prompts.make_token_prompts(WORKLOAD, 3, folder, "cell"):
        assert len(ids) == 40


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    make_tekken(tmp_path)
    before = open_tokenizer(tmp_path).encode("the").ids
    make_tokenizer(tmp_path)
    assert len(before) == 2
    assert len(open_tokenizer(tmp_path).encode("the").ids) == 3, "one per byte"


def test_offsets_of_tokens_that_share_a_character() -> None:
    names = {1: b"a", 2: b"\xc3", 3: b"\xa9", 4: b" b"}
    decode: Callable[[list[int]], str] = lambda ids: b"".join(  # noqa: E731
        names[number] for number in ids
    ).decode(errors="replace")
    assert find_offsets("aé b", [1, 2, 3, 4], decode) == [(0, 1), (1, 1), (1, 2), (2, 4)]
    with pytest.raises(TokenizerError, match="from character 1 on"):
        find_offsets("ab", [1, 4], decode)
    with pytest.raises(TokenizerError, match="from character 1 on"):
        find_offsets("ab", [1], decode)


def gguf(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    return folder / "model.gguf"


def folder_of_gguf(folder: Path) -> Path:
    gguf(folder)
    return folder


def lfs_pointer(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    return folder


def dangling_link(folder: Path) -> Path:
    (folder / "tokenizer.json").symlink_to("../blobs/abc")
    return folder


def a_folder_instead_of_a_file(folder: Path) -> Path:
    (folder / "tokenizer.json").mkdir()
    return folder


def truncated(folder: Path) -> Path:
    (make_tokenizer(folder) / "tokenizer.json").write_text('{"version": "1.0"')
    return folder


def truncated_tekken(folder: Path) -> Path:
    (folder / "tekken.json").write_text("{}")
    return folder


def remote_code(folder: Path) -> Path:
    make_tiktoken(folder, "qwen.tiktoken")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_x.py").write_text("raise SystemExit('this code was run')")
    return folder


def only_weights(folder: Path) -> Path:
    (folder / "model.safetensors").touch()
    return folder


REFUSED: list[tuple[Callable[[Path], Path], str, str]] = [
    (gguf, "does not read the tokenizer inside a GGUF file", "Add `tokenizer` to the deployment"),
    (folder_of_gguf, "model.gguf: servegrid does not read", "(`org/name`) of the model"),
    (lfs_pointer, "is a pointer of Git LFS", "Run `git lfs pull`"),
    (dangling_link, "leads to ../blobs/abc, which does not exist", "Download it again"),
    (a_folder_instead_of_a_file, "cannot be read (Is a directory)", "download it again"),
    (truncated, "tokenizer.json: not a tokenizer", "Download it again, or name a folder"),
    (truncated_tekken, "tekken.json: not a tokenizer", "Download it again, or name a folder"),
    (remote_code, "is Python code of the model, which servegrid does not run", "Name a folder"),
    (only_weights, "the folder has no other tokenizer", "Name a folder with the model's tokenizer"),
]


@pytest.mark.parametrize(("make", "problem", "remedy"), REFUSED)
def test_what_is_no_tokenizer_is_refused_before_anything_is_started(
    tmp_path: Path, make: Callable[[Path], Path], problem: str, remedy: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(TokenizerError) as caught:
        check_tokenizer(path)
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy
    with pytest.raises(ModelError) as refused:
        check_ready(study(checkpoint=str(path)), tmp_path / "cells")
    assert str(refused.value).startswith("deployment `d`: ")
    assert problem in str(refused.value)
    with pytest.raises(LoadError):
        prompts.make_token_prompts(WORKLOAD, 1, path, "cell")


def study(**deployment: Any) -> Study:
    entry = {"name": "d", "model": "m", "quantization": "bf16", "gpu": "cpu", "engine": "vllm"}
    return parse_study(
        {
            "study": "s",
            "workload": {"concurrency": 1, "input_len": 40, "output_len": 5},
            "deployments": [{**entry, "max_model_len": 100, **deployment}],
        }
    )


def test_a_good_tokenizer_passes(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    check_ready(study(checkpoint=str(gguf(tmp_path)), tokenizer=str(tmp_path)), tmp_path / "cells")


def test_a_missing_package_is_the_job_s_concern_if_the_job_has_its_own_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tekken(tmp_path)
    monkeypatch.setitem(sys.modules, "mistral_common.tokens.tokenizers.tekken", None)
    with pytest.raises(MissingPackageError, match=r"not installed here: mistral-common\. Install"):
        check_tokenizer(tmp_path)
    check_ready(study(checkpoint=str(tmp_path)), tmp_path / "cells")
    external = study(
        engine="external",
        tokenizer=str(tmp_path),
        max_num_seqs=1,
        endpoint={"url": "http://localhost:1", "model": "m", "engine": "sglang"},
    )
    with pytest.raises(ModelError, match=r"deployment `d`: .*mistral-common"):
        check_ready(external, tmp_path / "cells")
