"""The models that a study's deployments need, on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from servegrid.doctor.files import Mount, judge_sharing
from servegrid.doctor.report import Finding, Group
from servegrid.errors import ModelError
from servegrid.study import models
from servegrid.study.deployment import EMULATED
from servegrid.study.grid import Deployment

GROUP = Group("models")
SETTINGS = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "SERVEGRID_MODELS")


def hub_cache(environ: Mapping[str, str]) -> Path:
    """The folder of Hugging Face's cache, by the variables that its own tools read."""
    if chosen := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(chosen).expanduser()
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(home).expanduser() / "hub"


def judge_models(
    deployment: Deployment, locate: Callable[[str, Path], Path], folder: Path, study: Path
) -> Iterator[Finding]:
    """Checkpoint and tokenizer of a deployment; `locate` is that of servegrid.study.models."""
    for name in _names(deployment):
        key = "checkpoint" if name == deployment.checkpoint else "tokenizer"
        try:
            path = locate(name, folder)
        except ModelError:
            missing = f"{key} `{name}`: neither a path nor in the cache"
            yield GROUP.fail(deployment.name, missing, remedy(name, key, study))
        except (ImportError, OSError) as error:
            yield GROUP.skip(deployment.name, f"{key} `{name}` cannot be looked up: {error}")
        else:
            yield GROUP.ok(deployment.name, f"{key} {path}")


def _names(deployment: Deployment) -> list[str]:
    """Its checkpoint, unless it is external, and its tokenizer."""
    return list(filter(None, dict.fromkeys((deployment.checkpoint, deployment.tokenizer))))


def remedy(name: str, key: str, study: Path) -> str:
    """How to come by a model of that name."""
    correct = f"correct `{key}` in {study}"
    if name.startswith(models.DEMO):
        return f"Type `make model`, or {correct}."
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return (
            f"Where there is a network: `hf download {name}` (some need `hf auth login` first); "
            f"or {correct}."
        )
    return f"{correct[0].upper()}{correct[1:]}."


def examine_models(
    deployments: Sequence[Deployment], study: Path, mounts: Sequence[Mount] | None
) -> Iterator[Finding]:
    """All models of a study; `mounts` are given where other machines must see them."""
    needing = [each for each in deployments if each.engine != EMULATED]
    if not needing:
        yield GROUP.ok("deployments", "all emulated: no model is needed")
        return
    set_here = [f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)]
    unset = [name for name in SETTINGS if not os.environ.get(name)]
    text = "; ".join((*set_here, f"not set: {', '.join(unset)}" if unset else "")).strip("; ")
    yield GROUP.ok("settings", f"{text}; engines never download")
    folder = models.default_folder()
    if mounts is not None:
        yield from _judge_caches(needing, folder, mounts)
    for deployment in needing:
        yield from judge_models(deployment, models.locate, folder, study)


def _judge_caches(
    deployments: Sequence[Deployment], folder: Path, mounts: Sequence[Mount]
) -> Iterator[Finding]:
    names = {name for each in deployments for name in _names(each)}
    caches = {
        (folder if name.startswith(models.DEMO) else hub_cache(os.environ)).resolve()
        for name in names
        if name.startswith(models.DEMO) or not Path(name).expanduser().exists()
    }
    own = {Path(name).expanduser().resolve().parent for name in names if Path(name).exists()}
    for cache in sorted(caches | own):
        yield judge_sharing(GROUP, "cache", cache, mounts, "the models (HF_HOME)")
