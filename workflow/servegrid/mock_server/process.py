"""The scripted server in a process of its own, as those who measure it have it."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from servegrid.errors import EngineError
from servegrid.mock_server.responses import MODEL, Script
from servegrid.node.processes import signals_held
from servegrid.study.endpoint import Endpoint
from servegrid.telemetry import server

PROGRAM = ("-m", "servegrid.mock_server")
START_LIMIT_S = 30.0
END_LIMIT_S = 5.0


@dataclass(frozen=True)
class Log:
    """What the server did; see `loop.Loop` for `sent` and `read`."""

    sent: Mapping[str, Sequence[int]]
    read: Mapping[str, int]
    requests: Sequence[Mapping[str, Any]]
    connections: int


@dataclass(frozen=True)
class Server:
    """A scripted server that is up."""

    endpoint: Endpoint
    process: subprocess.Popen[str] = field(repr=False)

    def log(self) -> Log:
        """Raises OSError or http.client.HTTPException where it does not tell."""
        _, body = server.get(self.endpoint, "/log")
        return Log(**json.loads(body))


@contextlib.contextmanager
def running(
    script: Script, program: Sequence[str] = PROGRAM, api_key: str | None = None
) -> Iterator[Server]:
    """A server for `script`, gone at the end of the block, or with this process.

    `program` are the arguments of the interpreter that make such a server. Raises EngineError
    where it does not come up.
    """
    with signals_held():
        process = subprocess.Popen(
            [sys.executable, *program, json.dumps(asdict(script))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        up = select.select([process.stdout], [], [], START_LIMIT_S)[0]
        told = process.stdout.readline() if up else ""
        if not told:
            raise EngineError(
                f"The scripted server was not up within {START_LIMIT_S:g} s. Its log is above; "
                "run again if the node was only busy."
            )
        scheme = "http" if script.certificate is None else "https"
        port = told.strip()
        url = f"{scheme}://127.0.0.1:{port}" if port else "http://localhost"
        yield Server(Endpoint(url, MODEL, api_key, script.unix_socket), process)
    finally:
        process.stdin.close()
        try:
            process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if script.unix_socket is not None:
            Path(script.unix_socket).unlink(missing_ok=True)
