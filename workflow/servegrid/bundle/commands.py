"""`servegrid verify` and `servegrid open`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import servegrid


def add_verify(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "verify",
        help="check a bundle: that it is whole, and that its tables follow from its records",
        description="Checks a bundle that `snakemake … bundle` has made, without running anything "
        "that it holds. The status is 1 if a check failed, 2 if there is no such file.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a .tar.gz")
    parser.set_defaults(run=_verify)


def add_open(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "open",
        help="unpack a bundle into a new folder, in which the study goes on",
        description="Unpacks a bundle safely, after its integrity has been checked.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a .tar.gz")
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="DIR", help="a new folder; default: its own name"
    )
    parser.set_defaults(run=_open)


def _verify(options: argparse.Namespace) -> int:
    from servegrid.bundle.verify import FAIL, verify

    checks = verify(options.bundle)
    for check in checks:
        print(check.told())
    return 1 if any(check.status == FAIL for check in checks) else 0


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
