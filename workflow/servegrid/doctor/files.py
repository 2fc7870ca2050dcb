"""Checks the folder of a study: writable, with enough space, and shared by all nodes."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from servegrid.doctor.report import Finding, Group

MOUNTS = Path("/proc/mounts")
SHARED = frozenset(
    {
        *("afs", "beegfs", "beegfs_nodev", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs"),
        *("fuse.juicefs", "fuse.sshfs", "fuse.wekafs", "glusterfs", "gpfs", "lustre", "nfs"),
        *("nfs4", "orangefs", "panfs", "pvfs2", "quobyte", "smb3", "wekafs"),
    }
)
IN_MEMORY = frozenset({"devtmpfs", "ramfs", "tmpfs"})
LOCAL_FOLDERS = tuple(map(Path, ("/tmp", "/var/tmp", "/dev/shm", "/run")))
GB = 1e9
REQUIRED_GB, RECOMMENDED_GB = 1, 10
WRITTEN = ("results", ".snakemake")
GROUP = Group("files")


@dataclass(frozen=True)
class Mount:
    """A mounted file system."""

    point: Path
    type: str


def parse_mounts(text: str) -> list[Mount]:
    """The lines of /proc/mounts, in their order."""
    lines = (line.split() for line in text.splitlines())
    return [Mount(Path(_unescape(words[1])), words[2]) for words in lines if len(words) > 2]


def find_mount(path: Path, mounts: Sequence[Mount]) -> Mount | None:
    """The mount that contains an absolute path. If two have the same point, the last one."""
    found = [mount for mount in mounts if path.is_relative_to(mount.point)]
    return max(reversed(found), key=lambda mount: len(mount.point.parts), default=None)


def check_shared(
    group: Group, subject: str, path: Path, mounts: Sequence[Mount], content: str
) -> Finding:
    """Check by the type of its file system that all nodes see `path`, which holds `content`."""
    mount = find_mount(path, mounts)
    remedy = f"Keep {content} on a file system that all nodes share, such as your home or project."
    if mount is None:
        return group.warn(subject, f"{path}: unknown file system", remedy)
    location = f"{path}: {mount.type} on {mount.point}"
    if mount.type in SHARED:
        return group.ok(subject, f"{location}, a shared file system")
    if mount.type in IN_MEMORY:
        return group.warn(subject, f"{location}, a file system in local memory", remedy)
    if any(path.is_relative_to(folder) for folder in LOCAL_FOLDERS):
        return group.warn(subject, f"{location}, a local file system of each node", remedy)
    return group.warn(
        subject,
        f"{location}; the nodes may not see it",
        f"Check it on a node: srun ls {path}. If it is missing: {remedy[0].lower()}{remedy[1:]}",
    )


def check_space(path: Path, free_bytes: float) -> Finding:
    """Check the free space for records and logs."""
    free = f"{free_bytes / GB:.1f} GB free in {path}"
    if free_bytes < REQUIRED_GB * GB:
        return GROUP.fail("space", free, f"Free some space: a study needs {REQUIRED_GB} GB.")
    if free_bytes < RECOMMENDED_GB * GB:
        return GROUP.warn(
            "space",
            free,
            f"Free some space: {RECOMMENDED_GB} GB are recommended for studies with many cells.",
        )
    return GROUP.ok("space", free)


def check_files(directory: Path, shared: bool) -> Iterator[Finding]:
    """Check the folder of the study. Set `shared` if other machines must see it."""
    folder = directory.absolute()
    if not folder.is_dir():
        yield GROUP.fail(
            "folder", f"{folder}: no such folder", "Create it, or correct --directory."
        )
        return
    for name in WRITTEN:
        if error := find_write_error(folder / name):
            yield GROUP.fail(
                f"{name}/",
                f"{folder / name}: not writable ({error})",
                "Correct its permissions, or use another folder with --directory.",
            )
        else:
            yield GROUP.ok(f"{name}/", "writable")
    if shared:
        yield check_shared(GROUP, "file system", folder.resolve(), read_mounts(), "the study")
    else:
        yield GROUP.skip("file system", "a single machine needs no shared file system")
    yield check_space(folder, shutil.disk_usage(folder).free)


def read_mounts() -> list[Mount]:
    """The mounts of this machine; empty if they cannot be read."""
    try:
        return parse_mounts(os.fsdecode(MOUNTS.read_bytes()))
    except OSError:
        return []


def find_write_error(path: Path) -> str:
    """Why `path`, or its first existing parent, is not writable; empty if it is writable."""
    try:
        while not path.exists():
            path = path.parent
        with tempfile.TemporaryFile(dir=path):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
