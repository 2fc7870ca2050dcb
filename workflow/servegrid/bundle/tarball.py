"""The archive format: written reproducibly, read as if an attacker had made it.

The reader accepts only what `write_archive` writes: regular files under one folder, with ustar
headers and at most a pax record `path` before each. Their names are those that `layout` allows, and
no unpacked file is executable. Python's tarfile would also read links, devices, sparse files and
headers of any length, so it is used for writing only.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from servegrid.bundle.layout import is_allowed
from servegrid.errors import BundleError
from servegrid.records import parquet

MEMBERS = 400_000
MEMBER_BYTES = 4 * 2**30
TOTAL_BYTES = 16 * 2**30
RATIO = 100
"""Allowed unpacked bytes per packed byte, beyond the first `RATIO_FREE_BYTES`. Records are Parquet
and hardly shrink; text shrinks to a tenth, zeros to a thousandth."""
RATIO_FREE_BYTES = 16 * 2**20
_BLOCK = 512
_CHUNK = 2**16
_PAX_BYTES = 2**14
_NAME_BYTES = 1024
_PART_BYTES = 255
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder entry",
    b"6": "a pipe",
}


def write_archive(tree: Path, root: str, archive: Path) -> None:
    """Write all files below `tree` to a .tar.gz, where they are below `root`.

    Names are sorted, owners and times are 0, modes are 644: the same files give the same bytes if
    zlib is the same. Raises RecordError if the archive cannot be written.
    """
    with (
        parquet.atomic_write(archive) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in list_files(tree):
            path = tree / name
            entry = tarfile.TarInfo(f"{root}/{name}")
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)


def list_files(tree: Path) -> list[str]:
    """The names of all files below `tree`, with slashes, sorted by their bytes."""
    found = (path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())
    return sorted(found, key=str.encode)


def check_limits(files: Sequence[Path]) -> None:
    """Raise BundleError if an archive of `files` would exceed what the reader accepts."""
    total = sum(file.stat().st_size for file in files)
    if len(files) > MEMBERS or total > TOTAL_BYTES:
        raise BundleError(
            f"The results have {len(files):,} files with {total:,} bytes. A bundle has at most "
            f"{MEMBERS:,} files with {TOTAL_BYTES:,} bytes. Split the study: move some of its "
            "deployments to a study of their own, and bundle each."
        )


@dataclass(frozen=True)
class UnpackedArchive:
    """The result of unpacking. `damage` says where the archive is damaged, None if nowhere."""

    root: str
    sha256: dict[str, str]
    """The hash of each file, by its name below the root."""
    damage: str | None = None


def check_is_file(archive: Path) -> None:
    """Raise BundleError if `archive` is no file that can be opened."""
    if archive.is_dir():
        raise BundleError(f"{archive}: is a folder. Name the bundle, a .tar.gz file.")
    if not archive.is_file():
        raise BundleError(f"{archive}: does not exist. Correct the path.")


def unpack_archive(archive: Path, folder: Path) -> UnpackedArchive:
    """Unpack `archive` into the empty folder `folder`, without the archive's own root folder.

    Writes nowhere else. Raises BundleError, with the member's name, if the archive contains
    something that `write_archive` does not write, or exceeds a limit above. Damaged bytes do not
    raise: what could be read is in the folder, and `damage` describes the damage.
    """
    roots: set[str] = set()
    hashes: dict[str, str] = {}
    member, damage = "the first member", None
    try:
        with archive.open("rb") as raw:
            stream = _Stream(raw)
            for member, size in _read_entries(stream, hashes, roots):
                path = folder / member
                path.parent.mkdir(parents=True, exist_ok=True)
                hashes[member] = _extract(stream, size, path)
    except (_DamageError, zlib.error) as error:
        damage = f"damaged in or after {member} ({error})"
    except OSError as error:
        raise BundleError(f"{archive}: cannot be unpacked ({error.strerror or error}).") from error
    except BundleError as error:
        raise BundleError(f"{archive}: {error}") from None
    if not roots:
        raise BundleError(f"{archive}: is not a servegrid bundle ({damage or 'it is empty'}).")
    return UnpackedArchive(roots.pop(), hashes, damage)


class _DamageError(Exception):
    """The bytes differ from those that were written."""


@dataclass
class _Stream:
    """Unpacks a gzip file step by step, within the limits."""

    raw: BinaryIO
    gunzip: zlib._Decompress = field(default_factory=lambda: zlib.decompressobj(31))
    ready: bytes = b""
    packed: int = 0
    unpacked: int = 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises _DamageError if the file ends before."""
        parts = []
        while size > 0:
            part = self.read_some(size)
            if not part:
                raise _DamageError("the file ends too early")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def read_some(self, max_bytes: int) -> bytes:
        """Up to `max_bytes` bytes; none at the end."""
        while not self.ready and not self.gunzip.eof:
            data = self.gunzip.unconsumed_tail or self.raw.read(_CHUNK)
            if not data:
                raise _DamageError("the file ends too early")
            before = len(data)
            self.ready = self.gunzip.decompress(data, _CHUNK)
            self.packed += before - len(self.gunzip.unconsumed_tail)
            self.unpacked += len(self.ready)
            self._check_ratio()
        part, self.ready = self.ready[:max_bytes], self.ready[max_bytes:]
        return part

    def _check_ratio(self) -> None:
        if self.unpacked > TOTAL_BYTES:
            raise BundleError(f"the archive unpacks to more than {TOTAL_BYTES:,} bytes.")
        if self.unpacked > RATIO_FREE_BYTES + RATIO * self.packed:
            raise BundleError(
                f"the archive's first {self.packed:,} bytes unpack to more than "
                f"{self.unpacked:,} bytes, like a zip bomb."
            )


def _read_entries(
    stream: _Stream, seen: dict[str, str], roots: set[str]
) -> Iterator[tuple[str, int]]:
    """The name below the root and the size of each file; the caller reads its bytes."""
    folders: set[str] = set()
    pax_path: str | None = None
    while (header := stream.read(_BLOCK)).strip(b"\0"):
        _check_header(header)
        kind = header[156:157]
        size = _parse_octal(header[124:136])
        if kind == b"x" and pax_path is None:
            pax_path = _read_pax_path(stream, size)
            continue
        path = pax_path if pax_path is not None else _ustar_path(header)
        pax_path = None
        if kind not in (b"0", b"\0"):
            described = _KINDS.get(kind, f"of the type {kind!r}")
            raise BundleError(f"{path!r}: is {described}; a bundle contains only regular files.")
        root, name = _split_root(path)
        roots.add(root)
        if len(roots) > 1:
            raise BundleError(f"{path!r}: is not below {sorted(roots - {root})[0]!r}.")
        parents = {name[:at] for at, letter in enumerate(name) if letter == "/"}
        folders |= parents
        if name in seen or name in folders or any(parent in seen for parent in parents):
            raise BundleError(f"{path!r}: occurs twice.")
        if len(seen) >= MEMBERS or size > MEMBER_BYTES:
            raise BundleError(
                f"{path!r}: a bundle has at most {MEMBERS:,} files of {MEMBER_BYTES:,} bytes."
            )
        yield name, size
        if stream.read(-size % _BLOCK).strip(b"\0"):
            raise _DamageError("its last block is not padded with zeros")
    while rest := stream.read_some(_CHUNK):
        if rest.strip(b"\0"):
            raise BundleError("the archive contains more data after its end.")
    if stream.gunzip.unused_data or stream.raw.read(1):
        raise BundleError("the archive contains more data after its end.")


def _extract(stream: _Stream, size: int, path: Path) -> str:
    digest, left = hashlib.sha256(), size
    with path.open("xb") as file:
        while left:
            part = stream.read_some(min(left, _CHUNK))
            if not part:
                raise _DamageError("the file ends too early")
            digest.update(part)
            file.write(part)
            left -= len(part)
    path.chmod(0o644)
    return digest.hexdigest()


def _check_header(header: bytes) -> None:
    checksum = _parse_octal(header[148:156])
    if checksum != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise _DamageError("the next header has a wrong checksum")


def _parse_octal(digits: bytes) -> int:
    text = digits.strip(b" \0")
    if not text or text.strip(b"01234567"):
        raise _DamageError("a numeric field of the next header is not a number")
    return int(text, 8)


def _ustar_path(header: bytes) -> str:
    name, prefix = (
        part.partition(b"\0")[0].decode("utf-8", "backslashreplace")
        for part in (header[:100], header[345:500])
    )
    return f"{prefix}/{name}" if prefix else name


def _read_pax_path(stream: _Stream, size: int) -> str:
    """The path that a pax header gives to the next member. It is for names too long for ustar."""
    if size > _PAX_BYTES:
        raise BundleError(f"the archive has a pax header of {size:,} bytes; a bundle has none.")
    data = stream.read(size + -size % _BLOCK)[:size]
    length, _, record = data.partition(b" ")
    key, _, value = record.partition(b"=")
    if length != str(size).encode() or key != b"path" or value[-1:] != b"\n":
        raise BundleError("the archive has a pax header that is not a path; a bundle has none.")
    return value[:-1].decode("utf-8", "backslashreplace")


def _split_root(path: str) -> tuple[str, str]:
    """The root and the name below it. Raises BundleError unless a bundle may contain the path."""
    parts = path.split("/")
    if (
        len(parts) < 2
        or any(part in ("", ".", "..") for part in parts)
        or not path.isprintable()
        or "\\" in path
        or len(path.encode()) > _NAME_BYTES
        or any(len(part.encode()) > _PART_BYTES for part in parts)
    ):
        raise BundleError(f"{path!r}: is not a plain path below the bundle's folder.")
    root, name = parts[0], "/".join(parts[1:])
    # A root such as `.git` or `--help` would become a folder where the user unpacks it.
    if root[0] in ".-" or not is_allowed(name):
        raise BundleError(f"{path!r}: is not a file of a bundle, so nothing was unpacked.")
    return root, name
