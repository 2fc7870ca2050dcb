"""Measures some cells of a bundle again here, and compares them with the bundle.

Only such a replication, on other nodes with other drivers on another day, tests the figures of a
bundle; the checks of `verify` cannot.
"""

from __future__ import annotations

import copy
import importlib.util
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
from servegrid.bundle.unpacked import UnpackedBundle
from servegrid.errors import BundleError
from servegrid.records import parquet
from servegrid.study.config import parse_study
from servegrid.study.grid import Study, Trial

_FILTER_KEYS = ("protocol", "concurrency", "request_rate", "input_len", "output_len")


@dataclass(frozen=True)
class CellSample:
    """Cells to measure again: the bundle's name, their study, and the bundle's figures."""

    name: str
    config: Mapping[str, Any]
    cells: pd.DataFrame


def find_snakefile() -> Path | None:
    """The workflow of the checkout that this package is installed from, None if there is none."""
    path = Path(servegrid.__file__).parents[2] / "Snakefile"
    return path if path.is_file() else None


def require_workflow() -> Path:
    """The Snakefile. Raises BundleError if this installation has no workflow or no Snakemake."""
    snakefile = find_snakefile()
    if snakefile is None:
        raise BundleError(
            "--replicate: this installation of servegrid has no workflow. Clone servegrid's "
            "repository, install it with `make env-cpu`, and run its .venv/bin/servegrid."
        )
    if importlib.util.find_spec("snakemake") is None:
        raise BundleError(
            "--replicate: Snakemake is not installed. Install servegrid with its extra: "
            "pip install 'servegrid[workflow]'."
        )
    return snakefile


def sample_cells(archive: Path, count: int) -> CellSample:
    """At most `count` cells of a verified bundle, of as many deployments as possible.

    Only cells whose trials are all valid are drawn. The bundle's name is the seed, so that
    everybody draws the same cells. Raises BundleError if no cell is valid.
    """
    with tempfile.TemporaryDirectory(prefix="servegrid-") as temporary:
        tree = Path(temporary) / "tree"
        tree.mkdir()
        unpacked = tarball.unpack_archive(archive, tree)
        bundle = UnpackedBundle(tree, unpacked, Path(temporary) / "scratch")
        cells, _ = bundle.derived_cells
        config, study = bundle.config, bundle.study
    sample = draw_cells(list_valid_cells(study, cells), count, unpacked.root)
    config = {**copy.deepcopy(config), "include": [_filter_for(trials[0]) for trials in sample]}
    config.pop("published", None)  # no comparison with published data is needed
    digests = {trial.digest for trials in sample for trial in trials}
    expanded = {trial.digest for trial in parse_study(config, [CONFIGURATION]).trials}
    if expanded != digests:
        raise BundleError(
            f"{archive}: no filter selects just the drawn cells. Draw another number of cells."
        )
    return CellSample(unpacked.root, config, cells[cells["spec_digest"].isin(digests)])


def replicate_cells(sample: CellSample, profile: Path, folder: Path) -> Comparison:
    """Measure the cells in `folder` with the workflow of this checkout, and compare.

    If `folder` has a part of the measurements, they continue. Raises BundleError if the folder
    contains something else, if there is no workflow, or if the workflow fails; then finished
    measurements stay in the folder.
    """
    snakefile = require_workflow()
    config = folder / CONFIGURATION
    text = json.dumps(sample.config, indent=2, sort_keys=True) + "\n"
    if folder.exists() and not (config.is_file() and config.read_text() == text):
        raise BundleError(
            f"{folder}: contains something else. Name a new folder with --output-dir."
        )
    if not config.exists():
        with parquet.atomic_write(config) as temporary:
            temporary.write_text(text)
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
            f"{folder}: some cells could not be measured again; Snakemake's messages above give "
            "the reason. Finished measurements are kept. To resume, run the same command again."
        )
    return compare(sample.cells, tables.load_table(folder / TABLES / "cells.parquet"))


def list_valid_cells(study: Study, cells: pd.DataFrame) -> dict[str, list[list[Trial]]]:
    """The trials of each cell whose trials are all valid, by deployment."""
    valid = set(cells.loc[cells["valid"].eq(True).fillna(False), "spec_digest"])
    by_cell: dict[tuple[str, str], list[Trial]] = {}
    for trial in study.trials:
        by_cell.setdefault((trial.deployment.name, trial.cell), []).append(trial)
    valid_cells: dict[str, list[list[Trial]]] = {}
    for (deployment, _), trials in by_cell.items():
        if all(trial.digest in valid for trial in trials):
            valid_cells.setdefault(deployment, []).append(trials)
    return valid_cells


def draw_cells(
    cells: Mapping[str, Sequence[list[Trial]]], count: int, seed: str
) -> list[list[Trial]]:
    """Random cells of the deployments in turn, until there are `count`.

    Raises BundleError if there are no cells.
    """
    if not cells:
        raise BundleError("The bundle has no valid cell, so there is nothing to replicate.")
    generator = random.Random(seed)
    shuffled = {name: generator.sample(own, len(own)) for name, own in sorted(cells.items())}
    order = generator.sample(sorted(shuffled), len(shuffled))
    rounds = max(map(len, shuffled.values()))
    in_turn = [
        shuffled[name][turn]
        for turn in range(rounds)
        for name in order
        if turn < len(shuffled[name])
    ]
    return in_turn[:count]


def _filter_for(trial: Trial) -> dict[str, Any]:
    workload = {key: getattr(trial.workload, key) for key in _FILTER_KEYS}
    return {
        "deployment": trial.deployment.name,
        **{key: value for key, value in workload.items() if value is not None},
    }
