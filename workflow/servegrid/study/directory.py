"""The working directory of a study."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def inside(directory: Path) -> Iterator[None]:
    """Work in `directory` during the block: a study's paths are relative to it.

    So the commands with `--directory` use the same files as `snakemake --directory`. A folder that
    does not exist is left alone: nothing can be in it.
    """
    with contextlib.chdir(directory) if directory.is_dir() else contextlib.nullcontext():
        yield
