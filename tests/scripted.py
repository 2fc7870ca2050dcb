"""A scripted OpenAI-compatible server in a process of its own, which logs its true send times.

with serving(Script(ttft_s=0.1, itl_s=0.02)) as server:
    measure(server.endpoint, ...)
    sent = server.log().sent
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from scripted_server import MODEL, Script
from servegrid.endpoint import Endpoint

__all__ = ["MODEL", "Log", "Script", "Server", "serving"]

PROGRAM = Path(__file__).with_name("scripted_server.py")


@dataclass(frozen=True)
class Log:
    """What the server saw and did: send times in ns of CLOCK_MONOTONIC per X-Request-Id."""

    sent: dict[str, list[int]]
    requests: list[dict[str, Any]]
    connections: int


@dataclass
class Server:
    """A server that is up."""

    endpoint: Endpoint
    process: subprocess.Popen[str] = field(repr=False)

    def log(self) -> Log:
        transport = httpx.HTTPTransport(uds=self.endpoint.socket)
        with httpx.Client(transport=transport, base_url=self.endpoint.base_url) as client:
            return Log(**client.get("/log", timeout=30).json())


@contextlib.contextmanager
def serving(script: Script, api_key: str | None = None) -> Iterator[Server]:
    """A server for the script, gone at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), json.dumps(asdict(script))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        scheme = "http" if script.certificate is None else "https"
        url = f"{scheme}://127.0.0.1:{port}" if port else "http://localhost"
        yield Server(Endpoint(url, MODEL, api_key, script.unix_socket), process)
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()
        if script.unix_socket is not None:
            Path(script.unix_socket).unlink(missing_ok=True)
