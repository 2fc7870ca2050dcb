"""Requests of a load by time: a process of its own prepares them while the load runs.

How many requests a load needs is known only at its end. So a bounded number is prepared before the
start, and more while they are sent. The process has a low priority, and waits while enough requests
are ready.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Self

from servegrid.client.inflight import PreparedRequest
from servegrid.client.workers import end_helper, start_helper

_FRAME = struct.Struct("qqI")
"""`due_ns` or -1, `think_ns`, and the size of the request in bytes."""
_READ = 1 << 18
_PIPE_SIZE = 1 << 20
_METHOD = "POST"


class RequestSupply:
    """The requests of an iterator, of which at most about `ahead` are held in memory.

    `ahead` of them are prepared at once; a process makes the others. It has the methods of a deque
    that the event loop uses. `waits` counts how often the next request was not ready. Use it as a
    context manager: it ends the process.
    """

    def __init__(self, requests: Iterator[PreparedRequest], ahead: int) -> None:
        self.waits = 0
        self._requests = requests
        self._stock = deque(islice(requests, ahead))
        self._low = max(ahead // 2, 1)
        self._received = bytearray()
        self._reader: int | None = None
        self._pid: int | None = None

    def __enter__(self) -> Self:
        self._reader, writer = os.pipe()
        self._pid = start_helper(partial(_produce, self._requests, writer), writer)
        os.close(writer)
        os.set_blocking(self._reader, False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._reader is not None:
            os.close(self._reader)
            self._reader = None
        if self._pid is not None:
            end_helper(self._pid)
            self._pid = None

    def __bool__(self) -> bool:
        self._refill()
        return bool(self._stock)

    def __len__(self) -> int:
        return len(self._stock)

    def __iter__(self) -> Iterator[PreparedRequest]:
        return iter(self._stock)

    def __getitem__(self, index: int) -> PreparedRequest:
        return self._stock[index]

    def popleft(self) -> PreparedRequest:
        return self._stock.popleft()

    def clear(self) -> None:
        """Let it be empty from now on."""
        self._stock.clear()
        if self._reader is not None:
            os.close(self._reader)
            self._reader = None

    def _refill(self) -> None:
        """Read one piece of what the process has prepared. It waits only if nothing is left."""
        if self._reader is None or len(self._stock) > self._low:
            return
        self._read(self._reader)
        while not self._stock and self._reader is not None:
            self.waits += 1
            select.select([self._reader], [], [])
            self._read(self._reader)

    def _read(self, reader: int) -> None:
        try:
            data = os.read(reader, _READ)
        except BlockingIOError:
            return
        if not data:
            os.close(reader)
            self._reader = None
            return
        self._received += data
        at = 0
        while len(self._received) >= at + _FRAME.size:
            due_ns, think_ns, size = _FRAME.unpack_from(self._received, at)
            end = at + _FRAME.size + size
            if len(self._received) < end:
                break
            request = bytes(self._received[at + _FRAME.size : end])
            due = None if due_ns < 0 else due_ns
            self._stock.append(PreparedRequest(_METHOD, request, due, think_ns))
            at = end
        del self._received[:at]


def _produce(requests: Iterator[PreparedRequest], writer: int) -> None:
    """Write the requests to the pipe, which blocks while it is full."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    for request in requests:
        due_ns = -1 if request.due_ns is None else request.due_ns
        data = memoryview(_FRAME.pack(due_ns, request.think_ns, len(request.data)) + request.data)
        while data:
            data = data[os.write(writer, data) :]
