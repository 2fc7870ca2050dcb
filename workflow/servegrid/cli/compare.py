"""`servegrid compare`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from servegrid.report import markup

FAILED = 1


def add_compare(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "compare",
        help="hold two studies against each other, with tests",
        description="Compares two studies, each a folder of results or a bundle: the ratio of "
        "their output tokens/s per cell and deployment, with a verdict. The status is 1 if "
        "--fail-on holds, 2 if they cannot be compared.",
    )
    add = parser.add_argument
    add("first", type=Path, metavar="A", help="what to hold against")
    add("second", type=Path, metavar="B", help="what is judged: is B faster or slower than A?")
    add(
        "--fail-on",
        type=_condition,
        metavar="slower:5%",
        help="end with 1 where a deployment of B is slower, by verdict and by more than that",
    )
    add(
        "--allow-mixed",
        action="store_true",
        help="compare even emulated figures, or those of other clients, with one's own",
    )
    add("--page", type=Path, metavar="FILE", help="write an HTML page as well")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from servegrid.analysis.comparison import compare, slowed
    from servegrid.bundle.cells import cells_of
    from servegrid.report.comparison_report import markdown, page

    first, second = cells_of(options.first), cells_of(options.second)
    found = compare(first, second, options.allow_mixed)
    names = [str(options.first), str(options.second)]
    print(markdown(names, found), end="")
    if options.page:
        markup.write({options.page: page(names, found)})
    if options.fail_on is None:
        return 0
    failed = slowed(found, options.fail_on)
    for each in failed:
        print(f"Slower by more than {options.fail_on:.3g}: {each.name}, {each.ratio:.3f} ×")
    return FAILED if failed else 0


def _condition(text: str) -> float:
    match = re.fullmatch(r"slower:(\d+(?:\.\d+)?)%", text)
    if match is None or not 0 <= float(match[1]) < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not like slower:5%")
    return float(match[1]) / 100
