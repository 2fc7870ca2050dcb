"""A bundle as a folder in which its study goes on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from servegrid.bundle import tarball
from servegrid.bundle.integrity import culprits_of
from servegrid.errors import BundleError

_OLD_S = 1
"""Snakemake takes 0 for no time at all."""


def open_bundle(archive: Path, folder: Path | None = None) -> Path:
    """Unpack `archive` into `folder`, which must not be there yet, and return it.

    Without a folder it is one in the working directory, of the bundle's name. All files are as old
    as can be, so that snakemake makes tables and figures again with whatever newer code there is;
    the records, which depend on no file, are kept. Raises BundleError where the bundle is not
    whole or not safe, or where the folder is there; nothing is left of it then.
    """
    if not archive.is_file():
        raise BundleError(f"{archive}: there is no such file.")
    if folder is not None:
        _refuse_existing(folder)
    parent = folder.parent if folder is not None else Path()
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".servegrid-", dir=parent) as temporary:
        tree = Path(temporary) / "tree"
        tree.mkdir()
        unpacked = tarball.unpack(archive, tree)
        culprits = culprits_of(tree, unpacked)
        if culprits:
            listed = "\n  ".join(culprits[:10])
            raise BundleError(f"{archive}: is not whole, and was not opened:\n  {listed}")
        target = folder if folder is not None else Path(unpacked.root)
        _refuse_existing(target)
        for name in unpacked.sha256:
            os.utime(tree / name, (_OLD_S, _OLD_S))
        tree.rename(target)
    return target


def _refuse_existing(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise BundleError(f"{folder}: is there already. Name a new folder.")
