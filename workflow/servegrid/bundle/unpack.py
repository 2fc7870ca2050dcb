"""Unpacks a bundle into a folder in which its study continues."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from servegrid.bundle import tarball
from servegrid.bundle.integrity import find_integrity_problems
from servegrid.bundle.layout import CELLS, RECORDS
from servegrid.bundle.limits import limited_memory
from servegrid.errors import BundleError
from servegrid.run.revisions import commits_by_name
from servegrid.study.revisions import add_revisions

_OLD_S, _RECORDS_S = 1, 2
"""Modification times. Records are newer than the tables. Snakemake ignores a time of 0."""


def unpack_bundle(archive: Path, folder: Path | None = None) -> Path:
    """Unpack `archive` into the new folder `folder` and return it.

    The default is a folder in the working directory with the bundle's name. The records get a later
    date than the tables: Snakemake has no metadata there that shows that the code or the study has
    changed, and so derives tables and figures again. Records depend on no file, so they are not
    measured again. The lock file gets the revisions of the records, so that everything measured
    there has the same weights. Raises BundleError if the bundle is damaged or not safe, or if the
    folder exists; then nothing is left behind.
    """
    tarball.check_is_file(archive)
    if folder is not None:
        _check_is_new(folder)
    parent = folder.parent if folder is not None else Path()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".servegrid-", dir=parent) as temporary:
            return _unpack(archive, folder, Path(temporary) / "tree")
    except OSError as error:
        raise BundleError(
            f"{folder or parent.absolute()}: cannot be written ({error.strerror or error}). Name a "
            "folder that you can write to, or free some space."
        ) from error


def _unpack(archive: Path, folder: Path | None, tree: Path) -> Path:
    """Unpack to the new folder `tree`, and move it to `folder`, which is returned."""
    tree.mkdir()
    unpacked = tarball.unpack_archive(archive, tree)
    problems = find_integrity_problems(tree, unpacked)
    if problems:
        listed = "\n  ".join(problems[:10])
        raise BundleError(
            f"{archive}: is damaged and was not unpacked. Get it again from its source.\n  {listed}"
        )
    target = folder if folder is not None else Path(unpacked.root)
    _check_is_new(target)
    for name in unpacked.sha256:
        date = _RECORDS_S if name.startswith(f"{CELLS}/") else _OLD_S
        os.utime(tree / name, (date, date))
    _pin_revisions(tree / CELLS, archive)
    tree.rename(target)
    return target


def _pin_revisions(cells: Path, archive: Path) -> None:
    """Write the lock file. A model whose records contradict each other is left to a later run."""
    try:
        with limited_memory():
            commits = commits_by_name(cells.rglob(RECORDS[0]))
    except MemoryError:
        raise BundleError(f"{archive}: a record does not fit into the memory.") from None
    add_revisions(cells.parent, {name: one for name, (one, *more) in commits.items() if not more})


def _check_is_new(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise BundleError(f"{folder}: already exists. Name a new folder.")
