"""Measures some cells of a bundle again here, and compares them with the bundle.

Only such a replication, on other nodes with other drivers on another day, tests the results of a
bundle; the checks of `verify` cannot.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

import servegrid
from servegrid.analysis import tables
from servegrid.analysis.comparison import Comparison, compare
from servegrid.bundle import tarball
from servegrid.bundle.layout import CELLS, CONFIGURATION, RECORDS, TABLES
from servegrid.bundle.unpacked import UnpackedBundle
from servegrid.errors import BundleError
from servegrid.records import parquet
from servegrid.run.revisions import commits_by_name
from servegrid.study.config import parse_study
from servegrid.study.deployment import Deployment
from servegrid.study.grid import Study, Trial
from servegrid.study.revisions import LOCK, add_revisions, read_revisions

REPLICABLE_ARGUMENTS = frozenset(
    {
        *("block_size", "cpu_offload_gb", "dtype", "enable_chunked_prefill"),
        *("enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "kv_cache_dtype"),
        *("kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_partial_prefills"),
        *("num_gpu_blocks_override", "pipeline_parallel_size", "quantization", "seed"),
        *("swap_space", "async_scheduling", "enable_expert_parallel", "data_parallel_size"),
        # llama.cpp
        *("n_batch", "n_ubatch", "cache_type_k", "cache_type_v", "flash_attn_type"),
        # the emulated engine
        *("timing", "time_scale", "startup_s", "replicas"),
    }
)
"""Engine arguments that a bundle may set for a replication. Others can load code, such as
`tool_parser_plugin`, send data elsewhere, such as `otlp_traces_endpoint`, or open files."""
_MODEL_NAME = re.compile(
    r"(demo:|[A-Za-z0-9_][\w.-]*/)[A-Za-z0-9_][\w.-]*(@[A-Za-z0-9_][\w.-]*)?", re.ASCII
)
_FILTER_KEYS = ("protocol", "concurrency", "request_rate", "input_len", "output_len")


@dataclass(frozen=True)
class CellSample:
    """Cells to measure again: the bundle's name, their study, and the bundle's results.

    `revisions` are the commits that the bundle was measured with, by the model's name.
    """

    name: str
    config: Mapping[str, Any]
    cells: pd.DataFrame
    revisions: Mapping[str, str] = field(default_factory=dict)


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

    Only cells whose trials are all valid are drawn, and only of deployments that `is_replicable`
    accepts. The bundle's name is the seed, so that everybody draws the same cells. Raises
    BundleError if there is no such cell, or if the drawn cells have two revisions of one model.
    """
    with tempfile.TemporaryDirectory(prefix="servegrid-") as temporary:
        tree = Path(temporary) / "tree"
        tree.mkdir()
        unpacked = tarball.unpack_archive(archive, tree)
        bundle = UnpackedBundle(tree, unpacked, Path(temporary) / "scratch")
        cells, _ = bundle.derived_cells
        config, study = bundle.config, bundle.study
        commits = {
            each.name: commits_by_name((tree / CELLS / each.name).rglob(RECORDS[0]))
            for each in study.deployments
        }
    replicable = {each.name for each in study.deployments if is_replicable(each)}
    if not replicable:
        raise BundleError(
            f"{archive}: cannot be replicated: each deployment is an external endpoint, has a file "
            "on disk as its model, or has `engine_args` that can load code or open connections. "
            "Measure them with a study of your own, and use `servegrid compare`."
        )
    valid_cells = list_valid_cells(study, cells)
    drawn_from = {name: own for name, own in valid_cells.items() if name in replicable}
    sample = draw_cells(drawn_from, count, unpacked.root)
    config = {**copy.deepcopy(config), "include": [_filter_for(trials[0]) for trials in sample]}
    config.pop("published", None)  # no comparison with published data is needed
    digests = {trial.digest for trials in sample for trial in trials}
    expanded = {trial.digest for trial in parse_study(config, [CONFIGURATION]).trials}
    if expanded != digests:
        raise BundleError(
            f"{archive}: no filter selects exactly the drawn cells. Change N of --replicate."
        )
    drawn = {trials[0].deployment.name for trials in sample}
    revisions = _one_revision_each(archive, [commits[name] for name in sorted(drawn)])
    return CellSample(unpacked.root, config, cells[cells["spec_digest"].isin(digests)], revisions)


def replicate_cells(sample: CellSample, profile: Path, folder: Path) -> Comparison:
    """Measure the cells in `folder` with the workflow of this checkout, and compare.

    Models have the bundle's revisions: the folder's lock file gets them. If `folder` has a part of
    the measurements, they continue. Raises BundleError if the folder contains something else, if
    there is no workflow, or if the workflow fails; then finished measurements stay in the folder.
    """
    snakefile = require_workflow()
    config = folder / CONFIGURATION
    text = json.dumps(sample.config, indent=2, sort_keys=True) + "\n"
    if folder.exists() and not (config.is_file() and config.read_text(encoding="utf-8") == text):
        raise BundleError(
            f"{folder}: is not a replication of these cells. Name a new folder with --output-dir."
        )
    if not config.exists():
        with parquet.atomic_write(config) as temporary:
            temporary.write_text(text, encoding="utf-8")
    _pin_revisions(folder / "results", sample.revisions)
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "snakemake"),
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


def _pin_revisions(results: Path, revisions: Mapping[str, str]) -> None:
    """Raise BundleError if the lock file of `results` has others."""
    for name, commit in read_revisions(results).items():
        if revisions.get(name, commit) != commit:
            raise BundleError(
                f"{results / LOCK}: `{name}` has revision {commit}, but the bundle was measured "
                f"with {revisions[name]}. Name a new folder with --output-dir."
            )
    add_revisions(results, revisions)


def _one_revision_each(archive: Path, commits: Sequence[Mapping[str, set[str]]]) -> dict[str, str]:
    """The commits by name. Raises BundleError if a name has several."""
    revisions: dict[str, str] = {}
    for name, commit in (pair for each in commits for pair in _pairs(each)):
        if revisions.setdefault(name, commit) != commit:
            raise BundleError(
                f"{archive}: cannot be replicated: its cells were measured with the revisions "
                f"{revisions[name]} and {commit} of `{name}`. Measure one of them with a study of "
                "your own, and use `servegrid compare`."
            )
    return revisions


def _pairs(commits: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    return [(name, commit) for name, several in commits.items() for commit in sorted(several)]


def is_replicable(deployment: Deployment) -> bool:
    """Whether a stranger's deployment can be started without trusting the stranger.

    It names no server, no file of this machine and no code: it isn't external, checkpoint and
    tokenizer are names of the demo or of Hugging Face, and each of its `engine_args` is one of
    REPLICABLE_ARGUMENTS with a plain value.
    """
    if deployment.endpoint is not None or deployment.chat_template or deployment.lora:
        return False
    models = (deployment.checkpoint, deployment.tokenizer)
    if not all(_MODEL_NAME.fullmatch(each) for each in models):
        return False
    return all(
        key in REPLICABLE_ARGUMENTS and isinstance(value, bool | int | float | str | None)
        for key, value in deployment.engine_args.items()
    )


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
        raise BundleError(
            "No deployment that can be replicated has a valid cell, so nothing is measured."
        )
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
