"""Where an engine listens, and how one waits for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from servegrid.engines.base import Site
from servegrid.errors import EngineError

LOOPBACK = "127.0.0.1"
UNIX_BASE_URL = "http://localhost"
SOCKET_PATH_BYTES = 107
"""What fits into sockaddr_un.sun_path beside its final zero; see unix(7)."""

POLL_S = 0.05


def socket_path(site: Site, folder: Path) -> Path | None:
    """The path of a Unix socket in `folder`; None where the site wants TCP.

    Raises EngineError where the path is too long for a socket.
    """
    if site.socket == "tcp":
        return None
    path = folder / "engine.sock"
    check_socket_path(path)
    return path


def check_socket_path(path: Path) -> None:
    """Raise EngineError where no Unix socket can have this path."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES:
        raise EngineError(
            f"{path}: a Unix socket's path has at most {SOCKET_PATH_BYTES} bytes and this one "
            f"{length}. Set TMPDIR to a shorter folder."
        )


def wait_until(ready: Callable[[], bool], deadline: float, name: str) -> None:
    """Poll `ready` until it is true; what it raises ends the waiting.

    `deadline` is a time of time.monotonic(). Raises EngineError, naming the deployment, when it
    has passed.
    """
    while not ready():
        if time.monotonic() > deadline:
            raise EngineError(
                f"deployment `{name}`: the engine was not up within its limit and was stopped. "
                "The log says how far it came; raise `startup_s` if it was only slow."
            )
        time.sleep(POLL_S)
