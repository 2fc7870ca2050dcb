"""Helpers for Snakemake's scripts: a log file, and errors without a traceback."""

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
    """Raise servegrid's errors as `kind`, which the caller shows without a traceback."""
    try:
        yield
    except ServegridError as error:
        raise kind(str(error)) from None


@contextlib.contextmanager
def report_work_span() -> Iterator[None]:
    """Report to the executor, if it asks for it, when the real work of the job ran: this block."""
    began = time.time()
    yield
    if report := os.environ.get("SUBMITIT_TASK_REPORT"):
        Path(report).write_text(f"{began} {time.time()}", encoding="utf-8")


@contextlib.contextmanager
def redirect_output(log: str | Path) -> Iterator[None]:
    """Redirect all output of the block to the file `log`, including that of C libraries.

    A ServegridError ends the process with status 1, and only its message is printed, to the log and
    to the terminal. Any other exception keeps its traceback.
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
