"""Why vLLM's own processes failed: what they log as an error, kept for the one who started them.

vLLM's processes tell their parent only that they have failed; the cause is in their log. So its
logging is configured (VLLM_LOGGING_CONFIG_PATH, which its processes read when they start) to
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
    """Appends each error to the file that `FILE_VARIABLE` names, as one line of JSON."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        line = {
            "message": record.getMessage(),
            "exception": describe_failure(error) if error else None,
        }
        with contextlib.suppress(KeyError, OSError), Path(os.environ[FILE_VARIABLE]).open("a") as f:
            f.write(json.dumps(line) + "\n")


def logging_variables(folder: Path) -> dict[str, str]:
    """The environment that makes vLLM's processes keep their errors in `folder`."""
    config = folder / "logging.json"
    here = f"{ErrorFileHandler.__module__}.{ErrorFileHandler.__qualname__}"
    form = "%(levelname)s %(asctime)s %(process)d [%(filename)s:%(lineno)d] %(message)s"
    config.write_text(
        json.dumps(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "formatters": {"plain": {"format": form}},
                "handlers": {
                    "log": {"class": "logging.StreamHandler", "formatter": "plain"},
                    "kept": {"class": here, "level": "ERROR"},
                },
                "loggers": {
                    "vllm": {"handlers": ["log", "kept"], "level": "INFO", "propagate": False}
                },
            }
        )
    )
    return {
        "VLLM_LOGGING_CONFIG_PATH": str(config),
        FILE_VARIABLE: str(folder / "errors.jsonl"),
    }


def first_error(folder: Path) -> str | None:
    """The first error kept in `folder` that came with an exception: the others follow from it."""
    try:
        lines = (folder / "errors.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return None
    errors = [json.loads(line) for line in lines]
    return next((each["exception"] for each in errors if each["exception"]), None)


def describe_failure(error: BaseException | None) -> str:
    """The exception's own words, without its traceback."""
    return "".join(traceback.format_exception_only(error)).strip() if error else "it ended."


def shorten(cause: str) -> str:
    """The first lines of `cause` on one, as much of them as a person reads."""
    return textwrap.shorten(" ".join(cause.splitlines()[:MAX_LINES]), MAX_CHARACTERS)
