"""`--directory` of `servegrid` means the same as that of `snakemake`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from servegrid.cli.main import main
from servegrid.study.directory import inside

STUDY: dict[str, Any] = {
    "study": "replay",
    "workload": {"source": {"kind": "trace", "path": "trace.csv"}},
    "deployments": [
        {
            "model": "mistral-7b",
            "checkpoint": "weights",
            "tokenizer": "weights",
            "quantization": "fp16",
            "engine": "vllm",
            "gpu": "a100-40gb",
            "max_model_len": 4096,
        }
    ],
}
TRACE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,9,5\n2024-01-01 00:00:04,9,5\n"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the study, below that of the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    return work


def test_the_plan_reads_the_files_of_the_studys_own_directory(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["plan", "--configfile", "study.yaml", "--directory", "work"]
    assert main(options) == 2
    assert "study.yaml: trace.csv: cannot be read" in capsys.readouterr().err
    (folder / "trace.csv").write_text(TRACE, encoding="utf-8")
    assert main(options) == 0
    assert "trace, 5 output tokens" in capsys.readouterr().out
    assert Path.cwd() == folder.parent


def test_fetch_and_doctor_look_for_models_in_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "trace.csv").write_text(TRACE, encoding="utf-8")
    (folder / "weights").mkdir()
    assert main(["fetch", "--configfile", "study.yaml", "--directory", "work"]) == 0
    assert f"weights: {folder / 'weights'}\n" in capsys.readouterr().out
    profile = folder.parent / "profile"
    profile.mkdir()
    (profile / "config.yaml").write_text("executor: submitit\nsubmitit-cluster: local\n")
    main(["doctor", "--profile", "profile", "--configfile", "study.yaml", "--directory", "work"])
    shown = "".join(capsys.readouterr().out.split())
    assert f"checkpoint{folder / 'weights'}" in shown


def test_a_directory_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    before = Path.cwd()
    with inside(tmp_path / "none"):
        assert Path.cwd() == before
