"""Engines: what brings a deployment up and serves it behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager

from servegrid.engines.base import Engine, Site
from servegrid.errors import ConfigError
from servegrid.study.deployment import EMULATED, EXTERNAL
from servegrid.study.grid import Deployment

__all__ = ["EMULATED", "ENGINES", "EXTERNAL", "Engine", "Site", "start_engine"]

ENGINES = {
    EMULATED: "servegrid.engines.emulated",
    EXTERNAL: "servegrid.engines.external",
    "llamacpp": "servegrid.engines.llamacpp",
    "vllm": "servegrid.engines.vllm",
}
"""Each engine's module, which has a `start_engine` of its own; imported only where it is used."""


def start_engine(deployment: Deployment, site: Site) -> AbstractContextManager[Engine]:
    """The engine of `deployment`, up for the length of a `with` block.

    To be entered in the main thread. When the block ends, however it ends, no process, socket
    or shared memory of the engine is left; one that was up before is left as it was. Raises
    ConfigError where the deployment cannot be served as it stands, ModelError where its model is
    missing, and EngineError, with the cause, where the engine does not come up within
    `site.startup_s`.
    """
    if deployment.engine not in ENGINES:
        raise ConfigError(
            f"deployment `{deployment.name}`: there is no engine `{deployment.engine}`. "
            f"Use one of: {', '.join(ENGINES)}."
        )
    module = importlib.import_module(ENGINES[deployment.engine])
    manager: AbstractContextManager[Engine] = module.start_engine(deployment, site)
    return manager
