"""Draws cells of a bundle to measure them again."""

import copy
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import servegrid
from helpers.bundling import STUDY, make_bundle, record_revisions, write_results
from servegrid.bundle.replicate import (
    CellSample,
    draw_cells,
    is_replicable,
    list_valid_cells,
    replicate_cells,
    sample_cells,
)
from servegrid.bundle.unpack import unpack_bundle
from servegrid.cli.main import main
from servegrid.errors import BundleError, ConfigError, ModelError
from servegrid.run.preflight import check_ready
from servegrid.study.config import load_study, parse_study
from servegrid.study.revisions import add_revisions, read_revisions

ROOT = Path(__file__).parents[2]
THREE = copy.deepcopy(STUDY)
THREE["deployments"] = [THREE["deployments"][0] | {"name": name} for name in "abc"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three deployments."""
    folder = tmp_path_factory.mktemp("three")
    write_results(folder, THREE)
    return make_bundle(folder, THREE)


def test_cells_are_drawn_from_as_many_deployments_as_possible(bundle: Path) -> None:
    for count, deployments, cells in ((1, 1, 1), (3, 3, 3), (4, 3, 4), (100, 3, 6)):
        sample = sample_cells(bundle, count)
        study = parse_study(sample.config)
        assert len({trial.deployment.name for trial in study.trials}) == deployments
        assert len({(trial.deployment.name, trial.cell) for trial in study.trials}) == cells
        # Both trials of each cell, and the bundle's figures of them.
        assert len(study.trials) == len(sample.cells) == 2 * cells
        assert {trial.digest for trial in study.trials} == set(sample.cells["spec_digest"])


def test_everybody_draws_the_same_cells_from_a_bundle(bundle: Path) -> None:
    assert sample_cells(bundle, 2).config == sample_cells(bundle, 2).config


def test_a_cell_with_a_trial_that_is_not_valid_is_not_drawn() -> None:
    study = parse_study(THREE)
    digests = [trial.digest for trial in study.trials]
    valid = pd.array([False, *[True] * 10, None], dtype="boolean")
    cells = pd.DataFrame({"spec_digest": digests, "valid": valid})
    found = list_valid_cells(study, cells)
    assert [len(valid_cells) for valid_cells in found.values()] == [1, 2, 1]
    with pytest.raises(BundleError, match="has a valid cell"):
        draw_cells({}, 1, "small-0")


ENDPOINT = {"url": "https://attacker.example", "model": "m", "engine": "vllm"}
UNTRUSTED = {
    "its server gets a secret": {
        "engine": "external",
        "tokenizer": "org/m",
        "endpoint": ENDPOINT | {"api_key_env": "AWS_SECRET_ACCESS_KEY"},
    },
    "its server gets a load": {"engine": "external", "tokenizer": "org/m", "endpoint": ENDPOINT},
    "code of a model": {"engine_args": {"trust_remote_code": True}},
    "a plugin": {"engine_args": {"tool_parser_plugin": "/tmp/x.py"}},
    "a class": {"engine_args": {"worker_cls": "x.Y"}},
    "a plugin in another spelling": {"engine_args": {"tool-parser-plugin": "/tmp/x.py"}},
    "a nested value": {"engine_args": {"quantization": {"plugin": "x"}}},
    "a model in a folder": {"checkpoint": "/tmp/model", "tokenizer": "org/m"},
    "a tokenizer above": {"tokenizer": "../m"},
    "a tokenizer after a new line": {"tokenizer": "org/m\n"},
}


def study_with(*changes: Mapping[str, Any]) -> dict[str, Any]:
    """The small study with one changed deployment per item of `changes`."""
    study = copy.deepcopy(STUDY)
    study["deployments"] = []
    for number, change in enumerate(changes):
        entry = STUDY["deployments"][0] | {"name": f"bad-{number}"} | change
        if entry["engine"] == "external":
            del entry["checkpoint"]
        study["deployments"].append(entry)
    return study


def is_a_study(study: Mapping[str, Any]) -> bool:
    try:
        parse_study(study)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("what", UNTRUSTED)
def test_a_deployment_that_needs_trust_is_not_replicable(what: str) -> None:
    study = study_with(UNTRUSTED[what])
    if is_a_study(study):  # otherwise, no bundle can have it
        (deployment,) = parse_study(study).deployments
        assert not is_replicable(deployment)


def test_a_bundle_cannot_make_a_replication_trust_it(tmp_path: Path) -> None:
    bad = [change for change in UNTRUSTED.values() if is_a_study(study_with(change))]
    assert len(bad) > 5
    study = study_with(*bad, {"name": "good"})
    write_results(tmp_path, study)
    sample = sample_cells(make_bundle(tmp_path, study), 100)
    assert {each.deployment.name for each in parse_study(sample.config).trials} == {"good"}


def test_a_bundle_without_a_replicable_deployment_is_refused(tmp_path: Path) -> None:
    study = copy.deepcopy(STUDY)
    study["deployments"][0]["engine_args"] = {"trust_remote_code": True}
    write_results(tmp_path, study)
    with pytest.raises(BundleError, match="cannot be replicated"):
        sample_cells(make_bundle(tmp_path, study), 1)


@pytest.mark.parametrize("config", ["demo.yaml", "inria-2024.yaml", "rehearsal.yaml"])
def test_the_studies_of_servegrid_can_be_replicated(config: str) -> None:
    assert all(is_replicable(each) for each in load_study(ROOT / "config" / config).deployments)


COMMIT = "2fd4e1c67a2d28fced849ee1bb76e7391b93eb12"
OTHER = "da39a3ee5e6b4b0d3255bfef95601890afd80709"


def bundle_with_revisions(folder: Path, first: str, others: str) -> Path:
    """A bundle of three deployments: the commits of the first record, and of all others."""
    study = copy.deepcopy(THREE)
    for entry in study["deployments"]:
        entry["tokenizer"] = "org/t@v1"
    write_results(folder, study)
    for number, file in enumerate(sorted(folder.rglob("requests.parquet"))):
        commit = others if number else first
        record_revisions(file, revision=commit, tokenizer_revision="c" * 40)
    return make_bundle(folder, study)


class Stopped(Exception):
    """Raised in place of the run."""


def test_a_replication_measures_the_revisions_of_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sample_cells(bundle_with_revisions(tmp_path, COMMIT, COMMIT), 2)
    folder = tmp_path / "replicated"

    def run(command: list[str]) -> None:
        # They are pinned when Snakemake starts: its checks take them from there.
        assert read_revisions(folder / "results") == {"org/m": COMMIT, "org/t@v1": "c" * 40}
        raise Stopped

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(Stopped):
        replicate_cells(sample, tmp_path, folder)
    # Without one of them in the cache, nothing is measured with another one.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    refs = tmp_path / "cache/models--org--m/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(OTHER)
    (refs.parent / "snapshots" / OTHER).mkdir(parents=True)
    study = load_study(folder / "config/study.json")
    with pytest.raises(ModelError, match=rf"no model .* revision {COMMIT} .*`servegrid fetch"):
        check_ready(study, folder / "results/cells")
    # A folder whose lock file has another one is not continued.
    (folder / "results/models.lock.json").unlink()
    add_revisions(folder / "results", {"org/m": OTHER})
    with pytest.raises(BundleError, match=rf"`org/m` has revision {OTHER}, but .* {COMMIT}\. Name"):
        replicate_cells(sample, tmp_path, folder)


def test_cells_of_two_revisions_are_not_replicated(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=rf"revisions {COMMIT} and {OTHER} of `org/m`"):
        sample_cells(bundle_with_revisions(tmp_path, COMMIT, OTHER), 100)


def test_an_unpacked_bundle_keeps_the_revisions_of_its_cells(tmp_path: Path) -> None:
    bundle = bundle_with_revisions(tmp_path, COMMIT, COMMIT)
    folder = unpack_bundle(bundle, tmp_path / "unpacked")
    assert read_revisions(folder / "results") == {"org/m": COMMIT, "org/t@v1": "c" * 40}


@pytest.mark.parametrize("commit", [OTHER, "../../../elsewhere"])
def test_an_unpacked_bundle_does_not_pin_what_it_does_not_know(tmp_path: Path, commit: str) -> None:
    bundle = bundle_with_revisions(tmp_path, COMMIT if commit == OTHER else commit, commit)
    folder = unpack_bundle(bundle, tmp_path / "unpacked")
    assert read_revisions(folder / "results") == {"org/t@v1": "c" * 40}


def test_a_folder_with_another_study_is_left_unchanged(tmp_path: Path) -> None:
    sample = CellSample("small", {"study": "small"}, pd.DataFrame())
    (tmp_path / "config").mkdir()
    (tmp_path / "config/study.json").write_text(json.dumps({"study": "mine"}))
    with pytest.raises(BundleError, match="Name a new folder with --output-dir"):
        replicate_cells(sample, tmp_path, tmp_path)
    assert "mine" in (tmp_path / "config/study.json").read_text()


def test_a_missing_profile_is_reported_before_any_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path / "none.tar.gz"), "--replicate", "1"]) == 2
    assert "also give --profile, the Snakemake profile" in capsys.readouterr().err


def test_the_number_of_cells_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "b.tar.gz", "--replicate", "0"])
    assert "'0' is not an integer above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "message"),
    [("Snakefile", "has no workflow. Clone"), ("snakemake", "Snakemake is not installed")],
)
def test_replication_without_a_workflow_is_refused_with_the_remedy(
    missing: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if missing == "Snakefile":
        monkeypatch.setattr(servegrid, "__file__", str(tmp_path / "lib/servegrid/__init__.py"))
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["verify", str(tmp_path / "b.tar.gz"), "--replicate", "1", "--profile", "p"]
    assert main(command) == 2
    assert message in capsys.readouterr().err
