"""`servegrid frontier`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from servegrid.cli.arguments import add_directory


def add_frontier(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "frontier",
        help="show the largest load that meets the SLO, as far as it is measured",
        description="Show for each deployment and prompt length the largest load (concurrency or "
        "request rate) that meets the study's SLO, what is still open, and the cell that the "
        "search would measure next. If a cell meets the SLO, lighter ones count as meeting it. If "
        "it misses the SLO, heavier ones count as missing it. Of several SLO classes, the first is "
        "used. Nothing is started: to measure what is missing, run the study with `grid: "
        "frontier`. Exit status: 0; 1 if a frontier is not complete; 2 if the study or a "
        "record cannot be read.",
    )
    add = parser.add_argument
    add("--configfile", required=True, type=Path, metavar="FILE", help="a study")
    add("--deployment", metavar="NAME", help="only this deployment; default: all")
    add_directory(parser)
    parser.set_defaults(run=_frontier)


NOT_COMPLETE = 1
"""The exit status if a frontier is not complete."""


def _frontier(options: argparse.Namespace) -> int:
    from servegrid.analysis.search import Search, load_measured, make_predict
    from servegrid.analysis.slo import parse_slo
    from servegrid.errors import ConfigError
    from servegrid.reference.checkpoint import find_model
    from servegrid.report.frontier_report import render_frontier
    from servegrid.study import config, models
    from servegrid.study.directory import inside
    from servegrid.study.revisions import read_revisions

    study, settings = config.load_both(options.configfile, options.directory)
    slo = parse_slo(settings)
    names = [deployment.name for deployment in study.deployments]
    if options.deployment is not None and options.deployment not in names:
        raise ConfigError(
            f"--deployment {options.deployment}: the study has no such deployment. It has: "
            f"{', '.join(names)}."
        )
    results = options.directory / "results"
    revisions, cores = read_revisions(results), len(os.sched_getaffinity(0))
    texts, complete = [], True
    for name in names if options.deployment is None else [options.deployment]:
        trials = [trial for trial in study.trials if trial.deployment.name == name]
        with inside(options.directory):
            facts = find_model(trials[0].deployment, models.default_folder(), revisions)
        predict = make_predict(trials[0], facts, cores)
        for bring_up in sorted({trial.bring_up for trial in trials}):
            group = tuple(trial for trial in trials if trial.bring_up == bring_up)
            measured = load_measured(group, results / "cells", slo, study.drift_checks)
            search = Search(group, slo, measured, predict)
            upcoming = search.next_trial({trial.id for trial in group})
            complete &= search.is_complete
            texts.append(render_frontier(search, upcoming))
    print("\n".join(texts), end="")
    return 0 if complete else NOT_COMPLETE
