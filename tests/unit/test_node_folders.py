"""Temporary folders of killed processes are removed by the next process, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from servegrid.node.folders import remove_abandoned, temporary_folder

HOLDS_ONE = """
import sys, time
from servegrid.node.folders import temporary_folder
with temporary_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_is_private_and_goes_with_its_block(temporary: Path) -> None:
    with temporary_folder() as folder:
        assert folder.parent == temporary
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_the_folder_of_a_killed_process_is_removed_by_the_next_one(temporary: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_ONE], stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None
        folder = Path(one.stdout.readline().strip())
        (folder / "file").write_text("x")
        remove_abandoned()
        assert folder.exists()  # its process runs
        one.kill()
    assert folder.exists()
    with temporary_folder():
        assert not folder.exists()


def test_other_folders_stay(temporary: Path) -> None:
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    names = [
        "servegrid-abc",
        f"servegrid-{namespace + 1:x}-{2**22:x}-1-container",  # of another PID namespace
        f"other-{namespace:x}-{2**22:x}-1-x",
    ]
    for name in names:
        (temporary / name).mkdir()
    linked = temporary / f"servegrid-{namespace:x}-{2**22:x}-1-link"
    linked.symlink_to(temporary / names[0])
    remove_abandoned()
    assert {each.name for each in temporary.iterdir()} == {*names, linked.name}


def test_the_folder_of_another_user_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    folder = temporary / f"servegrid-{namespace:x}-{2**22:x}-1-x"
    folder.mkdir()
    with monkeypatch.context() as patch:
        me = os.geteuid()
        patch.setattr(os, "geteuid", lambda: me + 1)
        remove_abandoned()
    assert folder.exists()
    remove_abandoned()
    assert not folder.exists()
