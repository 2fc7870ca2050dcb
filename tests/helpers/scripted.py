"""A scripted OpenAI-compatible server in a process of its own, which logs its true send times.

with serving(Script(ttft_s=0.1, itl_s=0.02)) as server:
    measure(server.endpoint, ...)
    sent = server.log().sent
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from helpers.scripted_server import Script
from servegrid.mock_server.process import Log, Server, running
from servegrid.mock_server.responses import MODEL

__all__ = ["MODEL", "Log", "Script", "Server", "serving"]

PROGRAM = Path(__file__).with_name("scripted_server.py")


def serving(script: Script, api_key: str | None = None) -> AbstractContextManager[Server]:
    """A server for the script, faults and all, gone at the end of the block."""
    return running(script, [str(PROGRAM)], api_key)
