"""Cells of a bundle drawn to be measured again."""

import copy
import json
from pathlib import Path

import pandas as pd
import pytest

from helpers.bundling import STUDY, bundle_of, write_results
from servegrid.bundle.replicate import Drawn, draw, drawn_cells, measure, valid_cells
from servegrid.cli.main import main
from servegrid.errors import BundleError
from servegrid.study.config import study_of

THREE = copy.deepcopy(STUDY)
THREE["deployments"] = [THREE["deployments"][0] | {"name": name} for name in "abc"]


def test_cells_are_drawn_from_as_many_deployments_as_can_be(tmp_path: Path) -> None:
    write_results(tmp_path, THREE)
    bundle = bundle_of(tmp_path, THREE)
    for count, deployments, cells in ((1, 1, 1), (3, 3, 3), (4, 3, 4), (100, 3, 6)):
        drawn = draw(bundle, count)
        study = study_of(drawn.config)
        assert len({trial.deployment.name for trial in study.trials}) == deployments
        assert len({(trial.deployment.name, trial.cell) for trial in study.trials}) == cells
        # Both trials of each, and the bundle's own figures of them.
        assert len(study.trials) == len(drawn.cells) == 2 * cells
        assert {trial.digest for trial in study.trials} == set(drawn.cells["spec_digest"])


def test_everybody_draws_the_same_from_a_bundle(tmp_path: Path) -> None:
    write_results(tmp_path, THREE)
    bundle = bundle_of(tmp_path, THREE)
    assert draw(bundle, 2).config == draw(bundle, 2).config


def test_a_cell_with_a_trial_that_may_not_be_believed_is_not_drawn() -> None:
    study = study_of(THREE)
    digests = [trial.digest for trial in study.trials]
    believed = pd.array([False, *[True] * 10, None], dtype="boolean")
    cells = pd.DataFrame({"spec_digest": digests, "valid": believed})
    found = valid_cells(study, cells)
    assert [len(own) for own in found.values()] == [1, 2, 1]
    with pytest.raises(BundleError, match="no cell of it is valid"):
        drawn_cells({}, 1, "small-0")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    drawn = Drawn("small", {"study": "small"}, pd.DataFrame())
    (tmp_path / "config").mkdir()
    (tmp_path / "config/study.json").write_text(json.dumps({"study": "mine"}))
    with pytest.raises(BundleError, match="Name a new folder with --output-dir"):
        measure(drawn, tmp_path, tmp_path)
    assert "mine" in (tmp_path / "config/study.json").read_text()


def test_a_profile_is_asked_for_before_anything_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path / "none.tar.gz"), "--replicate", "1"]) == 2
    assert "name the --profile to measure with" in capsys.readouterr().err


def test_a_number_of_cells_is_at_least_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "b.tar.gz", "--replicate", "0"])
    assert "0 is not a number of cells" in capsys.readouterr().err
