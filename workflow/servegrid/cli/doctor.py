"""`servegrid doctor`."""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servegrid.cli import arguments

if TYPE_CHECKING:
    from servegrid.doctor.report import Finding


def add_doctor(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "doctor",
        help="check a profile and its cluster before the first study",
        description="Check on a login node that a study can run: profile, Slurm, files, "
        "environments and models. Submits nothing without --network. Exit status: 0 if no check "
        "failed, 1 if a check failed, 2 if the profile or the study cannot be read.",
    )
    add = parser.add_argument
    add(
        "--profile",
        required=True,
        type=Path,
        metavar="DIR",
        help="a profile, such as profiles/plafrim",
    )
    add("--configfile", type=Path, metavar="FILE", help="a study, such as config/inria-2024.yaml")
    add(
        "--directory",
        type=arguments.folder,
        default=Path(),
        metavar="DIR",
        help="working directory of the study, as for snakemake: it will contain results/, and "
        "paths in the study are relative to it; default: this folder",
    )
    add(
        "--network",
        metavar="KIND",
        help="also list the interfaces of two nodes of this kind, and measure the network between "
        "them, in an allocation of a few seconds",
    )
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from servegrid.doctor import run_checks

    checks = run_checks(options.profile, options.configfile, options.directory, options.network)
    return print_findings(checks)


def print_findings(checks: Iterator[Finding]) -> int:
    """Print each group of findings as soon as it is complete. Returns the exit status."""
    from servegrid.doctor import report

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    findings = []
    for _, of_group in itertools.groupby(checks, key=lambda finding: finding.group):
        group = list(of_group)
        findings += group
        print(report.format_findings(group, width), end="\n\n", flush=True)
    print(report.format_counts(findings))
    return report.exit_status(findings)
