"""Builds the fake NVML library of `fake_nvml.c` and writes its scripts."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_suffix(".c")


def build(folder: Path, old_driver: bool = False) -> Path:
    """The folder with a `libnvidia-ml.so.1`; skips the test if there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the fake NVML with")
    library = folder / "libnvidia-ml.so.1"
    options = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    options += ["-DOLD_DRIVER"] if old_driver else []
    subprocess.run([compiler, *options, "-o", library, SOURCE], check=True)
    return folder


class GpuScript:
    """A script for fake GPUs; its time starts now, at `origin_ns`.

    `fake_nvml.c` lists the keys. Readings have the units of nvml.h: mW, mJ, bytes, percent, MHz.
    """

    def __init__(self, init: int = 0, count: int = 0) -> None:
        """`init` and `count` are the return codes of nvmlInit and nvmlDeviceGetCount."""
        self.origin_ns = time.monotonic_ns()
        self._lines = [f"origin {self.origin_ns}", f"init {init}", f"count {count}"]

    def gpu(self, uuid: str, part: bool = False, **readings: float | tuple[float, float]) -> None:
        """Add a GPU or a MIG device. A reading is a value, or a value and its rate per second."""
        self._lines.append(f"{'mig' if part else 'gpu'} {uuid}")
        for key, reading in readings.items():
            value, per_second = reading if isinstance(reading, tuple) else (reading, 0)
            self._lines.append(f"set {key} {value} {per_second}")

    def fail(self, key: str, code: int, moment: str = "always") -> None:
        """Make `key` (or `all`) of the last GPU return the error `code`: `always`, or `later`."""
        self._lines.append(f"fail {key} {code} {moment}")

    def hang(self, key: str, moment: str = "always") -> None:
        """Make the call for `key` of the last GPU hang."""
        self._lines.append(f"hang {key} {moment}")

    def begin_faults(self) -> None:
        """Start the faults marked `later` now."""
        self._file.with_name(f"{self._file.name}.later").touch()

    def use(self, library: Path, folder: Path, patch: pytest.MonkeyPatch, **variables: Any) -> None:
        """Show these GPUs, and set these `variables`, in all processes started from now on."""
        self._file = folder / "nvml.script"
        self._file.write_text("\n".join(self._lines) + "\n")
        patch.setenv("FAKE_NVML", str(self._file))
        patch.setenv("LD_LIBRARY_PATH", str(library))
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
