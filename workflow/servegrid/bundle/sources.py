"""Finds the sources of a study's results: the workflow's files, its commit, the profiles."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PARTS = ("Snakefile", "pyproject.toml", "LICENSE", "CITATION.cff", "workflow", "plugin")
"""Files and folders of the repository that run a study: no tests, no documentation."""
_LIMIT_S = 60.0


def list_source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """The name and the path of each file of the workflow below `root`."""
    for part in PARTS:
        yield from _list_below(root / part, part)


def list_profile_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The name below `profiles/` and the path of each file of a profile."""
    yield from _list_below(folder, f"profiles/{folder.name}")


def find_profile_folders(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The folders of the profiles that a Snakemake command uses.

    `arguments` are the command's arguments, `environment` may have SNAKEMAKE_PROFILE.
    """
    from snakemake.cli import get_profile_dir

    names = environment.get("SNAKEMAKE_PROFILE", "").split(",")
    remaining = iter(arguments)
    for argument in remaining:
        option, equals_sign, value = argument.partition("=")
        if option in ("--profile", "--workflow-profile"):
            names.append(value if equals_sign else next(remaining, ""))
    found = [get_profile_dir(name) for name in filter(None, names)]
    return list(dict.fromkeys(str(profile[0]) for profile in found if profile is not None))


def describe_commit(root: Path) -> tuple[dict[str, Any], str]:
    """The commit of the repository `root`, and the difference to the commit as a patch.

    `commit` and `changed` are null if git is not installed or `root` is not a repository's root.
    """
    unknown = {"commit": None, "changed": None}, ""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != root.resolve():
        return unknown
    head = _git(root, "rev-parse", "HEAD")
    patch = _git(root, "diff", "--no-ext-diff", "--no-color", "--binary", "HEAD", "--", *PARTS)
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "--", *PARTS)
    if head is None or patch is None or untracked is None:
        return unknown
    return {"commit": head.strip(), "changed": bool(patch or untracked)}, patch


def _list_below(path: Path, name: str) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield name, path
        return
    for file in sorted(path.rglob("*")):
        below = file.relative_to(path)
        if file.is_file() and not any(_is_ignored(part) for part in below.parts):
            yield f"{name}/{below.as_posix()}", file


def _is_ignored(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__" or part.endswith((".egg-info", ".pyc"))


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, timeout=_LIMIT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
