"""Folders that only their owner can read or write.

The main process writes commands and pickled functions to files, and processes on the nodes run
them. Somebody who can write to these folders could run commands as their owner. In a shared folder
with the set-group-ID bit and a umask of 002, the whole group could.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


class NotPrivateError(Exception):
    """Others can write to a folder with commands. The text names the folder and the remedy."""


def create_private(folder: Path) -> None:
    """Create the folder, and its parents, unless it exists.

    The folder gets the mode 0700 in any umask, its parents don't. Raises NotPrivateError if it
    exists and is not private.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        check_private(folder)


def check_private(folder: Path) -> None:
    """Raise NotPrivateError unless it is a folder of this user with no access for others.

    A symbolic link is not private. Raises FileNotFoundError if there is nothing.
    """
    found = folder.lstat()
    remedy = "Delete it, and run the same command again."
    if not stat.S_ISDIR(found.st_mode):
        raise NotPrivateError(f"{folder}: is not a folder. {remedy}")
    if found.st_uid != os.geteuid():
        raise NotPrivateError(
            f"{folder}: belongs to the user with the ID {found.st_uid}, who could run commands "
            "as you. Use another working directory, or another folder for the executor."
        )
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise NotPrivateError(
            f"{folder}: has the mode {mode:04o}, so others may have put commands into it that "
            f"would run as you. {remedy}"
        )
