"""An engine without hardware: it answers with the timing of a table or of the roofline.

It is for rehearsals of a study and for tests of what comes after measuring. What it says is
marked as emulated wherever it appears; it is never a measurement of anything.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from servegrid import __version__
from servegrid.engines.base import Site
from servegrid.engines.emulated_server import FAULTS, Fault, Server
from servegrid.engines.emulated_timing import Timing, load_timing
from servegrid.engines.listening import LOOPBACK, UNIX_BASE_URL, socket_path
from servegrid.errors import ConfigError, EngineError
from servegrid.node.reaper import start_reaper
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Deployment

AT_START = ("oom_at_start", "slow_start")
"""Faults of the bring-up; those of a request are in `emulated_server.FAULTS`."""


@dataclass(frozen=True)
class Settings:
    """A deployment's `arguments` for this engine.

    `timing` is the name of a published study, `roofline`, or the path of a CSV file like the
    published ones. Every time is multiplied by `time_scale` (to rehearse quickly) and by
    `slowdown` (to make a deployment slower than its table). A bring-up takes `startup_s` as it is.
    """

    timing: str = "roofline"
    time_scale: float = 1.0
    slowdown: float = 1.0
    startup_s: float = 0.0
    faults: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Emulated:
    """An emulated engine that is up."""

    endpoint: Endpoint
    facts: dict[str, Any]
    server: Server

    def pids(self) -> list[int]:
        return [os.getpid()]

    def healthy(self) -> bool:
        return self.server.is_alive()


def parse_settings(deployment: Deployment) -> tuple[Settings, Timing, tuple[Fault, ...]]:
    """What a deployment asks of this engine; nothing is started.

    Raises ConfigError, naming deployment and key, where an argument is unknown or does not fit,
    or where the table or the roofline knows nothing of the deployment.
    """
    known = [field.name for field in fields(Settings)]
    for key in deployment.engine_args:
        if key not in known:
            raise ConfigError(_unknown(deployment, f"engine_args.{key}", key, known))
    settings = Settings(**deployment.engine_args)
    for key in ("time_scale", "slowdown"):
        if not _is_number(value := getattr(settings, key)) or value <= 0:
            raise ConfigError(_where(deployment, f"engine_args.{key}", value, "a number above 0"))
    if not _is_number(settings.startup_s) or settings.startup_s < 0:
        raise ConfigError(
            _where(deployment, "engine_args.startup_s", settings.startup_s, "a number of seconds")
        )
    if not isinstance(settings.faults, list | tuple):
        raise ConfigError(_where(deployment, "engine_args.faults", settings.faults, "a list"))
    faults = tuple(_fault(deployment, n, each) for n, each in enumerate(settings.faults))
    scale = settings.time_scale * settings.slowdown
    return settings, load_timing(deployment, settings.timing).scaled(scale), faults


@contextlib.contextmanager
def start_engine(deployment: Deployment, site: Site) -> Iterator[Emulated]:
    """See `servegrid.engines.start_engine`."""
    started = time.monotonic()
    settings, timing, faults = parse_settings(deployment)
    _start(deployment, settings, faults, site)
    key = secrets.token_urlsafe(24)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(start_reaper()).folder
        path = socket_path(site, folder)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX if path else socket.AF_INET))
        listener.bind(str(path) if path else (LOOPBACK, 0))
        port = "" if path else listener.getsockname()[1]
        endpoint = Endpoint(
            base_url=UNIX_BASE_URL if path else f"http://{LOOPBACK}:{port}",
            model=deployment.model,
            api_key=key,
            socket=str(path) if path else None,
        )
        server = Server(listener, timing, faults, endpoint)
        stack.callback(server.stop)
        server.start()
        facts = {
            "engine": "emulated",
            "version": __version__,
            "timing": settings.timing,
            "time_scale": settings.time_scale,
            "engine_args": dict(deployment.engine_args),
            "bring_up_s": {"engine": round(time.monotonic() - started, 3)},
        }
        yield Emulated(endpoint, facts, server)


def _start(
    deployment: Deployment, settings: Settings, faults: tuple[Fault, ...], site: Site
) -> None:
    wait = settings.startup_s + sum(each.seconds for each in faults if each.kind == "slow_start")
    time.sleep(min(wait, site.startup_s))
    if wait > site.startup_s:
        raise EngineError(
            f"deployment `{deployment.name}`: the emulated engine was not up within "
            f"{site.startup_s:g} s, as its arguments want it. Raise `startup_s` of the profile."
        )
    if any(each.kind == "oom_at_start" for each in faults):
        raise EngineError(
            f"deployment `{deployment.name}`: the emulated engine did not start: out of memory, "
            "as its arguments want it. Remove the fault `oom_at_start`."
        )


def _fault(deployment: Deployment, number: int, given: Any) -> Fault:
    where = f"engine_args.faults[{number}]"
    if not isinstance(given, Mapping):
        raise ConfigError(_where(deployment, where, given, "a mapping with a `kind`"))
    known = [field.name for field in fields(Fault)]
    for key, value in given.items():
        if key not in known:
            raise ConfigError(_unknown(deployment, f"{where}.{key}", key, known))
        if key != "kind" and (not _is_number(value) or value < 0):
            raise ConfigError(_where(deployment, f"{where}.{key}", value, "a number"))
    kinds = (*FAULTS, *AT_START)
    if given.get("kind") not in kinds:
        wanted = "one of " + ", ".join(f"`{kind}`" for kind in kinds)
        raise ConfigError(_where(deployment, f"{where}.kind", given.get("kind"), wanted))
    return Fault(**given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _where(deployment: Deployment, key: str, value: Any, wanted: str) -> str:
    return f"deployment `{deployment.name}`: {key}: {value!r} is not {wanted}."


def _unknown(deployment: Deployment, where: str, key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    meant = f" Did you mean `{close[0]}`?" if close else ""
    return (
        f"deployment `{deployment.name}`: {where}: the emulated engine has no such argument."
        f"{meant} Valid are: {', '.join(known)}."
    )
