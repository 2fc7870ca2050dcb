"""Starts programs as users start them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

HANG_S = 540
"""A program that runs for so long hangs. A machine that is busy with other tests needs up to half
of it for one start of the real vLLM."""


def console_script(name: str) -> str:
    """The path of a command of this Python's environment."""
    return str(Path(sys.executable).parent / name)


def wait_for_end(process: subprocess.Popen[Any], log: Path, limit_s: float = HANG_S) -> str:
    """The output in `log` when the process has ended. An AssertionError has it, too."""
    try:
        process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        end = log.read_text(encoding="utf-8")[-6000:]
        raise AssertionError(f"it still ran after {limit_s:g} s. Its output:\n{end}") from None
    return log.read_text(encoding="utf-8")
