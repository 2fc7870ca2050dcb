"""What Snakemake's scripts have in common: a log, and errors that a person can read."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from servegrid.errors import ServegridError


@contextlib.contextmanager
def reraise_as(kind: type[Exception]) -> Iterator[None]:
    """Raise errors of ours as `kind`, which the caller knows how to show without a traceback."""
    try:
        yield
    except ServegridError as error:
        raise kind(str(error)) from None


@contextlib.contextmanager
def report_work_span() -> Iterator[None]:
    """Tell the executor, where it asks for it, that the block is what its job exists for."""
    began = time.time()
    yield
    if report := os.environ.get("SUBMITIT_TASK_REPORT"):
        Path(report).write_text(f"{began} {time.time()}")


@contextlib.contextmanager
def redirect_output(log: str | Path) -> Iterator[None]:
    """Send all output of the block, that of C libraries included, to `log`.

    A ServegridError ends the process with status 1 and its message alone, in the log and on
    the terminal; any other exception keeps its traceback.
    """
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    terminal = os.dup(2)
    with open(log, "ab", buffering=0) as file:  # noqa: PTH123 - unbuffered, shared by C code
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except ServegridError as error:
        message = f"{error}\n"
        sys.stderr.write(message)
        os.write(terminal, message.encode())
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
