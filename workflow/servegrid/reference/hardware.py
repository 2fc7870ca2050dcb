"""Finds the file of prices for the capacity plan."""

from __future__ import annotations

from pathlib import Path

DEFAULT_HARDWARE_FILE = Path(__file__).with_name("hardware.yaml")
"""The prices of this package. In a checkout it is a link to config/hardware.yaml."""


def find_hardware_file(*folders: Path) -> Path:
    """The first `config/hardware.yaml` in the working directory or in `folders`.

    If there is none, DEFAULT_HARDWARE_FILE.
    """
    candidates = (folder / "config" / "hardware.yaml" for folder in (Path(), *folders))
    return next((path for path in candidates if path.is_file()), DEFAULT_HARDWARE_FILE)
