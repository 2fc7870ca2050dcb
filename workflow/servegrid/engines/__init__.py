"""Engines: each starts a deployment and serves it through an OpenAI-compatible API."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager

from servegrid.engines.base import Engine, EnginePart, Nodes, Site
from servegrid.errors import ConfigError
from servegrid.study.deployment import EMULATED, EXTERNAL
from servegrid.study.grid import Deployment

__all__ = [
    "EMULATED",
    "ENGINES",
    "EXTERNAL",
    "Engine",
    "EnginePart",
    "Nodes",
    "Site",
    "start_engine",
    "start_part",
]

ENGINES = {
    EMULATED: "servegrid.engines.emulated",
    EXTERNAL: "servegrid.engines.external",
    "llamacpp": "servegrid.engines.llamacpp",
    "vllm": "servegrid.engines.vllm",
}
"""Each engine's module; it defines `start_engine` and is imported only if the engine is used."""


def start_engine(deployment: Deployment, site: Site) -> AbstractContextManager[Engine]:
    """A context manager: the engine of `deployment` runs inside the `with` block.

    Enter it in the main thread. After the block, even after an exception, no process, socket or
    shared memory of the engine remains. An external engine keeps running.

    Raises ConfigError if the deployment cannot be served as it is written, ModelError if its model
    is missing, and EngineError with the cause if the engine does not start within `site.startup_s`
    seconds.
    """
    if deployment.engine not in ENGINES:
        raise ConfigError(
            f"deployment `{deployment.name}`: engine: `{deployment.engine}` is not an engine. "
            f"Use one of: {', '.join(ENGINES)}."
        )
    module = importlib.import_module(ENGINES[deployment.engine])
    manager: AbstractContextManager[Engine] = module.start_engine(deployment, site)
    return manager


def start_part(deployment: Deployment, site: Site) -> AbstractContextManager[EnginePart]:
    """A context manager for the other nodes: their part of the engine runs inside the block.

    The first node, which is in `start_engine` meanwhile, says how. Raises the same errors.
    """
    module = importlib.import_module(ENGINES[deployment.engine])
    manager: AbstractContextManager[EnginePart] = module.start_part(deployment, site)
    return manager
