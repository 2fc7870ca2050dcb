"""A wall clock that a test can step for other processes: see `stepped_clock.c`."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


class SteppedClock:
    """Processes with the environment `env` see `CLOCK_REALTIME` plus the last step."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "stepped_clock.so", folder / "clock"
        options = ("-shared", "-fPIC", "-O2", "-Wall", "-Werror")
        subprocess.run(["cc", *options, "-o", library, SOURCE], check=True)
        self._file.write_bytes(struct.pack("d", 0.0))
        self.env = {"LD_PRELOAD": str(library), "STEPPED_CLOCK": str(self._file)}

    def step(self, seconds: float) -> None:
        """Step the clock to `seconds` after the true one."""
        with self._file.open("r+b") as file:  # the processes have mapped this file
            file.write(struct.pack("d", seconds))
