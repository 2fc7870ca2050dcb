"""`servegrid capacity`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servegrid.cli import arguments
from servegrid.errors import ConfigError
from servegrid.reference.published import load_published

if TYPE_CHECKING:
    from servegrid.analysis.capacity import Demand


def add_capacity(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "capacity",
        help="plan the hardware that your users need",
        description="Print the capacity plan as Markdown, from the tables of a study or from "
        "published data. An assumption that is not an option comes from --configfile; otherwise "
        "it has its default.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group().add_argument
    tables = Path("results/tables")
    source("--tables", type=Path, default=tables, metavar="DIR", help="default: results/tables")
    source(
        "--published",
        metavar="NAME",
        help="plan from published data: inria-2024, or the path of a CSV file",
    )
    add("--configfile", type=Path, metavar="FILE", help="a study; its slo and capacity are used")
    add(
        "--hardware",
        type=Path,
        metavar="FILE",
        help="prices; default: config/hardware.yaml if it exists, else those of this package",
    )
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="a trace of users, as in `capacity.users_from`: its request rate at the busiest time "
        "instead of --users and --logged-in, its prompt lengths and its mean output length",
    )
    add("--users", type=arguments.positive_int, metavar="N", help="registered users")
    add(
        "--logged-in",
        type=arguments.fraction,
        metavar="X",
        help="fraction of the users that is logged in at the busiest time",
    )
    add(
        "--think-time",
        type=arguments.positive_float,
        dest="think_time_s",
        metavar="S",
        help="mean seconds between a response and the same user's next request",
    )
    add(
        "--load-factor",
        type=arguments.fraction,
        metavar="X",
        help="mean load of a week as a fraction of that at the busiest time, for costs per token",
    )
    add(
        "--slo-attainment",
        type=arguments.fraction_below_one,
        metavar="X",
        help="fraction of requests that must meet the SLO",
    )
    add(
        "--tokens-per-s-per-user",
        type=arguments.positive_float,
        metavar="V",
        help="the SLO: minimum output tokens/s of each user, including the time to first token",
    )
    add(
        "--ttft",
        type=arguments.positive_float,
        dest="ttft_s",
        metavar="S",
        help="the SLO: maximum median time to first token in seconds; default: no limit",
    )
    add(
        "--e2el",
        type=arguments.positive_float,
        dest="e2el_s",
        metavar="S",
        help="the SLO: maximum median end-to-end latency in seconds; default: no limit",
    )
    add(
        "--tpot",
        type=arguments.positive_float,
        dest="tpot_s",
        metavar="S",
        help="the SLO: maximum median time per output token in seconds; default: no limit",
    )
    add(
        "--itl",
        type=arguments.positive_float,
        dest="itl_s",
        metavar="S",
        help="the SLO: maximum of the longest inter-token latency of a request (median) in "
        "seconds; default: no limit",
    )
    add(
        "--slo-class", metavar="NAME", help="SLO class of the study to plan for; default: the first"
    )
    prompts = parser.add_mutually_exclusive_group().add_argument
    prompts(
        "--input-len",
        type=arguments.positive_int,
        metavar="I",
        help="prompt tokens; default: all measured lengths in equal shares",
    )
    prompts(
        "--prompt-mix",
        type=arguments.prompt_mix,
        metavar="I:X,…",
        help="several prompt lengths with their shares, such as 31:3,119:1",
    )
    parser.set_defaults(run=_capacity)


def _find_demand(demands: Sequence[Demand], name: str | None) -> Demand:
    """The demand of the SLO class `name`, or of the first. Raises ConfigError if there is none."""
    by_name = {demand.slo_class: demand for demand in demands}
    if name is not None and name not in by_name:
        raise ConfigError(
            f"--slo-class: the study has no SLO class `{name}`. It has: {', '.join(by_name)}."
        )
    return demands[0] if name is None else by_name[name]


def _names(record: Any) -> set[str]:
    return {field.name for field in fields(record)}


def _capacity(options: argparse.Namespace) -> int:
    from servegrid.analysis import capacity, published, tables
    from servegrid.analysis.summary import lacks_low_loads
    from servegrid.records import columns
    from servegrid.reference.hardware import find_hardware_file
    from servegrid.report import capacity_report
    from servegrid.study import config
    from servegrid.study.recorded_users import read_recorded

    study = config.load_settings(options.configfile)
    given = {name: getattr(options, name) for name in _names(capacity.Demand) & set(vars(options))}
    demand = _find_demand(capacity.parse_demands(study), options.slo_class)
    if options.trace:  # instead of the study's users
        keys = {"kind": "trace", "path": str(options.trace)}
        demand = capacity.with_recorded(demand, read_recorded(keys, named="--trace"))
    if demand.requests_per_s is not None and (options.users or options.logged_in):
        raise ConfigError(
            "--users, --logged-in: the trace has a request rate instead. Remove these options."
        )
    if options.prompt_mix or options.input_len:  # instead of the study's prompts
        demand = replace(demand, input_len=None, prompt_mix=None)
    demand = replace(demand, **{name: value for name, value in given.items() if value is not None})
    if options.think_time_s:  # instead of the trace's
        demand = replace(demand, cycle_s=None)
    hardware = capacity.load_prices(options.hardware or find_hardware_file())
    if options.published is not None:
        summary = published.published_summary(load_published(options.published))
    else:
        summary = tables.load_table(options.tables / "summary.parquet", columns.SUMMARY)
    plan = capacity.plan_capacity(summary, demand, hardware)
    sparse = lacks_low_loads(summary)
    print(capacity_report.render_capacity_report(plan, demand, hardware, sparse))
    if options.published is not None:
        print(capacity_report.render_rule_of_thumb())
    return 0
