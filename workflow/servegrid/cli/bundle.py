"""`servegrid verify` and `servegrid unpack`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import servegrid
from servegrid.errors import BundleError


def add_verify(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "verify",
        help="check a bundle: that it is whole, and that its tables follow from its records",
        description="Checks a bundle that `snakemake … bundle` has made, without running anything "
        "that it holds. The status is 1 if a check failed, 2 if there is no such file.",
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a .tar.gz")
    add(
        "--replicate",
        type=_positive,
        metavar="N",
        help="then measure N of its cells again, with this repository's own workflow",
    )
    add("--profile", type=Path, metavar="DIR", help="where to measure them, as for snakemake")
    add(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="where they are kept; default: NAME-replicated",
    )
    parser.set_defaults(run=_verify)


def add_open(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "unpack",
        help="unpack a bundle into a new folder, in which the study goes on",
        description="Unpacks a bundle safely, after its integrity has been checked.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a .tar.gz")
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="DIR", help="a new folder; default: its own name"
    )
    parser.set_defaults(run=_open)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of cells")
    return number


def _verify(options: argparse.Namespace) -> int:
    from servegrid.bundle.verify import FAIL, verify

    if options.replicate and options.profile is None:
        raise BundleError("--replicate: name the --profile to measure with, as for snakemake.")
    checks = verify(options.bundle)
    for check in checks:
        print(check.told(), flush=True)
    if any(check.status == FAIL for check in checks):
        return 1
    if options.replicate:
        _replicate(options)
    return 0


def _replicate(options: argparse.Namespace) -> None:
    from servegrid.bundle.replicate import draw, measure
    from servegrid.report.comparison_report import markdown

    drawn = draw(options.bundle, options.replicate)
    folder = options.output_dir or Path(f"{drawn.name}-replicated")
    told = markdown(["the bundle", str(folder)], measure(drawn, options.profile, folder))
    print(f"\n{told}", end="")


def _open(options: argparse.Namespace) -> int:
    from servegrid.bundle.opening import open_bundle

    folder = open_bundle(options.bundle, options.folder)
    own = Path(servegrid.__file__).parents[2] / "Snakefile"
    snakefile = own if own.exists() else "…/Snakefile"
    print(
        f"{folder} is the study. It goes on there, its trials are not measured again:\n"
        f"  snakemake --snakefile {snakefile} --profile … --directory {folder} "
        f"--configfile {folder / 'config/study.json'}\n"
        "The workflow that measured it is there too; look at it before you run it."
    )
    return 0
