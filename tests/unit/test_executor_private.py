"""Folders with commands and pickled functions can be written by their owner only."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from snakemake_interface_common.exceptions import WorkflowError

from snakemake_executor_plugin_submitit.allocation import Allocation
from snakemake_executor_plugin_submitit.manager import AllocationManager
from snakemake_executor_plugin_submitit.private import (
    NotPrivateError,
    check_private,
    create_private,
)
from snakemake_executor_plugin_submitit.registry import Registry
from snakemake_executor_plugin_submitit.spool import Spool

ANOTHER_USER = 12345


@pytest.fixture
def group_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder as groups share it: set-group-ID bit, and a umask that lets the group write."""
    folder = tmp_path / "group"
    folder.mkdir()
    folder.chmod(0o2775)
    before = os.umask(0o002)
    yield folder
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode) & 0o777


def test_the_group_can_enter_no_folder_of_the_executor(group_folder: Path) -> None:
    base = group_folder / ".snakemake" / "submitit"
    manager(base)
    spool = Spool.create(base / "a" / "1")
    assert mode(base) == mode(spool.root) == 0o700
    assert mode(base.parent) == 0o775  # Snakemake's own folder stays as Snakemake makes it


def test_a_private_folder_can_be_used_again(group_folder: Path) -> None:
    create_private(group_folder / "x")
    create_private(group_folder / "x")


def give_away(path: Path) -> None:
    os.chown(path, ANOTHER_USER, -1)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def replace_by_file(path: Path) -> None:
    path.rmdir()
    path.write_text("", encoding="utf-8")


TAMPERED = {
    "another owner": (give_away, "belongs to the user with the ID 12345"),
    "readable by the group": (lambda path: path.chmod(0o740), "has the mode 0740"),
    "writable by the group": (lambda path: path.chmod(0o720), "has the mode 0720"),
    "open to all": (lambda path: path.chmod(0o1777), "has the mode 1777"),
    "a link": (replace_by_link, "is not a folder"),
    "a file": (replace_by_file, "is not a folder"),
}


@pytest.fixture(params=TAMPERED)
def tampering(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[Path], object], str]:
    tamper, message = TAMPERED[request.param]
    if tamper is give_away and os.geteuid() != 0:
        # Only root can give a folder away. Without root, this process takes another user's role.
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: ANOTHER_USER)
        return (lambda path: None), message.replace(str(ANOTHER_USER), str(me))
    return tamper, message


def test_a_folder_that_is_not_private_is_refused(
    tmp_path: Path, tampering: tuple[Callable[[Path], object], str]
) -> None:
    tamper, message = tampering
    folder = tmp_path / "folder"
    create_private(folder)
    tamper(folder)
    for attempt in (check_private, create_private):
        with pytest.raises(NotPrivateError, match=message):
            attempt(folder)


def test_a_run_that_finds_such_a_folder_ends_before_it_submits(
    tmp_path: Path, tampering: tuple[Callable[[Path], object], str]
) -> None:
    tamper, message = tampering
    create_private(tmp_path / "base")
    tamper(tmp_path / "base")
    with pytest.raises(WorkflowError, match=f"submitit-folder: .*{message}"):
        manager(tmp_path / "base")


def test_an_allocation_runs_no_command_from_such_a_folder(
    tmp_path: Path, tampering: tuple[Callable[[Path], object], str]
) -> None:
    tamper, message = tampering
    folder = tmp_path / "spool"
    folder.mkdir(mode=0o700)
    tamper(folder)
    allocation = Allocation("a", str(folder), None, {}, {}, 1.0, 60.0, 1.0)
    with pytest.raises(NotPrivateError, match=message):
        allocation()


def test_an_allocation_in_such_a_folder_is_not_adopted(tmp_path: Path) -> None:
    base = tmp_path / "base"
    create_private(base)
    spool = Spool.create(base / "a" / "1")
    Registry(base / "live").add(spool)
    spool.root.chmod(0o770)
    with pytest.raises(WorkflowError, match="has the mode 0770"):
        manager(base)


def manager(folder: Path) -> AllocationManager[str]:
    return AllocationManager(folder, "local", None, 1.0, lambda *_: None)
