"""An engine without hardware: it answers with the timing of a table or of the roofline model.

Use it to rehearse a study and to test the analysis. All its results are marked as emulated; they
are not measurements.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from servegrid import __version__
from servegrid.engines.base import Site
from servegrid.engines.emulated_server import FAULTS, EmulatedServer, Fault
from servegrid.engines.emulated_timing import Timing, load_timing
from servegrid.engines.listening import LOOPBACK, UNIX_BASE_URL, socket_path
from servegrid.errors import ConfigError, EngineError, NotServableError
from servegrid.node.reaper import start_reaper
from servegrid.records.verdict import OOM_AT_START
from servegrid.study.deployment import REPLICAS
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Deployment
from servegrid.study.limits import MAX_NUMBER, MIN_NUMBER

START_FAULTS = ("oom_at_start", "slow_start")
"""Faults while the engine starts; the faults of requests are in `emulated_server.FAULTS`."""


@dataclass(frozen=True)
class EmulatedSettings:
    """A deployment's `engine_args` for this engine.

    `timing` is the name of a published study, `roofline`, or the path of a CSV file in the format
    of the published studies. All times are multiplied by `time_scale` (for a quick rehearsal) and
    by `slowdown` (to make a deployment slower than its table). A start takes `startup_s` seconds;
    it is not scaled. `replicas` comes from the deployment's own key: each has the timing of its
    share of the GPUs.
    """

    timing: str = "roofline"
    time_scale: float = 1.0
    slowdown: float = 1.0
    startup_s: float = 0.0
    faults: tuple[Mapping[str, Any], ...] = ()
    replicas: int = 1


@dataclass(frozen=True)
class EmulatedEngine:
    """A running emulated engine."""

    endpoint: Endpoint
    facts: dict[str, Any]
    server: EmulatedServer
    errors: None = None

    def pids(self) -> list[int]:
        return [os.getpid()]

    def healthy(self) -> bool:
        return self.server.is_alive()


def parse_settings(deployment: Deployment) -> tuple[EmulatedSettings, Timing, tuple[Fault, ...]]:
    """The settings, timing and faults of a deployment; nothing is started.

    Raises ConfigError with the deployment and the key if an argument is unknown or has a wrong
    value, or if the table or the roofline model has no data for the deployment.
    """
    known = [field.name for field in fields(EmulatedSettings) if field.name != REPLICAS]
    for key in deployment.engine_args:
        if key not in (*known, REPLICAS):
            raise ConfigError(_unknown_argument(deployment, f"engine_args.{key}", key, known))
    settings = EmulatedSettings(**deployment.engine_args)
    for key in ("time_scale", "slowdown"):
        if not _is_number(value := getattr(settings, key)) or value <= 0:
            raise ConfigError(_invalid(deployment, f"engine_args.{key}", value, "a number above 0"))
    if not _is_number(settings.startup_s) or settings.startup_s < 0:
        raise ConfigError(
            _invalid(deployment, "engine_args.startup_s", settings.startup_s, "a number of seconds")
        )
    timing: object = settings.timing
    if not isinstance(timing, str):
        wanted = "`roofline`, the name of a published study or the path of a CSV file"
        raise ConfigError(_invalid(deployment, "engine_args.timing", timing, wanted))
    if not isinstance(settings.faults, list | tuple):
        raise ConfigError(_invalid(deployment, "engine_args.faults", settings.faults, "a list"))
    faults = tuple(
        _parse_fault(deployment, number, fault) for number, fault in enumerate(settings.faults)
    )
    scale = settings.time_scale * settings.slowdown
    one = replace(deployment, gpu_count=deployment.gpu_count // settings.replicas)
    return settings, load_timing(one, timing).scaled(scale), faults


@contextlib.contextmanager
def start_engine(deployment: Deployment, site: Site) -> Iterator[EmulatedEngine]:
    """See `servegrid.engines.start_engine`."""
    started = time.monotonic()
    settings, timing, faults = parse_settings(deployment)
    _simulate_start(deployment, settings, faults, site)
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
            started_here=True,
        )
        server = EmulatedServer(listener, timing, faults, endpoint, settings.replicas)
        stack.callback(server.stop)
        server.start()
        facts = {
            "engine": "emulated",
            "version": __version__,
            "timing": settings.timing,
            "time_scale": settings.time_scale,
            "engine_args": dict(deployment.engine_args),
            "data_parallel_size": settings.replicas,
            "bring_up_s": {"engine": round(time.monotonic() - started, 3)},
        }
        yield EmulatedEngine(endpoint, facts, server)


@dataclass(frozen=True)
class EmulatedPart:
    """The part of an emulated engine on another node: it does nothing."""

    def pids(self) -> list[int]:
        return [os.getpid()]

    def healthy(self) -> bool:
        return True


@contextlib.contextmanager
def start_part(deployment: Deployment, site: Site) -> Iterator[EmulatedPart]:
    """See `servegrid.engines.start_part`."""
    yield EmulatedPart()


def _simulate_start(
    deployment: Deployment, settings: EmulatedSettings, faults: tuple[Fault, ...], site: Site
) -> None:
    slow_starts = (fault.seconds for fault in faults if fault.kind == "slow_start")
    wait = settings.startup_s + sum(slow_starts)
    time.sleep(min(wait, site.startup_s))
    if wait > site.startup_s:
        raise EngineError(
            f"deployment `{deployment.name}`: the emulated engine did not start within "
            f"{site.startup_s:g} s, as its engine_args request. Raise `startup_s` in the profile."
        )
    if any(fault.kind == "oom_at_start" for fault in faults):
        raise NotServableError(
            f"deployment `{deployment.name}`: the emulated engine did not start: out of memory, "
            "as its engine_args request. Remove the fault `oom_at_start`.",
            OOM_AT_START,
            {"emulated": True},
        )


def _parse_fault(deployment: Deployment, number: int, given: Any) -> Fault:
    where = f"engine_args.faults[{number}]"
    if not isinstance(given, Mapping):
        raise ConfigError(_invalid(deployment, where, given, "a mapping with a `kind`"))
    known = [field.name for field in fields(Fault)]
    for key, value in given.items():
        if key not in known:
            raise ConfigError(_unknown_argument(deployment, f"{where}.{key}", key, known))
        if key != "kind" and (not _is_number(value) or value < 0):
            raise ConfigError(_invalid(deployment, f"{where}.{key}", value, "a number"))
    kinds = (*FAULTS, *START_FAULTS)
    if given.get("kind") not in kinds:
        wanted = "one of " + ", ".join(f"`{kind}`" for kind in kinds)
        raise ConfigError(_invalid(deployment, f"{where}.kind", given.get("kind"), wanted))
    return Fault(**given)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and (value <= 0 or MIN_NUMBER <= value <= MAX_NUMBER)


def _invalid(deployment: Deployment, key: str, value: Any, wanted: str) -> str:
    return f"deployment `{deployment.name}`: {key}: {value!r} is not {wanted}. Correct it."


def _unknown_argument(deployment: Deployment, where: str, key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return (
        f"deployment `{deployment.name}`: {where}: the emulated engine has no such argument."
        f"{hint} Valid arguments: {', '.join(known)}."
    )
