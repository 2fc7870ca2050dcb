"""Starts programs as users start them."""

from __future__ import annotations

import sys
from pathlib import Path


def console_script(name: str) -> str:
    """The path of a command of this Python's environment."""
    return str(Path(sys.executable).parent / name)
