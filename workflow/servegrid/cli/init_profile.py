"""`servegrid init-profile`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from servegrid.errors import ConfigError

PROFILES = Path("profiles")


def add_init_profile(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "init-profile",
        help="write a profile for this cluster from what Slurm says about it",
        description="Ask Slurm on a login node for its partitions, nodes, accounts and limits, "
        "write profiles/NAME/ with a comment for each choice, and check it as `servegrid doctor` "
        "does. Submits nothing and replaces nothing. Exit status: 0 if no check failed, 1 if a "
        "check failed, 2 if no profile was written.",
    )
    parser.add_argument(
        "name", metavar="NAME", help="name of the profile, such as that of the cluster"
    )
    parser.set_defaults(run=_init_profile)


def _init_profile(options: argparse.Namespace) -> int:
    from servegrid.cli.doctor import print_findings
    from servegrid.doctor import propose_profile, run_checks
    from servegrid.doctor.profile_files import check_name, render_files

    check_name(options.name)
    folder = PROFILES / options.name
    if folder.exists():
        raise ConfigError(f"{folder}: exists. Use another name, or delete the folder first.")
    proposal = propose_profile()
    write_folder(folder, render_files(options.name, folder, proposal))
    for kind in proposal.kinds:
        print(f"{kind.name}: {kind.about}")
    for note in proposal.notes:
        print(f"no kind for {note}")
    print(f"\nWritten: {folder}. Read the comments in {folder / 'kinds.yaml'}.\n")
    return print_findings(run_checks(folder, None, Path()))


def write_folder(folder: Path, files: dict[str, str]) -> None:
    """Write a new folder completely or not at all. Raises ConfigError if that is impossible."""
    try:
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as made:
            new = Path(made) / folder.name
            new.mkdir()
            for name, text in files.items():
                (new / name).write_text(text, encoding="utf-8")
            new.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}). Run this command in a folder that "
            "you can write to."
        ) from error
