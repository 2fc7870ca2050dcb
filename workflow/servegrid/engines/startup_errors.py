"""Finds the cause if vLLM does not start: its processes also write their errors to a file.

vLLM's processes report to their parent only that they failed; the cause is in their log. So
servegrid configures vLLM's logging (VLLM_LOGGING_CONFIG_PATH, which each of its processes reads) to
write each error to a file as well.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import textwrap
import traceback
from pathlib import Path

from servegrid.errors import EngineError, NotServableError
from servegrid.records.verdict import (
    OOM_AT_START,
    UNSUPPORTED,
    is_out_of_memory,
    memory_figures,
)

FILE_VARIABLE = "SERVEGRID_ENGINE_ERRORS"
MAX_LINES = 4
MAX_CHARACTERS = 600
ERRORS_FILE = "errors.jsonl"

_NO_ROOM = re.compile(
    r"No available memory for the cache blocks"
    r"|larger than the available KV cache memory"
    r"|larger than the maximum number of tokens that can be stored in KV cache"
)
_NO_SUPPORT = re.compile(
    r"is not supported for the current GPU"
    r"|Bfloat16 is only supported on GPUs"
    r"|is not supported for quantization"
    r"|greater than the derived max_model_len"
    r"|must be divisible by tensor parallel size"
)
_OTHER_PROCESS = re.compile(r"less than desired GPU memory utilization")
"""Messages of vLLM 0.10 to 0.32. The last one: another process has taken the GPU's memory."""


class ErrorFileHandler(logging.Handler):
    """Appends each error as one line of JSON to the file named by the variable `FILE_VARIABLE`."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        line = {
            "message": record.getMessage(),
            "exception": describe_failure(error) if error else None,
        }
        with (
            contextlib.suppress(KeyError, OSError),
            Path(os.environ[FILE_VARIABLE]).open("a", encoding="utf-8") as f,
        ):
            f.write(json.dumps(line) + "\n")


def logging_variables(folder: Path) -> dict[str, str]:
    """Environment variables that make vLLM's processes write their errors to `folder`."""
    config = folder / "logging.json"
    handler = f"{ErrorFileHandler.__module__}.{ErrorFileHandler.__qualname__}"
    line_format = "%(levelname)s %(asctime)s %(process)d [%(filename)s:%(lineno)d] %(message)s"
    config.write_text(
        json.dumps(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "formatters": {"plain": {"format": line_format}},
                "handlers": {
                    "log": {"class": "logging.StreamHandler", "formatter": "plain"},
                    "errors": {"class": handler, "level": "ERROR"},
                },
                "loggers": {
                    "vllm": {"handlers": ["log", "errors"], "level": "INFO", "propagate": False}
                },
            }
        ),
        encoding="utf-8",
    )
    return {
        "VLLM_LOGGING_CONFIG_PATH": str(config),
        FILE_VARIABLE: str(folder / ERRORS_FILE),
    }


def first_error(folder: Path) -> str | None:
    """The first error in `folder` with an exception; later errors are consequences of it."""
    return next(iter(_exceptions(folder / ERRORS_FILE)), None)


def find_death(file: Path, offset: int = 0) -> str | None:
    """Why the engine died, from what its processes wrote to `file` from byte `offset` on.

    The first error of the memory if there is one, else the first exception; None without one.
    """
    found = _exceptions(file, offset)
    return next(filter(is_out_of_memory, found), next(iter(found), None))


def end_offset(file: Path) -> int:
    """The size of `file` in bytes; 0 if it does not exist."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def startup_error(message: str, cause: str) -> EngineError:
    """The error about a failed start: NotServableError if `cause` says that a repeat fails, too.

    If another process uses the GPU's memory, a repeat can succeed.
    """
    if not _OTHER_PROCESS.search(cause):
        if _NO_ROOM.search(cause) or is_out_of_memory(cause):
            return NotServableError(message, OOM_AT_START, memory_figures(cause))
        if _NO_SUPPORT.search(cause):
            return NotServableError(message, UNSUPPORTED)
    return EngineError(message)


def _exceptions(file: Path, offset: int = 0) -> list[str]:
    try:
        with file.open("rb") as lines:
            lines.seek(offset)
            errors = [json.loads(line) for line in lines if line.endswith(b"\n")]
    except FileNotFoundError:
        return []
    return [error["exception"] for error in errors if error["exception"]]


def describe_failure(error: BaseException | None) -> str:
    """The exception's type and message, without its traceback."""
    return (
        "".join(traceback.format_exception_only(error)).strip()
        if error
        else "it ended without an error message."
    )


def shorten(cause: str) -> str:
    """The first `MAX_LINES` lines of `cause` as one line of at most `MAX_CHARACTERS`."""
    return textwrap.shorten(" ".join(cause.splitlines()[:MAX_LINES]), MAX_CHARACTERS)
