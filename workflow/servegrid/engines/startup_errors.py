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
import textwrap
import traceback
from pathlib import Path

FILE_VARIABLE = "SERVEGRID_ENGINE_ERRORS"
MAX_LINES = 4
MAX_CHARACTERS = 600


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
        FILE_VARIABLE: str(folder / "errors.jsonl"),
    }


def first_error(folder: Path) -> str | None:
    """The first error in `folder` with an exception; later errors are consequences of it."""
    try:
        lines = (folder / "errors.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    errors = [json.loads(line) for line in lines]
    return next((error["exception"] for error in errors if error["exception"]), None)


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
