"""`servegrid plan`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servegrid.cli.arguments import add_directory

if TYPE_CHECKING:
    from servegrid.analysis.plan import Site
    from servegrid.study.grid import Study


def add_plan(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "plan",
        help="predict what a study will take, before it is submitted",
        description="Predict for each deployment and cell of a study whether it fits into memory, "
        "how long it takes, and what it costs. Nothing is started. docs/prediction.md says how "
        "far the predictions hold. Exit status: 0; 1 if a deployment cannot work; 2 if the study, "
        "the profile or a record cannot be read.",
    )
    add = parser.add_argument
    add("--configfile", required=True, type=Path, metavar="FILE", help="a study")
    add(
        "--profile",
        type=Path,
        metavar="DIR",
        help="a profile, such as profiles/plafrim, for its nodes and its time limit",
    )
    add_directory(parser)
    add(
        "--hardware",
        type=Path,
        metavar="FILE",
        help="prices; default: config/hardware.yaml if it exists, else those of this package",
    )
    add("--cells", action="store_true", help="show each cell with its interval and its arithmetic")
    add(
        "--json",
        action="store_true",
        help="print JSON, with all cells: sizes in bytes, times in seconds, energy in kWh",
    )
    add(
        "--review",
        action="store_true",
        help="compare the predictions with the finished cells instead",
    )
    parser.set_defaults(run=_plan)


CANNOT_WORK = 1
"""The exit status if a deployment cannot work."""


def _plan(options: argparse.Namespace) -> int:
    from servegrid.analysis import earlier
    from servegrid.analysis.capacity import load_prices
    from servegrid.analysis.plan import own_tables, plan_study
    from servegrid.analysis.predictor import load_calibration, refit
    from servegrid.analysis.review import add_measured, review_study
    from servegrid.analysis.slo import parse_slo
    from servegrid.errors import RecordError
    from servegrid.reference.checkpoint import find_model
    from servegrid.reference.hardware import find_hardware_file
    from servegrid.report import plan_report
    from servegrid.study import config, models
    from servegrid.study.directory import inside
    from servegrid.study.revisions import read_revisions

    study, settings = config.load_both(options.configfile, options.directory)
    _check_emulated(study, options)
    site = _read_site(options.profile, study)
    prices = load_prices(options.hardware or find_hardware_file())
    results = options.directory / "results"
    revisions = read_revisions(results)
    folder = models.default_folder()
    with inside(options.directory):
        facts = {each.name: find_model(each, folder, revisions) for each in study.deployments}
    measured, cells = earlier.load_measured(study, results)
    if options.review:
        if cells is None:
            raise RecordError(
                f"{results}: no cell of this study is finished. Run the study first, or name the "
                "folder that contains its results/ with --directory."
            )
        blind = plan_study(study, facts, load_calibration(), site)
        reviews = review_study(blind, cells)
        render = plan_report.review_json if options.json else plan_report.render_review
        print(render(study.name, reviews).rstrip("\n"))
        return 0
    bursts = earlier.earlier_bursts(study, cells)
    calibration = refit(load_calibration(), own_tables(study, facts, site, bursts))
    done = frozenset(trial.id for trial in measured)
    plan = plan_study(study, facts, calibration, site, done, bursts, parse_slo(settings))
    plan = add_measured(plan, cells)
    if options.json:
        print(plan_report.plan_json(plan, prices))
    else:
        print(plan_report.render_plan(plan, prices, options.cells), end="")
    return CANNOT_WORK if any(each.problem for each in plan.deployments) else 0


def _check_emulated(study: Study, options: argparse.Namespace) -> None:
    """Raise ConfigError if the arguments of an emulated engine are wrong, as a run does."""
    from servegrid.engines.emulated import parse_settings
    from servegrid.errors import ConfigError
    from servegrid.study.deployment import EMULATED
    from servegrid.study.directory import inside

    try:
        with inside(options.directory):
            for deployment in study.deployments:
                if deployment.engine == EMULATED:
                    parse_settings(deployment)
    except ConfigError as error:
        raise ConfigError(f"{options.configfile}: {error}") from None


def _read_site(profile_folder: Path | None, study: Study) -> Site:
    """What the profile says about nodes and time; without one, this machine."""
    from servegrid.analysis.plan import Site
    from servegrid.doctor.profile import Profile, count_nodes, get_number, parse_minutes
    from servegrid.errors import ConfigError
    from servegrid.node.environment import find_vllm
    from servegrid.study.deployment import CPU
    from servegrid.study.nodes import site_problem

    cores = len(os.sched_getaffinity(0))
    if profile_folder is None:
        return Site(cores)
    profile = Profile.load(profile_folder)
    for deployment in study.deployments:
        if profile.kinds and deployment.node_kind not in profile.kinds:
            raise ConfigError(
                f"{profile.kinds_file}: has no kind `{deployment.node_kind}`, which the deployment "
                f"`{deployment.name}` needs. Add it, or change `gpu` in the study."
            )
    whole = {
        kind: int(get_number(parameters, "gpus_of_node", 0))
        for kind, parameters in profile.kinds.items()
        if parameters.get("slurm_exclusive")
    }
    runtime = profile.resources("measure").get("runtime")
    minutes = None if runtime is None else parse_minutes(runtime)
    of_cpu = int(get_number(profile.kinds.get(CPU, {}), "cpus_per_task", cores))
    nodes, problems = {}, {}
    for deployment in study.deployments:
        kind = profile.kinds.get(deployment.node_kind, {})
        nodes[deployment.name] = count_nodes(deployment, kind)
        file = f"{profile.kinds_file}: {deployment.node_kind}"
        problem = site_problem(deployment, nodes[deployment.name], kind, file, find_vllm(kind))
        if problem is not None:
            problems[deployment.name] = problem
    return Site(of_cpu, whole, None if minutes is None else 60 * minutes, nodes, problems)
