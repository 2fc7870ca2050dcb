"""Builds vLLM's server inside this process, for every supported version of vLLM.

vLLM has no stable API to serve from inside a process. The parts of `vllm serve` have kept their
names since 0.6, but not their modules and signatures. So each part is imported from its new or its
old module, and gets those arguments by name that its signature has.
"""

from __future__ import annotations

import inspect
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from servegrid.errors import ConfigError


@dataclass(frozen=True)
class VllmApi:
    """The parts of the installed vLLM that serve a model."""

    version: str
    device: str
    make_parser: Callable[[], ArgumentParser]
    build_engine: Callable[[Namespace], AbstractAsyncContextManager[Any]]
    build_app: Callable[..., Any]
    init_state: Callable[..., Any]

    @cached_property
    def parser(self) -> ArgumentParser:
        """vLLM's argument parser. (vLLM 0.10 raises RuntimeError if there is no device.)"""
        return self.make_parser()

    @property
    def options(self) -> frozenset[str]:
        """All option strings that the parser knows."""
        return frozenset(self.parser._option_string_actions)

    def parse(self, arguments: list[str], name: str) -> Namespace:
        """The parsed arguments. Raises ConfigError with the deployment's `name` for a bad value."""

        def fail(message: str) -> NoReturn:
            raise ConfigError(
                f"deployment `{name}`: engine_args: vLLM {self.version} refuses them: {message}. "
                "Correct the argument."
            )

        self.parser.error = fail  # type: ignore[method-assign]
        return self.parser.parse_args(arguments)

    async def make_app(self, engine: Any, arguments: Namespace) -> Any:
        """The ASGI application that serves `engine`."""
        available = {
            "args": arguments,
            "engine_client": engine,
            "model_config": await _get(engine, "model_config"),
            "vllm_config": await _get(engine, "vllm_config"),
        }
        if hasattr(engine, "get_supported_tasks"):
            available["supported_tasks"] = await engine.get_supported_tasks()
        app = self.build_app(**_matching(self.build_app, available))
        done = self.init_state(**_matching(self.init_state, available | {"state": app.state}))
        if inspect.isawaitable(done):
            await done
        return app


def load_api() -> VllmApi:
    """The installed vLLM. Raises ImportError if there is none, or an unsupported version."""
    import vllm
    from vllm.platforms import current_platform

    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ModuleNotFoundError:  # before 0.29
        from vllm.entrypoints.openai.api_server import (
            build_app,
            build_async_engine_client,
            init_app_state,
        )
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ModuleNotFoundError:  # before 0.12
        from vllm.utils import FlexibleArgumentParser
    return VllmApi(
        version=vllm.__version__,
        device=current_platform.device_type,
        make_parser=lambda: make_arg_parser(FlexibleArgumentParser(prog="vllm")),
        build_engine=build_async_engine_client,
        build_app=build_app,
        init_state=init_app_state,
    )


async def get_config(engine: Any) -> Any:
    """The engine's resolved `VllmConfig`."""
    return await _get(engine, "vllm_config")


async def _get(engine: Any, name: str) -> Any:
    """An attribute of the engine since 0.11, the result of a coroutine before that."""
    getter = getattr(engine, f"get_{name}", None)
    return await getter() if getter else getattr(engine, name, None)


def _matching(function: Callable[..., Any], available: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in available.items() if name in parameters}
