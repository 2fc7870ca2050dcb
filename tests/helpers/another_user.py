"""Runs a function as another user of this machine, as a stranger on a shared node would."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

ANOTHER_USER = 12345
LIMIT_S = 60


def as_another_user(function: Callable[..., Any], *arguments: Any) -> Any:
    """The JSON data that `function` returns in a forked process with another uid.

    Only root can become another user. Without root, the process keeps its uid, so test there only
    what another process can reach: ports, not files.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(LIMIT_S)
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(ANOTHER_USER)
                os.setuid(ANOTHER_USER)
            os.write(writer, json.dumps(function(*arguments)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as output:
        text = output.read()
    assert os.waitpid(pid, 0)[1] == 0, text
    return json.loads(text)
