"""Builds the scripted NVML of `fake_nvml.c`, and writes its scripts."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_suffix(".c")


def build(folder: Path, old_driver: bool = False) -> Path:
    """The folder with a `libnvidia-ml.so.1`; skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the fake NVML with")
    library = folder / "libnvidia-ml.so.1"
    options = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    options += ["-DOLD_DRIVER"] if old_driver else []
    subprocess.run([compiler, *options, "-o", library, SOURCE], check=True)
    return folder


class Script:
    """GPUs that behave as told from `origin_ns` on, which is now.

    See `fake_nvml.c` for keys; readings are in the units of nvml.h: mW, mJ, bytes, percent, MHz.
    """

    def __init__(self, init: int = 0, count: int = 0) -> None:
        """`init` and `count` are the codes with which these calls return."""
        self.origin_ns = time.monotonic_ns()
        self._lines = [f"origin {self.origin_ns}", f"init {init}", f"count {count}"]

    def gpu(self, uuid: str, part: bool = False, **readings: float | tuple[float, float]) -> None:
        """A GPU, or a part of one, and what it reads: a value, or one and its growth per second."""
        self._lines.append(f"{'mig' if part else 'gpu'} {uuid}")
        for key, reading in readings.items():
            value, per_second = reading if isinstance(reading, tuple) else (reading, 0)
            self._lines.append(f"set {key} {value} {per_second}")

    def fail(self, key: str, code: int, moment: str = "always") -> None:
        """The last GPU's `key`, or `all` of it, returns the error `code`: always, or `later`."""
        self._lines.append(f"fail {key} {code} {moment}")

    def hang(self, key: str, moment: str = "always") -> None:
        """The last GPU's `key` does not return."""
        self._lines.append(f"hang {key} {moment}")

    def begin_faults(self) -> None:
        """What is to fail or to hang `later` does so from now on."""
        self._file.with_name(f"{self._file.name}.later").touch()

    def use(self, library: Path, folder: Path, patch: pytest.MonkeyPatch, **variables: Any) -> None:
        """Let the processes that are started from now on see these GPUs, and these `variables`."""
        self._file = folder / "nvml.script"
        self._file.write_text("\n".join(self._lines) + "\n")
        patch.setenv("FAKE_NVML", str(self._file))
        patch.setenv("LD_LIBRARY_PATH", str(library))
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
