"""Some cells of a bundle measured again here, and held against what the bundle says.

That is replication, which no check of a bundle can be: other nodes, other drivers, another day.
"""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import servegrid
from servegrid.analysis import tables
from servegrid.analysis.comparison import Comparison, compare
from servegrid.bundle import tarball
from servegrid.bundle.layout import CONFIGURATION, TABLES
from servegrid.bundle.verify import Bundle
from servegrid.errors import BundleError
from servegrid.records import parquet
from servegrid.study.config import study_of
from servegrid.study.grid import Study, Trial

_FILTERED = ("protocol", "concurrency", "request_rate", "input_len", "output_len")


@dataclass(frozen=True)
class Drawn:
    """The cells to be measured again: their study, and what the bundle has of them."""

    name: str
    config: Mapping[str, Any]
    cells: pd.DataFrame


def draw(archive: Path, count: int) -> Drawn:
    """So many cells of a bundle that has passed its checks, or all it has.

    They are of as many deployments as can be, and of those whose trials are all valid. The
    bundle's name is the seed: whoever draws from it draws the same. Raises BundleError where
    no cell is valid.
    """
    with tempfile.TemporaryDirectory(prefix="servegrid-") as temporary:
        tree = Path(temporary) / "tree"
        tree.mkdir()
        unpacked = tarball.unpack(archive, tree)
        bundle = Bundle(tree, unpacked, Path(temporary) / "again")
        cells, _ = bundle.derived
        config, study = bundle.config, bundle.study
    wanted = drawn_cells(valid_cells(study, cells), count, unpacked.root)
    config = {**copy.deepcopy(config), "include": [_filter(own[0]) for own in wanted]}
    digests = {trial.digest for own in wanted for trial in own}
    again = {trial.digest for trial in study_of(config, [CONFIGURATION]).trials}
    if again != digests:
        raise BundleError(f"{archive}: its cells cannot be told apart by a filter.")
    return Drawn(unpacked.root, config, cells[cells["spec_digest"].isin(digests)])


def measure(drawn: Drawn, profile: Path, folder: Path) -> Comparison:
    """Measure the cells in `folder` with this repository's own workflow, and compare.

    A folder in which that was begun is gone on with. Raises BundleError where it holds something
    else, where there is no workflow beside this package, or where the workflow fails; what it
    had measured by then stays in the folder.
    """
    snakefile = Path(servegrid.__file__).parents[2] / "Snakefile"
    if not snakefile.is_file():
        raise BundleError(
            f"{snakefile}: is not there. Replication needs servegrid's repository, not only its "
            "package: run it from there."
        )
    config = folder / CONFIGURATION
    told = json.dumps(drawn.config, indent=2, sort_keys=True) + "\n"
    if folder.exists() and not (config.is_file() and config.read_text() == told):
        raise BundleError(f"{folder}: holds something else. Name a new folder with --output-dir.")
    if not config.exists():
        with parquet.written_whole(config) as temporary:
            temporary.write_text(told)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "snakemake"),
            *("--snakefile", str(snakefile)),
            *("--profile", str(profile.resolve())),
            *("--directory", str(folder)),
            *("--configfile", str(config.resolve())),
        ]
    )
    if done.returncode:
        raise BundleError(
            f"{folder}: not all could be measured again here; snakemake says why, above. What was "
            "measured is kept: the same command goes on."
        )
    return compare(drawn.cells, tables.read_cells(folder / TABLES / "cells.parquet"))


def valid_cells(study: Study, cells: pd.DataFrame) -> dict[str, list[list[Trial]]]:
    """The trials of each valid cell, by deployment."""
    valid = set(cells.loc[cells["valid"].eq(True).fillna(False), "spec_digest"])
    by_cell: dict[tuple[str, str], list[Trial]] = {}
    for trial in study.trials:
        by_cell.setdefault((trial.deployment.name, trial.cell), []).append(trial)
    found: dict[str, list[list[Trial]]] = {}
    for (deployment, _), own in by_cell.items():
        if all(trial.digest in valid for trial in own):
            found.setdefault(deployment, []).append(own)
    return found


def drawn_cells(
    cells: Mapping[str, Sequence[list[Trial]]], count: int, seed: str
) -> list[list[Trial]]:
    """One cell of each deployment in turn, until there are enough. BundleError: there is none."""
    if not cells:
        raise BundleError("no cell of it is valid, and there is nothing to replicate.")
    chances = random.Random(seed)
    left = {name: chances.sample(own, len(own)) for name, own in sorted(cells.items())}
    order = chances.sample(sorted(left), len(left))
    turns = max(map(len, left.values()))
    in_turn = [
        left[name][turn] for turn in range(turns) for name in order if turn < len(left[name])
    ]
    return in_turn[:count]


def _filter(trial: Trial) -> dict[str, Any]:
    workload = {key: getattr(trial.workload, key) for key in _FILTERED}
    return {
        "deployment": trial.deployment.name,
        **{key: value for key, value in workload.items() if value is not None},
    }
