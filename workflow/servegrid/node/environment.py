"""The machine and the software that a trial ran on, as plain data for its record."""

from __future__ import annotations

import contextlib
import io
import locale
import logging
import os
import platform
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from servegrid.errors import ConfigError

JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def use_safe_path() -> None:
    """Let no Python that this process starts import modules from its working directory.

    `python -m` and `python -c` search there first. The working directory of a study can contain
    files of a stranger's bundle, or of another member of a group.
    """
    os.environ["PYTHONSAFEPATH"] = "1"


@contextlib.contextmanager
def set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set `variables` for the block, and restore the environment after it.

    vLLM sets variables while it starts, such as LD_PRELOAD, that no other process should inherit.
    """
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def use_utf8() -> None:
    """Let this process read and write text as UTF-8, whatever its locale says.

    servegrid names the encoding of each file that it opens. This is for the libraries that it
    calls, for Snakemake's log, and for standard output: a file or a pipe gets UTF-8, and a terminal
    gets `?` for what it cannot show.

    The names of files keep the locale's encoding, as in the processes that this one starts. Arrow
    takes them for UTF-8. Raises ConfigError if it would look for the working directory elsewhere.
    """
    if locale.getencoding().lower() not in ("utf-8", "utf8"):
        # Python reads this setting whenever it opens a file.
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if stream.isatty():
            stream.reconfigure(errors="replace")
        else:
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    for handler in logging.getLogger("snakemake.logging").handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream:
            handler.stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        folder = Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"the working directory cannot be used ({error.strerror}). Change to a folder that "
            "exists."
        ) from error
    check_folder_name(folder, sys.getfilesystemencoding())


def check_folder_name(folder: Path, encoding: str) -> None:
    """Raise ConfigError if not all programs find `folder` where names of files are `encoding`."""
    if not str(folder).isascii() and encoding != "utf-8":
        name = os.fsencode(folder).decode(errors="replace")
        raise ConfigError(
            f"{name}: this path has characters other than ASCII, but the locale's encoding is "
            f"{encoding}, so not all programs find it. Set PYTHONUTF8=1, and run the same command "
            "again."
        )


def describe_node() -> dict[str, Any]:
    """The node, its processor and memory, the Slurm job, Python and all installed packages."""
    return {
        "node": socket.gethostname(),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "job": {name: os.environ[name] for name in JOB_VARIABLES if name in os.environ},
        "python": platform.python_version(),
        "packages": {
            package.name: package.version
            for package in sorted(metadata.distributions(), key=lambda package: package.name)
        },
    }


def _cpu_model() -> str | None:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None


def find_vllm(site: Mapping[str, Any]) -> str | None:
    """The version of vLLM in the environment of a kind; None if it cannot be read here.

    The metadata of its package is read; nothing is imported.
    """
    if "container" in site:
        return None
    python = Path(site.get("python") or sys.executable)
    found = sorted(python.parent.parent.glob("lib/python3*/site-packages/vllm*.dist-info"))
    named = [re.fullmatch(r"vllm(?:_\w+)?-(.+)\.dist-info", path.name) for path in found]
    return next((match[1] for match in named if match), None)


def hardware_threads(core: int) -> frozenset[int]:
    """The hardware threads on the same physical core as `core`; only `core` if unknown."""
    found = {core}
    with contextlib.suppress(OSError, ValueError):
        for part in Path(_TOPOLOGY.format(core)).read_text(encoding="utf-8").strip().split(","):
            first, _, last = part.partition("-")
            found |= {*range(int(first), int(last or first) + 1)}
    return frozenset(found)
