"""Draws cells of a bundle to measure them again."""

import copy
import json
from pathlib import Path

import pandas as pd
import pytest

import servegrid
from helpers.bundling import STUDY, make_bundle, write_results
from servegrid.bundle.replicate import (
    CellSample,
    draw_cells,
    list_valid_cells,
    replicate_cells,
    sample_cells,
)
from servegrid.cli.main import main
from servegrid.errors import BundleError
from servegrid.study.config import parse_study

THREE = copy.deepcopy(STUDY)
THREE["deployments"] = [THREE["deployments"][0] | {"name": name} for name in "abc"]


def test_cells_are_drawn_from_as_many_deployments_as_possible(tmp_path: Path) -> None:
    write_results(tmp_path, THREE)
    bundle = make_bundle(tmp_path, THREE)
    for count, deployments, cells in ((1, 1, 1), (3, 3, 3), (4, 3, 4), (100, 3, 6)):
        sample = sample_cells(bundle, count)
        study = parse_study(sample.config)
        assert len({trial.deployment.name for trial in study.trials}) == deployments
        assert len({(trial.deployment.name, trial.cell) for trial in study.trials}) == cells
        # Both trials of each cell, and the bundle's figures of them.
        assert len(study.trials) == len(sample.cells) == 2 * cells
        assert {trial.digest for trial in study.trials} == set(sample.cells["spec_digest"])


def test_everybody_draws_the_same_cells_from_a_bundle(tmp_path: Path) -> None:
    write_results(tmp_path, THREE)
    bundle = make_bundle(tmp_path, THREE)
    assert sample_cells(bundle, 2).config == sample_cells(bundle, 2).config


def test_a_cell_with_a_trial_that_is_not_valid_is_not_drawn() -> None:
    study = parse_study(THREE)
    digests = [trial.digest for trial in study.trials]
    valid = pd.array([False, *[True] * 10, None], dtype="boolean")
    cells = pd.DataFrame({"spec_digest": digests, "valid": valid})
    found = list_valid_cells(study, cells)
    assert [len(valid_cells) for valid_cells in found.values()] == [1, 2, 1]
    with pytest.raises(BundleError, match="has no valid cell"):
        draw_cells({}, 1, "small-0")


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
    assert "needs --profile, the profile to measure with" in capsys.readouterr().err


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
