"""The command `servegrid`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import select
import sys
from collections.abc import Sequence

from servegrid import __version__
from servegrid.cli.bundle import add_unpack, add_verify
from servegrid.cli.capacity import add_capacity
from servegrid.cli.compare import add_compare
from servegrid.cli.doctor import add_doctor
from servegrid.cli.exchange import add_export, add_import
from servegrid.cli.fetch import add_fetch
from servegrid.cli.frontier import add_frontier
from servegrid.cli.init_profile import add_init_profile
from servegrid.cli.load import add_load
from servegrid.cli.plan import add_plan
from servegrid.cli.report import add_report
from servegrid.errors import ServegridError
from servegrid.node.environment import use_safe_path, use_utf8

SUBCOMMANDS = (
    *(add_plan, add_load, add_capacity, add_report, add_compare),
    *(add_verify, add_unpack, add_export, add_import),
    *(add_init_profile, add_doctor, add_fetch, add_frontier),
)
"""In the order of `servegrid --help`. Each adds its parser and sets `run`, which gets the parsed
options and returns the exit status."""


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_UNUSABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP}
)
"""What a path of the user can meet anywhere: even to ask whether a file exists can be forbidden."""
FAILED, INTERRUPTED, NO_READER = 2, 130, 141
"""Exit statuses. The last two are 128 plus the signal, as a shell has them: 1 has a meaning."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status; FAILED if it failed."""
    parser = argparse.ArgumentParser(
        prog="servegrid",
        description="Benchmark language models on the GPUs of a cluster, and plan capacity.",
        epilog="servegrid COMMAND --help explains a command. To measure a whole study, run "
        "snakemake; see README.md.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subcommands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND")
    for add_subcommand in SUBCOMMANDS:
        add_subcommand(subcommands)
    use_safe_path()
    try:
        use_utf8()
        options = parser.parse_args(arguments)
        status: int = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except ServegridError as error:
        return _fail(f"{error}")
    except KeyboardInterrupt:
        _fail("interrupted")
        return INTERRUPTED
    except OSError as error:
        if _is_output_broken() and isinstance(error, BrokenPipeError):  # as after `| head -1`
            return NO_READER
        if error.errno in _FULL:
            where = error.filename or "a file, or the standard output,"
            return _fail(f"{where} cannot be written ({error.strerror}). Free some space.")
        if error.errno not in _UNUSABLE or error.filename is None:
            raise
        return _fail(
            f"{error.filename}: cannot be used ({error.strerror}). Correct the path or the "
            "permissions."
        )
    return status


def _fail(message: str) -> int:
    with contextlib.suppress(OSError):  # standard error can be full, too
        print(f"servegrid: {message}", file=sys.stderr, flush=True)
    return FAILED


def _is_output_broken() -> bool:
    """Whether standard output takes no more. If so, what is left of it goes nowhere."""
    if sys.stdout is None:
        return False
    try:
        number = sys.stdout.fileno()
    except ValueError:  # not that of a process, as in a test
        return False
    try:
        sys.stdout.flush()
        poll = select.poll()
        poll.register(number, 0)
        is_broken = bool(poll.poll(0))  # an error of a pipe: nobody reads it
    except OSError:
        is_broken = True
    if is_broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return is_broken


if __name__ == "__main__":
    sys.exit(main())
