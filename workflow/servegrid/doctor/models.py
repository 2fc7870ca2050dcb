"""Checks that the models of a study's deployments are on this machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from servegrid.doctor.files import Mount, check_shared
from servegrid.doctor.report import Finding, Group
from servegrid.errors import ModelError
from servegrid.study import models, tokenizer
from servegrid.study.deployment import EMULATED
from servegrid.study.directory import inside
from servegrid.study.grid import Deployment
from servegrid.study.hub import HubName

GROUP = Group("models")
SETTINGS = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "SERVEGRID_MODELS")


def hub_cache(environ: Mapping[str, str]) -> Path:
    """The folder of Hugging Face's cache, from the same variables that its own tools use."""
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    parent = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{parent}/huggingface"
    return Path(home).expanduser() / "hub"


def check_deployment_models(
    deployment: Deployment, locate: Callable[[str, Path], Path], folder: Path, study: Path
) -> Iterator[Finding]:
    """Check a deployment's checkpoint and tokenizer. See servegrid.study.models for `locate`."""
    for name in _model_names(deployment):
        key = "checkpoint" if name == deployment.checkpoint else "tokenizer"
        try:
            path = locate(name, folder)
        except ModelError:
            found = f"{key} `{name}` is neither a path nor in the cache"
            yield GROUP.fail(deployment.name, found, model_remedy(name, key, study))
        except (ImportError, OSError) as error:
            yield GROUP.skip(deployment.name, f"{key} `{name}` cannot be looked up: {error}")
        else:
            yield GROUP.ok(deployment.name, f"{key} {path}")
            if name == deployment.tokenizer:
                yield from _check_tokenizer(deployment, path)


def _check_tokenizer(deployment: Deployment, path: Path) -> Iterator[Finding]:
    try:
        tokenizer.check_tokenizer(path)
    except tokenizer.MissingPackageError as error:
        if deployment.environment == "main":
            yield GROUP.fail(deployment.name, error.problem, error.remedy)
        else:
            found = "tokenizer not tried: this Python lacks its package, the job's may have it"
            yield GROUP.skip(deployment.name, found)
    except tokenizer.TokenizerError as error:
        yield GROUP.fail(deployment.name, error.problem, error.remedy)
    else:
        yield GROUP.ok(deployment.name, "tokenizer encodes text")


def _model_names(deployment: Deployment) -> list[str]:
    """Its checkpoint (an external deployment has none) and its tokenizer."""
    return list(filter(None, dict.fromkeys((deployment.checkpoint, deployment.tokenizer))))


def model_remedy(name: str, key: str, study: Path) -> str:
    """How to get a model with this name."""
    correct = f"correct `{key}` in {study}"
    if name.startswith(models.DEMO):
        return f"Run `make model`, or {correct}."
    if hub_name := HubName.parse(name):
        revision = f" --revision {hub_name.revision}" if hub_name.revision else ""
        return (
            f"On a machine with a network, run `servegrid fetch --configfile {study}` or "
            f"`hf download {hub_name.repo}{revision}` (some models need `hf auth login` first), or "
            f"{correct}."
        )
    return f"{correct[0].upper()}{correct[1:]}."


def check_models(
    deployments: Sequence[Deployment],
    study: Path,
    mounts: Sequence[Mount] | None,
    revisions: Mapping[str, str] | None = None,
    directory: Path = Path(),
) -> Iterator[Finding]:
    """Check all models of a study. `mounts` is None if no other machine has to see them.

    `revisions` come from the study's lock file. Paths of models are relative to `directory`.
    """
    with_model = [each for each in deployments if each.engine != EMULATED]
    if not with_model:
        yield GROUP.ok("deployments", "all are emulated and need no model")
        return
    set_here = [f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)]
    unset = [name for name in SETTINGS if not os.environ.get(name)]
    text = "; ".join((*set_here, f"not set: {', '.join(unset)}" if unset else "")).strip("; ")
    yield GROUP.ok("settings", f"{text}; engines download no models")
    folder = models.default_folder()
    if mounts is not None:
        with inside(directory):
            found = list(_check_caches(with_model, folder, mounts))
        yield from found
    locate = functools.partial(models.locate, revisions=revisions)
    for deployment in with_model:
        with inside(directory):
            found = list(check_deployment_models(deployment, locate, folder, study))
        yield from found


def _check_caches(
    deployments: Sequence[Deployment], folder: Path, mounts: Sequence[Mount]
) -> Iterator[Finding]:
    names = {name for deployment in deployments for name in _model_names(deployment)}
    caches = {
        (folder if name.startswith(models.DEMO) else hub_cache(os.environ)).resolve()
        for name in names
        if name.startswith(models.DEMO) or not Path(name).expanduser().exists()
    }
    parents = {Path(name).expanduser().resolve().parent for name in names if Path(name).exists()}
    for cache in sorted(caches | parents):
        yield check_shared(GROUP, "cache", cache, mounts, "the models (HF_HOME)")
