"""The errors in the logs of vLLM's processes explain a failed start."""

from __future__ import annotations

import json
import logging
import logging.config
from collections.abc import Iterator
from pathlib import Path

import pytest

from servegrid.engines import startup_errors


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """vLLM's logger, configured as in its processes."""
    for name, value in startup_errors.logging_variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    config = json.loads((tmp_path / "logging.json").read_text())
    logging.config.dictConfig(config)
    logger = logging.getLogger("vllm")
    yield logger
    logger.handlers.clear()
    logger.propagate = True


def test_the_first_exception_is_the_cause(log: logging.Logger, tmp_path: Path) -> None:
    log.info("starting")
    log.error("something odd, without an exception")
    for error in (ValueError("no room for the KV cache"), RuntimeError("engine failed")):
        try:
            raise error
        except Exception:
            log.exception("it did not start")
    assert startup_errors.first_error(tmp_path) == "ValueError: no room for the KV cache"


def test_errors_without_an_exception_are_no_cause(log: logging.Logger, tmp_path: Path) -> None:
    assert startup_errors.first_error(tmp_path) is None
    log.error("without an exception")
    assert startup_errors.first_error(tmp_path) is None


def test_logging_works_after_the_folder_of_the_engine_was_removed(
    log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(startup_errors.FILE_VARIABLE, "/no/where/errors.jsonl")
    log.error("late")
    monkeypatch.delenv(startup_errors.FILE_VARIABLE)
    log.error("later")


def test_a_cause_is_shortened_to_one_line() -> None:
    assert startup_errors.describe_failure(ValueError("two\nlines")) == "ValueError: two\nlines"
    assert startup_errors.shorten("ValueError: two\n  lines") == "ValueError: two lines"
    assert startup_errors.shorten("1\n2\n3\n4\n5\n6") == "1 2 3 4"
    assert len(startup_errors.shorten("word " * 1000)) <= startup_errors.MAX_CHARACTERS
