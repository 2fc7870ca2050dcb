"""Runs a job's Python script in the job's own process instead of a new one.

A job of an allocation already is a process of its own, forked from a process that has imported
the script's modules. Another interpreter would isolate nothing more and would cost 0.5 s.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from snakemake import script


def install() -> None:
    """Make this process run scripts itself, unless their rule needs another environment."""
    original = script.PythonScript._execute_cmd

    def execute(self: Any, command: str, **kwargs: Any) -> Any:
        same_python = kwargs.get("py_exec") == sys.executable
        elsewhere = self.container_img, self.conda_env, self.env_modules, self.bench_record
        if not same_python or any(elsewhere):
            return original(self, command, **kwargs)
        return run_script(kwargs["fname"])

    script.PythonScript._execute_cmd = execute


def run_script(path: str) -> None:
    """Run the script as `python PATH` does, then restore the standard streams.

    Raises CalledProcessError, as Snakemake expects, if the exit status is not 0.
    """
    with _streams_restored():
        try:
            runpy.run_path(path, run_name="__main__")
            status = 0
        except SystemExit as exit:
            status = _exit_status(exit)
        except BaseException:
            traceback.print_exc()
            status = 1
    if status:
        command = shlex.join([sys.executable, path])
        raise subprocess.CalledProcessError(status, command)


def _exit_status(exit: SystemExit) -> int:
    if exit.code is None or isinstance(exit.code, int):
        return exit.code or 0
    print(exit.code, file=sys.stderr)
    return 1


@contextlib.contextmanager
def _streams_restored() -> Iterator[None]:
    """A script may redirect its output. Snakemake's own output must not follow."""
    copies = [(number, os.dup(number)) for number in (1, 2)]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in copies:
            os.dup2(copy, number)
            os.close(copy)
