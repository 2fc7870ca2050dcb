"""Runs the mock server as a subprocess, as those who measure it use it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from servegrid.errors import EngineError
from servegrid.mock_server.responses import MODEL, ResponseScript
from servegrid.mock_server.server import KEY_VARIABLE
from servegrid.node.processes import block_signals
from servegrid.study.endpoint import Endpoint
from servegrid.telemetry import server

PROGRAM = ("-m", "servegrid.mock_server")
START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class MockServerLog:
    """What the server did. `server.MockServerLoop` explains `sent` and `read`."""

    sent: Mapping[str, Sequence[int]]
    read: Mapping[str, int]
    requests: Sequence[Mapping[str, Any]]
    connections: int


@dataclass(frozen=True)
class MockServer:
    """A running mock server."""

    endpoint: Endpoint
    process: subprocess.Popen[str] = field(repr=False)

    def log(self) -> MockServerLog:
        """Read its log. Raises OSError or http.client.HTTPException if it does not respond."""
        _, body = server.http_get(self.endpoint, "/log")
        return MockServerLog(**json.loads(body))


@contextlib.contextmanager
def start_mock_server(
    script: ResponseScript, program: Sequence[str] = PROGRAM, api_key: str | None = None
) -> Iterator[MockServer]:
    """Start a mock server. It ends with the block, or with this process.

    `program` are the arguments of the Python interpreter that start it. With an `api_key`, the
    server wants it on every path except /health, so that no other user of the node can use it.
    Raises EngineError if it does not start in time.
    """
    with block_signals():
        process = subprocess.Popen(
            [sys.executable, *program, json.dumps(asdict(script))],
            env=os.environ | ({KEY_VARIABLE: api_key} if api_key else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        ready = select.select([process.stdout], [], [], START_TIMEOUT_S)[0]
        first_line = process.stdout.readline() if ready else ""
        if not first_line:
            raise EngineError(
                f"The mock server did not start within {START_TIMEOUT_S:g} s. Its output is above. "
                "If the node was only busy, run the same command again."
            )
        scheme = "http" if script.certificate is None else "https"
        port = first_line.strip()
        url = f"{scheme}://127.0.0.1:{port}" if port else "http://localhost"
        yield MockServer(
            Endpoint(url, MODEL, api_key, script.unix_socket, started_here=True), process
        )
    finally:
        process.stdin.close()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if script.unix_socket is not None:
            Path(script.unix_socket).unlink(missing_ok=True)
