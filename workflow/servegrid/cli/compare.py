"""`servegrid compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from servegrid.cli import arguments
from servegrid.errors import ComparisonError

SLOWER = 1
"""The exit status if --fail-on holds."""


def add_compare(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "compare",
        help="test whether one study is faster or slower than another",
        description="Compare the output tokens/s of two studies per cell and per deployment, and "
        "report for each: faster, slower, no evidence or not tested. A study is a folder of "
        "results or a bundle. Exit status: 0; 1 if --fail-on holds; 2 if the studies cannot be "
        "compared, or if --fail-on is given and a deployment cannot be tested.",
    )
    add = parser.add_argument
    add("first", type=Path, metavar="A", help="the baseline")
    add("second", type=Path, metavar="B", help="the study that is tested against A")
    add(
        "--fail-on",
        type=arguments.slowdown,
        metavar="slower:5%",
        help="exit with 1 if a deployment of B is significantly slower, by more than 5%%",
    )
    add(
        "--allow-mixed",
        action="store_true",
        help="allow comparing emulated or imported results with measured ones, and outputs that "
        "may stop early with exact ones",
    )
    add("--page", type=Path, metavar="FILE", help="also write an HTML page")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from servegrid.analysis.comparison import MIN_BRING_UPS, compare, find_regressions
    from servegrid.bundle.cells import load_cells
    from servegrid.report import markup
    from servegrid.report.comparison_report import (
        render_comparison_markdown,
        render_comparison_page,
    )

    first, second = load_cells(options.first), load_cells(options.second)
    comparison = compare(first, second, options.allow_mixed)
    names = [str(options.first), str(options.second)]
    print(render_comparison_markdown(names, comparison), end="")
    if options.page:
        markup.write_texts({options.page: render_comparison_page(names, comparison)})
    if options.fail_on is None:
        return 0
    failed = find_regressions(comparison, options.fail_on)
    limit = f"{100 * options.fail_on:.3g}%"
    for ratio in failed:
        print(f"Slower by more than {limit}: {ratio.name}, {ratio.ratio:.3f} ×")
    if failed:
        return SLOWER
    untested = [ratio.name for ratio in comparison.deployments if ratio.p is None]
    if untested:
        raise ComparisonError(
            f"--fail-on: {', '.join(untested)} cannot be tested, because a study has fewer than "
            f"{MIN_BRING_UPS} bring-ups. Set `bring_ups: 3` under `workload` in both studies."
        )
    return 0
