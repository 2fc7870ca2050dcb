"""Keeps everything else from writing into a live view: child processes, and the echo of Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import select
import termios
import threading
from collections.abc import Callable, Iterator, Sequence


class TerminalCapture:
    """Hands each line written to one of the descriptors to `write_line` until it is closed.

    Descriptors are replaced, not Python's `sys.stderr`: child processes inherit descriptors.
    """

    def __init__(self, descriptors: Sequence[int], write_line: Callable[[str], None]) -> None:
        self._write_line = write_line
        self._originals = [(each, os.dup(each)) for each in descriptors]
        self._lines, lines = os.pipe()
        self._wakeup, self._stop = os.pipe()
        os.set_blocking(self._lines, False)
        for each in descriptors:
            os.dup2(lines, each)
        os.close(lines)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the descriptors back; all that was written before has then been handed over."""
        for each, original in self._originals:
            os.dup2(original, each)
            os.close(original)
        self._originals = []
        os.close(self._stop)  # end of file on `_wakeup`
        self._thread.join()
        os.close(self._lines)
        os.close(self._wakeup)

    def _read(self) -> None:
        rest = b""
        stopping = False
        while not stopping:
            ready, _, _ = select.select([self._lines, self._wakeup], [], [])
            stopping = self._wakeup in ready
            *lines, rest = (rest + self._available()).split(b"\n")
            for line in lines:
                self._write_line(line.decode(errors="replace"))
        if rest:
            self._write_line(rest.decode(errors="replace"))

    def _available(self) -> bytes:
        chunks: list[bytes] = []
        while True:
            try:
                chunk = os.read(self._lines, 65536)
            except BlockingIOError:
                return b"".join(chunks)
            if not chunk:
                return b"".join(chunks)
            chunks.append(chunk)


@contextlib.contextmanager
def no_control_echo(terminal: int) -> Iterator[None]:
    """Has the terminal not print `^C`, which would move a live view by a line."""
    before = None
    with contextlib.suppress(OSError, termios.error):
        # A background process would be stopped for changing its terminal.
        if os.tcgetpgrp(terminal) == os.getpgrp():
            before = termios.tcgetattr(terminal)
            changed = [*before]
            changed[3] &= ~termios.ECHOCTL
            termios.tcsetattr(terminal, termios.TCSANOW, changed)
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(OSError, termios.error):
                termios.tcsetattr(terminal, termios.TCSANOW, before)
