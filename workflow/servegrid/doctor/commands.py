"""Programs that are asked something: with a time limit, and never with a traceback."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LIMIT_S = 20.0
INHERITED = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")


@dataclass(frozen=True)
class Answer:
    """What a program said; `status` is None where it did not end in time or could not be run."""

    status: int | None
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.status == 0

    @property
    def complaint(self) -> str:
        """Its own words on one line: of many lines the last two."""
        text = self.stderr.strip() or self.stdout.strip()
        lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
        words = " ".join(lines[-2:])
        return words or f"status {self.status} and no word"


Ask = Callable[[Sequence[str]], Answer]


def ask(command: Sequence[str], limit_s: float = LIMIT_S) -> Answer:
    """Run a program outside any surrounding Slurm job, for at most `limit_s` seconds."""
    # As submitit does it, but for the variable that says where Slurm's configuration lies.
    env = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(INHERITED)
    }
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, stderr=f"no answer within {limit_s:g} s", seconds=limit_s)
    except OSError as error:
        return Answer(None, stderr=f"cannot be run ({error.strerror})")
    return Answer(done.returncode, done.stdout, done.stderr, time.monotonic() - start)
