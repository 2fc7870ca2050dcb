"""Models are found, and the model of the demo is fetched (its two slow steps are replaced)."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from servegrid.errors import ModelError
from servegrid.study import models

GGUF = b"GGUF and all that"
WEIGHTS = b"weights"


def test_a_path_is_found_absolute_relative_and_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for checkpoint in (str(tmp_path / "model.gguf"), "model.gguf", "./model.gguf", "~/model.gguf"):
        assert models.locate(checkpoint, Path("unused")) == tmp_path / "model.gguf"


def test_a_demo_model_is_found_in_the_cache_folder(tmp_path: Path) -> None:
    (tmp_path / "smollm2-135m-instruct").mkdir()
    found = models.locate("demo:smollm2-135m-instruct", tmp_path)
    assert found == tmp_path / "smollm2-135m-instruct"


def test_a_missing_demo_model_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`demo:smollm2-135m-instruct\.gguf`.*`make model`"):
        models.locate("demo:smollm2-135m-instruct.gguf", tmp_path)


def test_an_unknown_demo_model_lists_the_valid_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="`demo:smollm2-135m-instruct` or"):
        models.locate("demo:smollm", tmp_path)


def test_a_hugging_face_name_is_looked_up_in_the_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--name"
    snapshot = cached / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    assert models.locate("org/name", tmp_path) == snapshot
    with pytest.raises(ModelError, match="`hf download org/other`"):
        models.locate("org/other", tmp_path)


@pytest.mark.parametrize("checkpoint", ["./nowhere", "/no/where", "nowhere", "a/b/c"])
def test_a_missing_path_is_named_as_in_the_study(checkpoint: str) -> None:
    with pytest.raises(ModelError, match=rf"`{checkpoint}`.*Correct the path\."):
        models.locate(checkpoint, Path("unused"))


def test_file_digests_leave_out_weights_by_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"abc")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    (tmp_path / ".lock").touch()
    (tmp_path / "original").mkdir()
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert models.file_digests(tmp_path) == {
        "config.json": {"bytes": 3, "sha256": of_abc},
        "model.safetensors": {"bytes": 5, "sha256": None},
    }
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    assert models.file_digests(tmp_path, weights=True)["model.safetensors"]["sha256"] == of_abc
    assert models.file_digests(tmp_path / "config.json") == {
        "config.json": {"bytes": 3, "sha256": of_abc}
    }


def test_the_default_folder_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("SERVEGRID_MODELS", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert models.default_folder() == Path("/home/someone/.cache/servegrid/models")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/cache")
    assert models.default_folder() == Path("/scratch/cache/servegrid/models")
    monkeypatch.setenv("SERVEGRID_MODELS", "~/models")
    assert models.default_folder() == Path("/home/someone/models")


class Steps:
    """Replaces the slow steps (pip, transformers) and counts their calls."""

    def __init__(self) -> None:
        self.downloaded = 0
        self.converted = 0
        self.fails = False

    def download(self, folder: Path) -> None:
        self.downloaded += 1
        (folder / models.DEMO_GGUF).write_bytes(GGUF)

    def convert(self, gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == GGUF
        self.converted += 1
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        if self.fails:
            raise KeyboardInterrupt


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(models, "_download_gguf", steps.download)
    monkeypatch.setattr(models, "_convert", steps.convert)
    monkeypatch.setattr(
        models,
        "PINNED",
        {
            models.DEMO_GGUF: hashlib.sha256(GGUF).hexdigest(),
            f"{models.DEMO_FOLDER}/model.safetensors": hashlib.sha256(WEIGHTS).hexdigest(),
        },
    )
    return steps


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_fetch_makes_both_formats_once(tmp_path: Path, steps: Steps) -> None:
    folder = tmp_path / "not" / "yet"
    models.fetch(folder)
    models.fetch(folder)
    assert files_in(folder) == {models.DEMO_GGUF, models.DEMO_FOLDER}
    assert (steps.downloaded, steps.converted) == (1, 1)


def test_an_interrupted_fetch_leaves_no_incomplete_files_and_can_be_resumed(
    tmp_path: Path, steps: Steps
) -> None:
    steps.fails = True
    with pytest.raises(KeyboardInterrupt):
        models.fetch(tmp_path)
    assert files_in(tmp_path) == {models.DEMO_GGUF}
    killed = tmp_path / ".making-killed"
    killed.mkdir()
    (killed / "part").touch()
    steps.fails = False
    models.fetch(tmp_path)
    assert files_in(tmp_path) == {models.DEMO_GGUF, models.DEMO_FOLDER}
    assert steps.downloaded == 1


def test_simultaneous_calls_fetch_once(tmp_path: Path, steps: Steps) -> None:
    threads = [threading.Thread(target=models.fetch, args=(tmp_path,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (steps.downloaded, steps.converted) == (1, 1)


@pytest.mark.parametrize("path", [models.DEMO_GGUF, f"{models.DEMO_FOLDER}/model.safetensors"])
def test_a_file_with_another_sha256_is_not_published(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setitem(models.PINNED, path, "0" * 64)
    with pytest.raises(ModelError, match=rf"{path} has the SHA-256 [0-9a-f]{{64}}, not 0000"):
        models.fetch(tmp_path)
    assert path.split("/")[0] not in files_in(tmp_path)


def test_an_unwritable_folder_is_named(tmp_path: Path, steps: Steps) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"file/models: .* SERVEGRID_MODELS"):
        models.fetch(tmp_path / "file" / "models")


def test_a_failure_of_pip_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DEMO_REQUIREMENT", "./no-such-folder")
    with pytest.raises(ModelError, match=r"no-such-folder: ERROR: Invalid requirement"):
        models.fetch(tmp_path)
    assert files_in(tmp_path) == set()
