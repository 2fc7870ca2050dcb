"""An engine in a separate process, and a check that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Deployment

SCRIPT = Path(__file__).with_name("serve_engine.py")
CLEANUP_LIMIT_S = 60
KEPT_BY_TORCH = "torchinductor_"


def http_client(endpoint: Endpoint) -> httpx.Client:
    return httpx.Client(
        base_url=endpoint.base_url,
        headers={"Authorization": f"Bearer {endpoint.api_key}"},
        transport=httpx.HTTPTransport(uds=endpoint.socket),
        timeout=60,
    )


class EngineProcess:
    """`serve_engine.py` for one deployment, with its log in `folder`.

    After the block, no process, shared memory or temporary file may remain.
    """

    def __init__(self, deployment: Deployment, models: Path, folder: Path, **site: Any) -> None:
        self.log = folder / "log"
        # Not in `folder`: its path is too long for a Unix socket.
        self.temporary = Path(tempfile.mkdtemp(prefix="sg-"))
        self.messages: dict[str, Any] = {}
        self._command = [
            sys.executable,
            str(SCRIPT),
            json.dumps(asdict(deployment)),
            json.dumps({"models": str(models), **site}),
        ]

    def __enter__(self) -> Self:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"TMPDIR": str(self.temporary)},
                start_new_session=True,
            )
        self.read_message()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.temporary, ignore_errors=True)
            self._close(check=error is None)

    def _close(self, check: bool) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            stream.close()
        if check:
            self.check_nothing_remains()

    def read_message(self) -> dict[str, Any]:
        """The next message of the process; `messages` contains all of them together."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        message: dict[str, Any] = json.loads(line)
        self.messages |= message
        return message

    def wait_until_up(self) -> dict[str, Any]:
        message = self.read_message()
        assert "endpoint" in message, message
        return message

    def healthy(self) -> bool:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return bool(self.read_message()["healthy"])

    def finish(self) -> dict[str, Any]:
        """End it normally; returns what the engine left behind before its process ended."""
        assert self.process.stdin
        self.process.stdin.close()
        message = self.read_message()
        assert self.process.wait(60) == 0
        return message

    def send_signal(self, signal_number: signal.Signals) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(60)

    def client(self) -> httpx.Client:
        return http_client(Endpoint(**self.messages["endpoint"]))

    def check_nothing_remains(self) -> None:
        deadline = time.monotonic() + CLEANUP_LIMIT_S
        while remaining := self._remaining():
            assert time.monotonic() < deadline, remaining
            time.sleep(0.05)

    def _remaining(self) -> list[str]:
        with_folder = [
            pid for pid in os.listdir("/proc") if pid.isdecimal() and self._names_folder(pid)
        ]
        segments = [path for path in self.messages.get("segments", []) if Path(path).exists()]
        known = [
            str(pid) for pid in self.messages.get("all_pids", []) if Path(f"/proc/{pid}").exists()
        ]
        files = [
            file.name
            for file in self.temporary.iterdir()
            if not file.name.startswith(KEPT_BY_TORCH)
        ]
        return with_folder + known + segments + files

    def _names_folder(self, pid: str) -> bool:
        try:
            return os.fsencode(self.temporary) in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
