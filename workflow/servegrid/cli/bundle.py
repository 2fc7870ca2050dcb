"""`servegrid verify` and `servegrid unpack`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from servegrid.cli import arguments
from servegrid.cli.progress import show_progress
from servegrid.errors import BundleError


def add_verify(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "verify",
        help="check that a bundle is complete and its tables follow from its records",
        description="Check a bundle that `snakemake bundle` made. Runs no code from the bundle. "
        "Exit status: 0 if no check failed, 1 if a check failed, 2 if the bundle cannot be read.",
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a .tar.gz file")
    add(
        "--replicate",
        type=arguments.positive_int,
        metavar="N",
        help="then measure N of its cells again; needs a checkout of servegrid and --profile",
    )
    add("--profile", type=Path, metavar="DIR", help="Snakemake profile to measure with")
    add(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="folder of the new measurements; default: NAME-replicated",
    )
    parser.set_defaults(run=_verify)


def add_unpack(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "unpack",
        help="unpack a bundle to continue its study",
        description="Check the hashes of a bundle and unpack it into a new folder, in which the "
        "study can continue.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a .tar.gz file")
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="a new folder; default: the bundle's name, in this folder",
    )
    parser.set_defaults(run=_unpack)


def _verify(options: argparse.Namespace) -> int:
    from servegrid.bundle.check import FAIL
    from servegrid.bundle.replicate import require_workflow
    from servegrid.bundle.verify import verify

    if options.replicate:
        if options.profile is None:
            raise BundleError("--replicate: also give --profile, the Snakemake profile.")
        require_workflow()
    with show_progress("Verifying") as report:
        checks = verify(options.bundle, report)
    for check in checks:
        print(check.format(), flush=True)
    if any(check.status == FAIL for check in checks):
        return 1
    if options.replicate:
        _replicate(options)
    return 0


def _replicate(options: argparse.Namespace) -> None:
    from servegrid.bundle.replicate import replicate_cells, sample_cells
    from servegrid.report.comparison_report import render_comparison_markdown

    sample = sample_cells(options.bundle, options.replicate)
    folder = options.output_dir or Path(f"{sample.name}-replicated")
    comparison = replicate_cells(sample, options.profile, folder)
    text = render_comparison_markdown(["the bundle", str(folder)], comparison)
    print(f"\n{text}", end="")


def _unpack(options: argparse.Namespace) -> int:
    from servegrid.bundle.replicate import find_snakefile
    from servegrid.bundle.unpack import unpack_bundle

    with show_progress("Unpacking"):
        folder = unpack_bundle(options.bundle, options.folder)
    # Without a checkout, the user has to name the Snakefile of one.
    snakefile = find_snakefile() or "PATH-OF-SERVEGRID/Snakefile"
    print(
        f"{folder} contains the study. To continue it, run:\n"
        f"  snakemake --snakefile {snakefile} --profile … --directory {folder} "
        f"--configfile {folder / 'config/study.json'}\n"
        "This measures only missing trials. If you do not know the author, first read "
        f"{folder / 'config/study.json'}: it names models, engine arguments and URLs."
    )
    return 0
