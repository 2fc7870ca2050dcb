"""`servegrid frontier` shows what is measured, what follows from it, and what is next."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helpers.deployments import EMULATED_ENTRY
from servegrid.analysis.search import Figures, Search
from servegrid.analysis.slo import Slo
from servegrid.cli.main import main
from servegrid.report.frontier_report import render_frontier
from servegrid.study.config import parse_study

STUDY = {
    "study": "s",
    "workload": {"concurrency": [1, 2, 4], "input_len": [31, 119], "grid": "frontier"},
    "deployments": [{**EMULATED_ENTRY, "name": "d"}],
}


def test_the_frontier_as_text() -> None:
    study = parse_study(STUDY)
    near = study.trial("d", "burst-c2-i31-o100", 1)
    far = study.trial("d", "burst-c1-i119-o100", 1)
    measured = {near.id: Figures(1.02, None), far.id: Figures(3.0, None)}
    search = Search(study.trials, Slo(), measured)
    assert render_frontier(search, search.next_trial({each.id for each in study.trials})) == (
        "d: 2 of 6 cells measured, 2 trials. SLO: 5 tokens/s.\n"
        "\n"
        "Burst, 100 output tokens per request; concurrent requests:\n"
        "  prompt tokens  largest load that meets the SLO  smallest that misses it\n"
        "             31                                1                        –  not known yet\n"
        "            119                                1                        –  not known yet\n"
        "\n"
        "Next: burst-c2-i31-o100, trial 2.\n"
    )


def test_trials_that_are_not_valid_are_counted() -> None:
    study = parse_study(STUDY)
    low, high = (study.trial("d", f"burst-c{load}-i31-o100", 1) for load in (1, 4))
    measured = {low.id: Figures(3.0, None), high.id: Figures(0.5, None, breaks_rules=True)}
    text = render_frontier(Search(study.trials, Slo(), measured), None)
    assert "\nNot valid: 1 of 2 trials. They count here, but not in the findings" in text
    del measured[high.id]
    assert "Not valid" not in render_frontier(Search(study.trials, Slo(), measured), None)


def test_the_command_names_the_first_cell_and_says_that_the_frontier_is_not_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    arguments = ["frontier", "--configfile", str(file), "--directory", str(tmp_path)]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert "d: 0 of 6 cells measured" in shown and "Next: burst-c" in shown
    assert main([*arguments, "--deployment", "e"]) == 2
    assert "no such deployment. It has: d." in capsys.readouterr().err
