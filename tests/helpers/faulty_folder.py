"""A folder on a file system that can be full, read-only, slow, or show new files late.

FUSE passes every operation on to another folder. A file in the control folder switches a fault on:
`full`, `read-only`, `slow` or `late`. With `late`, what one host creates or renames is seen
by other hosts a few seconds later, as NFS and BeeGFS can have it. A process's host is the node of
the private Slurm on which it runs. This module, run as a program, serves the file system.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
"""Instead of a time: see utimensat(2)."""
LATE_S = 3.0
SLOW_S = 0.02
FAULTS = ("full", "read-only", "slow", "late")


@dataclass(frozen=True)
class FaultyFolder:
    path: Path
    control: Path

    @contextlib.contextmanager
    def fault(self, name: str) -> Iterator[None]:
        """The fault is there during the block."""
        assert name in FAULTS, name
        (self.control / name).touch()
        try:
            yield
        finally:
            (self.control / name).unlink()


@contextlib.contextmanager
def faulty_folder(folder: Path) -> Iterator[FaultyFolder]:
    """Mount a faulty folder at `folder / "mount"`. Needs root and libfuse3."""
    backing, mount, control = (folder / name for name in ("backing", "mount", "control"))
    for each in (backing, mount, control):
        each.mkdir(parents=True)
    with (folder / "fuse.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, __file__, str(backing), str(mount), str(control)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 20
        while not mount.is_mount():
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no FUSE here: {(folder / 'fuse.log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield FaultyFolder(mount, control)
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], capture_output=True)
        server.terminate()
        server.wait(30)


@dataclass(frozen=True)
class Change:
    """A name that one host has just created or replaced."""

    seconds: float
    host: str
    before: str | None
    """Where its last content still is, for the other hosts."""


def host_of(thread: int) -> str:
    """The node of the private Slurm on which a process runs; empty for the login node."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{thread}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"SLURMD_NODENAME="):
                return entry.partition(b"=")[2].decode()
    return ""


def serve(backing: Path, mount: Path, control: Path) -> None:
    import mfusepy  # fails without libfuse

    class Operations(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def __init__(self) -> None:
            self.faults: frozenset[str] = frozenset()
            self.read_at = 0.0
            self.changes: dict[str, Change] = {}
            self.old = control / "old"
            self.old.mkdir()
            self.count = 0
            self.guard = threading.Lock()  # `lock` would be the operation of that name

        # faults

        def begin(self, writes: bool = False, grows: bool = False) -> None:
            if time.monotonic() > self.read_at + 0.02:
                self.faults = frozenset(os.listdir(control))
                self.read_at = time.monotonic()
            if writes and "read-only" in self.faults:
                raise mfusepy.FuseOSError(errno.EROFS)
            if grows and "full" in self.faults:
                raise mfusepy.FuseOSError(errno.ENOSPC)
            if "slow" in self.faults:
                time.sleep(SLOW_S)

        def note(self, path: str) -> None:
            """This host creates or replaces `path` now."""
            if "late" not in self.faults:
                return
            before = None
            with self.guard, contextlib.suppress(OSError):
                self.count += 1
                shadow = str(self.old / str(self.count))
                os.link(real(path), shadow)
                before = shadow
            host = host_of(mfusepy.fuse_get_context()[2])
            self.changes[path] = Change(time.monotonic(), host, before)

        def seen(self, path: str) -> str:
            """The file that the caller's host has under this name."""
            for name in [path, *map(str, Path(path).parents)] if self.changes else []:
                change = self.changes.get(name)
                if change is None:
                    continue
                if time.monotonic() > change.seconds + LATE_S:
                    self.changes.pop(name, None)
                elif host_of(mfusepy.fuse_get_context()[2]) != change.host:
                    if name != path or change.before is None:
                        raise mfusepy.FuseOSError(errno.ENOENT)
                    return change.before
            return real(path)

        # names

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            self.begin()
            found = os.fstat(fh) if fh is not None else os.lstat(self.seen(path))
            names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
            times = {f"st_{x}time": getattr(found, f"st_{x}time_ns") for x in "amc"}
            return {name: getattr(found, name) for name in names} | times

        def readdir(self, path: str, fh: int) -> list[str]:
            self.begin()
            names = []
            for name in os.listdir(self.seen(path)):
                with contextlib.suppress(OSError):
                    self.seen(os.path.join(path, name))
                    names.append(name)
            return [".", "..", *names]

        def readlink(self, path: str) -> str:
            self.begin()
            return os.readlink(self.seen(path))

        def statfs(self, path: str) -> dict[str, int]:
            found = os.statvfs(backing)
            names = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize", "f_namemax")
            return {name: getattr(found, name) for name in names}

        def mkdir(self, path: str, mode: int) -> int:
            self.begin(writes=True, grows=True)
            self.note(path)
            os.mkdir(real(path), mode)
            return self.own(path)

        def mknod(self, path: str, mode: int, dev: int) -> int:
            self.begin(writes=True, grows=True)
            self.note(path)
            os.mknod(real(path), mode, dev)
            return self.own(path)

        def symlink(self, target: str, source: str) -> int:
            self.begin(writes=True, grows=True)
            self.note(target)
            os.symlink(source, real(target))
            return self.own(target)

        def link(self, target: str, source: str) -> int:
            self.begin(writes=True, grows=True)
            self.note(target)
            os.link(self.seen(source), real(target))
            return 0

        def rename(self, old: str, new: str) -> int:
            self.begin(writes=True)
            self.note(new)
            os.rename(real(old), real(new))
            self.changes.pop(old, None)
            return 0

        def unlink(self, path: str) -> int:
            self.begin(writes=True)
            os.unlink(real(path))
            self.changes.pop(path, None)
            return 0

        def rmdir(self, path: str) -> int:
            self.begin(writes=True)
            os.rmdir(real(path))
            self.changes.pop(path, None)
            return 0

        def chmod(self, path: str, mode: int) -> int:
            self.begin(writes=True)
            os.chmod(real(path), mode)
            return 0

        def chown(self, path: str, uid: int, gid: int) -> int:
            self.begin(writes=True)
            os.lchown(real(path), uid, gid)
            return 0

        def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
            self.begin(writes=True)
            known = os.lstat(real(path))
            before = known.st_atime_ns, known.st_mtime_ns
            special = {UTIME_NOW: time.time_ns()}
            new = [
                old if each == UTIME_OMIT else special.get(each, each)
                for each, old in zip(times or (UTIME_NOW, UTIME_NOW), before, strict=True)
            ]
            os.utime(real(path), ns=(new[0], new[1]), follow_symlinks=False)
            return 0

        def own(self, path: str) -> int:
            uid, gid, _ = mfusepy.fuse_get_context()
            os.lchown(real(path), uid, gid)
            return 0

        # contents

        def open(self, path: str, flags: int) -> int:
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR))
            self.begin(writes=writes)
            # The kernel chooses the offset of a file that is appended to.
            return os.open(real(path) if writes else self.seen(path), flags & ~os.O_APPEND)

        def create(self, path: str, mode: int, fi: object = None) -> int:
            self.begin(writes=True, grows=True)
            self.note(path)
            opened = os.open(real(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)
            self.own(path)
            return opened

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            self.begin()
            return os.pread(fh, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            self.begin(writes=True, grows=True)
            return os.pwrite(fh, data, offset)

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            self.begin(writes=True)
            os.truncate(real(path) if fh is None else fh, length)
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            self.begin()
            return 0

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

    def real(path: str) -> str:
        return f"{backing}{path}"

    options = {"attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0}
    mfusepy.FUSE(
        *(Operations(), str(mount)),
        **options,
        foreground=True,
        allow_other=True,
        default_permissions=True,
        raw_fi=False,
    )


if __name__ == "__main__":
    serve(*map(Path, sys.argv[1:]))
