"""Runs a job's Python script in the job's own process, where Snakemake would start another one.

A job of an allocation is a process by itself already, forked from one that has the script's
modules imported. A further interpreter would isolate nothing more, and cost half a second.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import shlex
import subprocess
import sys
import traceback
from typing import Any

from snakemake import script


def install() -> None:
    """Have this process run scripts itself, where their rule asks for nothing that forbids it."""
    original = script.PythonScript._execute_cmd

    def execute(self: Any, command: str, **kwargs: Any) -> Any:
        same = kwargs.get("py_exec") == sys.executable
        elsewhere = self.container_img, self.conda_env, self.env_modules, self.bench_record
        if not same or any(elsewhere):
            return original(self, command, **kwargs)
        return run(kwargs["fname"])

    script.PythonScript._execute_cmd = execute


def run(path: str) -> None:
    """Run the script as `python PATH` does, standard streams and their files put back afterwards.

    Raises CalledProcessError, as Snakemake expects it, where it ends with another status than 0.
    """
    with _streams_kept():
        try:
            runpy.run_path(path, run_name="__main__")
            status = 0
        except SystemExit as exit:
            status = _status(exit)
        except BaseException:
            traceback.print_exc()
            status = 1
    if status:
        command = shlex.join([sys.executable, path])
        raise subprocess.CalledProcessError(status, command)


def _status(exit: SystemExit) -> int:
    if exit.code is None or isinstance(exit.code, int):
        return exit.code or 0
    print(exit.code, file=sys.stderr)
    return 1


@contextlib.contextmanager
def _streams_kept() -> Any:
    """What the script has made of its output is not for Snakemake's to follow."""
    kept = [(number, os.dup(number)) for number in (1, 2)]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
