"""An engine in a process of its own, and what it leaves behind."""

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
GONE_LIMIT_S = 60
KEPT_BY_TORCH = "torchinductor_"


def client_of(endpoint: Endpoint) -> httpx.Client:
    return httpx.Client(
        base_url=endpoint.base_url,
        headers={"Authorization": f"Bearer {endpoint.api_key}"},
        transport=httpx.HTTPTransport(uds=endpoint.socket),
        timeout=60,
    )


class Serving:
    """`serve_engine.py` for one deployment, with its log in `folder`.

    When the block ends, no process, shared memory or temporary file may be left.
    """

    def __init__(self, deployment: Deployment, models: Path, folder: Path, **site: Any) -> None:
        self.log = folder / "log"
        # Not in `folder`, whose path is too long for the engine's sockets.
        self.temporary = Path(tempfile.mkdtemp(prefix="sg-"))
        self.told: dict[str, Any] = {}
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
        self.hear()
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
            self.check_nothing_is_left()

    def hear(self) -> dict[str, Any]:
        """The next line it tells; all that it has told so far is in `told`."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        told: dict[str, Any] = json.loads(line)
        self.told |= told
        return told

    def up(self) -> dict[str, Any]:
        told = self.hear()
        assert "endpoint" in told, told
        return told

    def healthy(self) -> bool:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return bool(self.hear()["healthy"])

    def finish(self) -> dict[str, Any]:
        """End it in good order and hear what was left while its process still ran."""
        assert self.process.stdin
        self.process.stdin.close()
        told = self.hear()
        assert self.process.wait(60) == 0
        return told

    def end(self, signal_number: signal.Signals) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(60)

    def client(self) -> httpx.Client:
        return client_of(Endpoint(**self.told["endpoint"]))

    def check_nothing_is_left(self) -> None:
        deadline = time.monotonic() + GONE_LIMIT_S
        while left := self._left():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def _left(self) -> list[str]:
        with_folder = [
            pid for pid in os.listdir("/proc") if pid.isdecimal() and self._names_folder(pid)
        ]
        segments = [each for each in self.told.get("segments", []) if Path(each).exists()]
        known = [str(pid) for pid in self.told.get("all_pids", []) if Path(f"/proc/{pid}").exists()]
        files = [
            each.name
            for each in self.temporary.iterdir()
            if not each.name.startswith(KEPT_BY_TORCH)
        ]
        return with_folder + known + segments + files

    def _names_folder(self, pid: str) -> bool:
        try:
            return os.fsencode(self.temporary) in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
