"""The address that an engine listens on, and waiting until the engine answers there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from servegrid.engines.base import Site
from servegrid.errors import EngineError

BACKLOG = 2048
"""Connections that may wait for the server: a burst opens all of its connections at once."""
LOOPBACK = "127.0.0.1"
UNIX_BASE_URL = "http://localhost"
SOCKET_PATH_BYTES = 107
"""The size of sockaddr_un.sun_path without its final zero; see unix(7)."""

_POLL_S = 0.05


def socket_path(site: Site, folder: Path) -> Path | None:
    """The path of a Unix socket in `folder`; None if the site uses TCP.

    Raises EngineError if the path is too long for a socket.
    """
    if site.socket == "tcp":
        return None
    path = folder / "engine.sock"
    check_socket_path(path)
    return path


def check_socket_path(path: Path) -> None:
    """Raise EngineError if `path` is too long for a Unix socket."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES:
        raise EngineError(
            f"{path}: this path has {length} bytes; the path of a Unix socket has at most "
            f"{SOCKET_PATH_BYTES} bytes. Set TMPDIR to a folder with a shorter path."
        )


def wait_until(ready: Callable[[], bool], deadline: float, name: str) -> None:
    """Poll `ready` until it returns True; an exception of `ready` ends the wait.

    `deadline` is a value of time.monotonic(). Raises EngineError with the deployment's `name` after
    the deadline.
    """
    while not ready():
        if time.monotonic() > deadline:
            raise EngineError(
                f"deployment `{name}`: the engine did not start in time and was stopped. "
                "The log shows how far it got. If it needs more time, raise `startup_s` in the "
                "profile."
            )
        time.sleep(_POLL_S)
