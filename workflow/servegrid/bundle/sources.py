"""Where the results come from: the workflow's files as used, its commit, the profile."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PARTS = ("Snakefile", "pyproject.toml", "LICENSE", "CITATION.cff", "workflow", "plugin")
"""Of the repository: what it takes to run a study, without tests and documentation."""
_LIMIT_S = 60.0


def files(root: Path) -> Iterator[tuple[str, Path]]:
    """The name and the path of each file of the workflow below `root`."""
    for part in PARTS:
        yield from _below(root / part, part)


def profile_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The same of a profile, below `profiles/`."""
    yield from _below(folder, f"profiles/{folder.name}")


def profile_folders(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The folders of the profiles that a snakemake command names; none where it names none.

    `arguments` are those of the command, `environment` has SNAKEMAKE_PROFILE where it is set.
    """
    from snakemake.cli import get_profile_dir

    names = environment.get("SNAKEMAKE_PROFILE", "").split(",")
    following = iter(arguments)
    for argument in following:
        option, given, value = argument.partition("=")
        if option in ("--profile", "--workflow-profile"):
            names.append(value if given else next(following, ""))
    found = [get_profile_dir(name) for name in filter(None, names)]
    return list(dict.fromkeys(str(place[0]) for place in found if place is not None))


def commit(root: Path) -> tuple[dict[str, Any], str]:
    """What git says of `root`, and the difference to the commit as a patch.

    `commit` and `changed` are null where git isn't there or `root` is no repository of its own.
    """
    unknown = {"commit": None, "changed": None}, ""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != root.resolve():
        return unknown
    head = _git(root, "rev-parse", "HEAD")
    patch = _git(root, "diff", "--no-ext-diff", "--no-color", "--binary", "HEAD", "--", *PARTS)
    loose = _git(root, "ls-files", "--others", "--exclude-standard", "--", *PARTS)
    if head is None or patch is None or loose is None:
        return unknown
    return {"commit": head.strip(), "changed": bool(patch or loose)}, patch


def _below(path: Path, name: str) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield name, path
        return
    for found in sorted(path.rglob("*")):
        below = found.relative_to(path)
        if found.is_file() and not any(_left_out(part) for part in below.parts):
            yield f"{name}/{below.as_posix()}", found


def _left_out(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__" or part.endswith((".egg-info", ".pyc"))


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, timeout=_LIMIT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
