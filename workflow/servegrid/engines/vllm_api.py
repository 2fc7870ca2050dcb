"""vLLM's server, put together inside this process, whichever supported version is installed.

vLLM offers no stable way to serve from within a process. What its own `vllm serve` is made of
has kept its names from 0.6 on, but not its modules and signatures: modules are looked for in
both places, and arguments are handed over by name where a signature has them.
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
class Api:
    """The parts of the installed vLLM that serve a model."""

    version: str
    device: str
    make_parser: Callable[[], ArgumentParser]
    build_engine: Callable[[Namespace], AbstractAsyncContextManager[Any]]
    build_app: Callable[..., Any]
    init_state: Callable[..., Any]

    @cached_property
    def parser(self) -> ArgumentParser:
        """Made when it is asked for: 0.10 raises RuntimeError where it finds no device."""
        return self.make_parser()

    @property
    def options(self) -> frozenset[str]:
        """All option strings that the parser knows."""
        return frozenset(self.parser._option_string_actions)

    def parse(self, arguments: list[str], name: str) -> Namespace:
        """Raises ConfigError, naming the deployment, where a value is not accepted."""

        def refuse(message: str) -> NoReturn:
            raise ConfigError(f"deployment `{name}`: vLLM {self.version}: {message}")

        self.parser.error = refuse  # type: ignore[method-assign]
        return self.parser.parse_args(arguments)

    async def make_app(self, engine: Any, arguments: Namespace) -> Any:
        """The ASGI application that serves `engine`."""
        offered = {
            "args": arguments,
            "engine_client": engine,
            "model_config": await _asked(engine, "model_config"),
            "vllm_config": await _asked(engine, "vllm_config"),
        }
        if hasattr(engine, "get_supported_tasks"):
            offered["supported_tasks"] = await engine.get_supported_tasks()
        app = self.build_app(**_accepted(self.build_app, offered))
        done = self.init_state(**_accepted(self.init_state, offered | {"state": app.state}))
        if inspect.isawaitable(done):
            await done
        return app


def load_api() -> Api:
    """The installed vLLM. Raises ImportError where there is none, or one that is not supported."""
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
    return Api(
        version=vllm.__version__,
        device=current_platform.device_type,
        make_parser=lambda: make_arg_parser(FlexibleArgumentParser(prog="vllm")),
        build_engine=build_async_engine_client,
        build_app=build_app,
        init_state=init_app_state,
    )


async def get_config(engine: Any) -> Any:
    """The engine's resolved `VllmConfig`."""
    return await _asked(engine, "vllm_config")


async def _asked(engine: Any, what: str) -> Any:
    """An attribute since 0.11, a coroutine to be called before."""
    getter = getattr(engine, f"get_{what}", None)
    return await getter() if getter else getattr(engine, what, None)


def _accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in offered.items() if name in parameters}
