"""The folder of a study: writable, roomy, and the same on all nodes as far as one can tell."""

from __future__ import annotations

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
LEAST_GB, FEW_GB = 1, 10
WRITTEN = ("results", ".snakemake")
GROUP = Group("files")


@dataclass(frozen=True)
class Mount:
    point: Path
    type: str


def mounts_of(text: str) -> list[Mount]:
    """The lines of /proc/mounts, in their order."""
    lines = (line.split() for line in text.splitlines())
    return [Mount(Path(_unescaped(words[1])), words[2]) for words in lines if len(words) > 2]


def mount_of(path: Path, mounts: Sequence[Mount]) -> Mount | None:
    """Where an absolute path lies; of mounts on the same folder the last one counts."""
    found = [mount for mount in mounts if path.is_relative_to(mount.point)]
    return max(reversed(found), key=lambda mount: len(mount.point.parts), default=None)


def judge_sharing(
    group: Group, subject: str, path: Path, mounts: Sequence[Mount], what: str
) -> Finding:
    """Whether all nodes see `path`, judged by its file system; `what` is what must lie there."""
    mount = mount_of(path, mounts)
    remedy = f"Keep {what} on a file system that all nodes share, such as your home or project."
    if mount is None:
        return group.warn(subject, f"{path}: file system unknown", remedy)
    text = f"{path}: {mount.type} on {mount.point}"
    if mount.type in SHARED:
        return group.ok(subject, f"{text}, shared by its nature")
    if mount.type in IN_MEMORY:
        return group.warn(subject, f"{text}, in this machine's memory", remedy)
    if any(path.is_relative_to(folder) for folder in LOCAL_FOLDERS):
        return group.warn(subject, f"{text}, a folder that each node has for itself", remedy)
    return group.warn(
        subject,
        f"{text}; cannot tell whether the nodes see it",
        f"Look from a node: srun ls {path}. If it is not there: {remedy[0].lower()}{remedy[1:]}",
    )


def judge_space(path: Path, free_bytes: float) -> Finding:
    """Free space where records and logs will be written."""
    free = f"{free_bytes / GB:.1f} GB free in {path}"
    if free_bytes < LEAST_GB * GB:
        return GROUP.fail("space", free, f"Free some: a study needs {LEAST_GB} GB at the least.")
    if free_bytes < FEW_GB * GB:
        return GROUP.warn(
            "space", free, f"Free some, for many cells write much: {FEW_GB} GB are comfortable."
        )
    return GROUP.ok("space", free)


def examine_files(directory: Path, shared: bool) -> Iterator[Finding]:
    """The folder that the study is run in; `shared` where other machines must see it."""
    folder = directory.absolute()
    if not folder.is_dir():
        yield GROUP.fail("folder", f"{folder}: no such folder", "Make it, or correct --directory.")
        return
    for name in WRITTEN:
        if complaint := unwritable(folder / name):
            yield GROUP.fail(
                f"{name}/",
                f"{folder / name}: cannot be written ({complaint})",
                "Correct its permissions, or choose another folder by --directory.",
            )
        else:
            yield GROUP.ok(f"{name}/", "writable")
    if shared:
        yield judge_sharing(GROUP, "file system", folder.resolve(), mounts(), "the study")
    else:
        yield GROUP.skip("file system", "one machine needs no shared one")
    yield judge_space(folder, shutil.disk_usage(folder).free)


def mounts() -> list[Mount]:
    """The mounts of this machine; none where it does not tell."""
    try:
        return mounts_of(MOUNTS.read_text())
    except OSError:
        return []


def unwritable(path: Path) -> str:
    """Why nothing can be written in `path`, or in what exists above it; empty where it can."""
    try:
        while not path.exists():
            path = path.parent
        with tempfile.TemporaryFile(dir=path):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
