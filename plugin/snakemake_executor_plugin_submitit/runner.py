"""Runs jobs one at a time, each forked from a process that has imported Snakemake.

An allocation starts this process before its service, so the jobs' memory contains nothing of the
service. It reads one request per line from its standard input and answers with the exit status:

    {"argv": […], "cwd": "…", "env": {…}, "log": "…"}  →  {"status": 0}

When its input ends, it kills the running job with its process group. So no job outlives its
allocation, even if the allocation was killed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from snakemake_executor_plugin_submitit.spool import Task

# Every job imports these modules. Otherwise this takes 0.3 s per job.
PRELOADED = (
    *("snakemake.cli", "snakemake.workflow", "snakemake.notebook", "snakemake.storage"),
    *("jsonschema", "nbformat", "numpy.random", "pandas", "requests", "smart_open"),
)

SIGNAL_LATENCY_S = 0.5


class Runner:
    """The allocation's side: starts the runner's process and communicates with it.

    `preload` names modules that the jobs need; they can be in the folder `modules`.
    """

    def __init__(self, preload: Sequence[str] = (), modules: str = "") -> None:
        program = f"import {__name__} as runner; runner.main()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program, modules, *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # it must outlive a killed allocation to clean up
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def close(self) -> None:
        """Kill the running job, if there is one. Can be called again."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._process.wait()
        self._answers.close()

    def run(self, task: Task, env: Mapping[str, str], log: Path) -> int:
        """Run the task. Returns its exit status; negative if a signal ended it.

        Its standard output and error go to `log`. Raises RuntimeError if the runner's process has
        ended.
        """
        request = {
            "argv": task.argv,
            "cwd": task.cwd,
            "env": dict(env),
            "log": str(log),
        }
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        # Python runs signal handlers between these waits, whichever thread received the signal.
        while not select.select([self._answers], [], [], SIGNAL_LATENCY_S)[0]:
            pass
        answer = self._answers.readline()
        if not answer:
            raise RuntimeError(f"the process for jobs ended with status {self._process.wait()}")
        return int(json.loads(answer)["status"])


def main() -> None:
    requests, answers = _take_over_standard_streams()
    wakeup, on_child = os.pipe()
    for descriptor in (wakeup, on_child):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(on_child, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # The allocation handles signals that are sent to all its processes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    modules, *preload = sys.argv[1:]
    if modules:
        sys.path.append(modules)
    _preload(preload)
    while line := requests.readline():
        pid = os.fork()
        if pid == 0:
            requests.close()
            answers.close()
            os._exit(_run_job(json.loads(line)))
        ended = _wait(pid, requests, wakeup)
        status = _clean_up(pid)
        if not ended:
            return
        answers.write(json.dumps({"status": status}).encode() + b"\n")


def _take_over_standard_streams() -> tuple[IO[bytes], IO[bytes]]:
    """The pipes to the allocation. From now on, printed text goes to the allocation's log."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def _preload(modules: Sequence[str]) -> None:
    gc.disable()  # nothing that is imported becomes garbage
    for name in (*PRELOADED, *modules):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from snakemake.cli import get_argument_parser

    from snakemake_executor_plugin_submitit import inprocess

    inprocess.install()
    get_argument_parser()  # finds and imports the plugins
    gc.collect()
    gc.freeze()
    gc.enable()


def _wait(pid: int, requests: IO[bytes], wakeup: int) -> bool:
    """Wait until the job has ended (True) or the allocation wants it to stop (False)."""
    while True:
        ready, _, _ = select.select([requests.fileno(), wakeup], [], [])
        if wakeup in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wakeup, 4096)
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return True
        elif ready:  # no request comes before the answer, so the input has ended
            return False


def _clean_up(pid: int) -> int:
    """Kill the job and its leftover processes before its process id can be reused."""
    for kill in (os.killpg, os.kill):  # it may not have its own group yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _run_job(request: Mapping[str, Any]) -> int:
    """Run Snakemake with the arguments of one job, in the forked process."""
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        sys.argv = ["snakemake", *request["argv"]]
        from snakemake.cli import main

        main()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
