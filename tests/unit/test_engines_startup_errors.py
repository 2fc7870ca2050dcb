"""The errors in the logs of vLLM's processes explain a failed start."""

from __future__ import annotations

import json
import logging
import logging.config
from collections.abc import Iterator
from pathlib import Path

import pytest

from servegrid.engines import startup_errors
from servegrid.errors import NotServableError


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


NO_BLOCKS = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_ut"
TOO_SMALL = (
    "ValueError: To serve at least one request with the model's max seq len (4096), (0.50 GiB KV "
    "cache is needed, which is larger than the available KV cache memory (0.13 GiB). Based on"
)
BUSY = (
    "ValueError: Free memory on device cuda:0 (1.2/15.8 GiB) on startup is less than desired GPU "
    "memory utilization (0.9, 14.2 GiB). Decrease GPU memory utilization or reduce GPU memory used "
    "by other processes. torch.OutOfMemoryError: CUDA out of memory."
)


@pytest.mark.parametrize(
    ("cause", "verdict", "evidence"),
    [
        (NO_BLOCKS, "oom_at_start", {}),
        (
            TOO_SMALL,
            "oom_at_start",
            {"max_model_len": 4096, "kv_needed_gib": 0.5, "kv_available_gib": 0.13},
        ),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB.",
            "oom_at_start",
            {"tried_gib": 2.5},
        ),
        ("ValueError: Bfloat16 is only supported on GPUs with compute", "unsupported", {}),
        (
            "ValueError: The quantization method awq is not supported for the current GPU.",
            "unsupported",
            {},
        ),
        (
            "ValueError: User-specified max_model_len (8192) is greater than the derived "
            "max_model_len (max_position_embeddings=4096)",
            "unsupported",
            {},
        ),
        (
            "ValueError: Total number of attention heads (14) must be divisible by tensor parallel "
            "size (4).",
            "unsupported",
            {},
        ),
    ],
)
def test_a_start_that_cannot_succeed_is_a_result(
    cause: str, verdict: str, evidence: dict[str, float]
) -> None:
    error = startup_errors.startup_error("deployment `d`: it did not start", cause)
    assert isinstance(error, NotServableError)
    assert (error.verdict, error.evidence) == (verdict, evidence)
    assert str(error) == "deployment `d`: it did not start"


@pytest.mark.parametrize("cause", [BUSY, "RuntimeError: NCCL error", "it ended"])
def test_a_start_that_may_succeed_later_is_an_error(cause: str) -> None:
    error = startup_errors.startup_error("it did not start", cause)
    assert not isinstance(error, NotServableError)


def test_an_engine_s_death_is_found_after_what_it_wrote_before(
    log: logging.Logger, tmp_path: Path
) -> None:
    def write(*errors: Exception) -> None:
        for error in errors:
            try:
                raise error
            except Exception:
                log.exception("an error")

    file = tmp_path / startup_errors.ERRORS_FILE
    assert startup_errors.find_death(file) is None
    assert startup_errors.end_offset(file) == 0
    write(RuntimeError("CUDA out of memory in an earlier request"))
    offset = startup_errors.end_offset(file)
    assert startup_errors.find_death(file, offset) is None
    write(ValueError("EngineDeadError"), RuntimeError("CUDA out of memory"))
    assert startup_errors.find_death(file, offset) == "RuntimeError: CUDA out of memory"
    (tmp_path / "other.jsonl").write_text('{"exception": "ValueError: x"}\n{"excep')
    assert startup_errors.find_death(tmp_path / "other.jsonl") == "ValueError: x"
