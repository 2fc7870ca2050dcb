"""A mock server that can also fail. It runs as a subprocess and logs its true send times.

with start_faulty_server(FaultScript(ttft_s=0.1, itl_s=0.02)) as server:
    measure(server.endpoint, ...)
    sent = server.log().sent
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from helpers.faulty_server_process import FaultScript
from servegrid.mock_server.process import MockServer, MockServerLog, start_mock_server
from servegrid.mock_server.responses import MODEL

__all__ = ["MODEL", "FaultScript", "MockServer", "MockServerLog", "start_faulty_server"]

PROGRAM = Path(__file__).with_name("faulty_server_process.py")


def start_faulty_server(
    script: FaultScript, api_key: str | None = None
) -> AbstractContextManager[MockServer]:
    """Start a server with this script. It ends with the block."""
    return start_mock_server(script, [str(PROGRAM)], api_key)
