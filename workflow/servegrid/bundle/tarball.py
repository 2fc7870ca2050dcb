"""The archive: written with the same bytes each time, read as if an enemy had made it.

Only what `write` makes is read: regular files under one folder, by ustar headers with at most a
`path` record of pax before them. Python's tarfile, which would read links, devices, sparse files
and headers of any length as well, only writes here.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from servegrid.errors import BundleError
from servegrid.records import parquet

MEMBERS = 200_000
MEMBER_BYTES = 4 * 2**30
TOTAL_BYTES = 16 * 2**30
RATIO = 100
"""How many bytes may come of one, beyond the first `RATIO_FREE_BYTES`. Records are compressed
before they get here and hardly shrink; text shrinks to a tenth; zeros to a thousandth."""
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


def write(tree: Path, root: str, archive: Path) -> None:
    """Write all files below `tree` to a .tar.gz in which they lie below `root`.

    Names are sorted, owners 0, times 0, modes 644 or 755: the same files give the same bytes,
    with the same zlib. Raises RecordError where the archive cannot be written.
    """
    with (
        parquet.written_whole(archive) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in names_below(tree):
            path = tree / name
            entry = tarfile.TarInfo(f"{root}/{name}")
            entry.size = path.stat().st_size
            entry.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            with path.open("rb") as file:
                tar.addfile(entry, file)


def names_below(tree: Path) -> list[str]:
    """The names of all files below `tree`, with slashes, sorted by their bytes."""
    found = (each.relative_to(tree).as_posix() for each in tree.rglob("*") if each.is_file())
    return sorted(found, key=str.encode)


@dataclass(frozen=True)
class Unpacked:
    """What came of an archive. `damage` tells where it broke off, None where it is whole."""

    root: str
    sha256: dict[str, str]
    """Of each file, by its name below the root."""
    damage: str | None = None


def unpack(archive: Path, folder: Path) -> Unpacked:
    """Unpack `archive` into `folder`, which is empty, all below one root that is left out.

    Nothing is written elsewhere, whatever the archive says. Raises BundleError, naming the member,
    where there is anything that `write` does not make, or more than the limits above. Bytes that
    were damaged later don't raise: what could be read is there, and `damage` tells the rest.
    """
    roots: set[str] = set()
    hashes: dict[str, str] = {}
    member, damage = "the first member", None
    try:
        with archive.open("rb") as raw:
            stream = _Stream(raw)
            for member, entry in _entries(stream, hashes, roots):
                path = folder / member
                path.parent.mkdir(parents=True, exist_ok=True)
                hashes[member] = _extract(stream, entry, path)
    except (_Damaged, zlib.error) as error:
        damage = f"damaged in or after {member} ({error})"
    except OSError as error:
        raise BundleError(f"{archive}: cannot be unpacked ({error.strerror or error}).") from error
    if not roots:
        raise BundleError(f"{archive}: is not a bundle of servegrid ({damage or 'it is empty'}).")
    return Unpacked(roots.pop(), hashes, damage)


class _Damaged(Exception):
    """The bytes are not those that were written."""


@dataclass
class _Stream:
    """The unpacked bytes of a gzip file, which never grow beyond the limits."""

    raw: BinaryIO
    gunzip: zlib._Decompress = field(default_factory=lambda: zlib.decompressobj(31))
    ready: bytes = b""
    packed: int = 0
    unpacked: int = 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises _Damaged where the file ends before."""
        parts = []
        while size > 0:
            part = self.some(size)
            if not part:
                raise _Damaged("it ends too early")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def some(self, most: int) -> bytes:
        """Up to `most` bytes; none at the end."""
        while not self.ready and not self.gunzip.eof:
            data = self.gunzip.unconsumed_tail or self.raw.read(_CHUNK)
            if not data:
                raise _Damaged("it ends too early")
            before = len(data)
            self.ready = self.gunzip.decompress(data, _CHUNK)
            self.packed += before - len(self.gunzip.unconsumed_tail)
            self.unpacked += len(self.ready)
            self._refuse_bomb()
        part, self.ready = self.ready[:most], self.ready[most:]
        return part

    def _refuse_bomb(self) -> None:
        if self.unpacked > TOTAL_BYTES:
            raise BundleError(f"it unpacks to more than {TOTAL_BYTES:,} bytes.")
        if self.unpacked > RATIO_FREE_BYTES + RATIO * self.packed:
            raise BundleError(
                f"its first {self.packed:,} bytes unpack to more than {self.unpacked:,}, as those "
                "of a bomb do."
            )


@dataclass(frozen=True)
class _Entry:
    size: int
    executable: bool


def _entries(
    stream: _Stream, seen: dict[str, str], roots: set[str]
) -> Iterator[tuple[str, _Entry]]:
    """The name below the root and the entry of each file; the caller reads its bytes."""
    folders: set[str] = set()
    path: str | None = None
    while (header := stream.read(_BLOCK)).strip(b"\0"):
        _refuse_wrong_checksum(header)
        kind = header[156:157]
        size = _octal(header[124:136])
        if kind == b"x" and path is None:
            path = _pax_path(stream, size)
            continue
        told = path if path is not None else _ustar_name(header)
        path = None
        if kind not in (b"0", b"\0"):
            shown = _KINDS.get(kind, f"of the type {kind!r}")
            raise BundleError(f"{told!r}: is {shown}; a bundle has regular files only.")
        root, name = _parts(told)
        roots.add(root)
        if len(roots) > 1:
            raise BundleError(f"{told!r}: does not lie below {sorted(roots - {root})[0]!r}.")
        above = {name[:at] for at, letter in enumerate(name) if letter == "/"}
        folders |= above
        if name in seen or name in folders or any(each in seen for each in above):
            raise BundleError(f"{told!r}: comes twice.")
        if len(seen) >= MEMBERS or size > MEMBER_BYTES:
            raise BundleError(
                f"{told!r}: a bundle has at most {MEMBERS:,} files of {MEMBER_BYTES:,} bytes."
            )
        yield name, _Entry(size, bool(int(_octal(header[100:108])) & 0o100))
        if stream.read(-size % _BLOCK).strip(b"\0"):
            raise _Damaged("its last block is not filled with zeros")
    while rest := stream.some(_CHUNK):
        if rest.strip(b"\0"):
            raise BundleError("something follows the archive's end.")
    if stream.gunzip.unused_data or stream.raw.read(1):
        raise BundleError("something follows the archive's end.")


def _extract(stream: _Stream, entry: _Entry, path: Path) -> str:
    digest, left = hashlib.sha256(), entry.size
    with path.open("xb") as file:
        while left:
            part = stream.some(min(left, _CHUNK))
            if not part:
                raise _Damaged("it ends too early")
            digest.update(part)
            file.write(part)
            left -= len(part)
    path.chmod(0o755 if entry.executable else 0o644)
    return digest.hexdigest()


def _refuse_wrong_checksum(header: bytes) -> None:
    told = _octal(header[148:156])
    if told != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise _Damaged("the checksum of the next header is wrong")


def _octal(digits: bytes) -> int:
    text = digits.strip(b" \0")
    if not text or text.strip(b"01234567"):
        raise _Damaged("the next header holds no number where one belongs")
    return int(text, 8)


def _ustar_name(header: bytes) -> str:
    name, prefix = (
        part.partition(b"\0")[0].decode("utf-8", "backslashreplace")
        for part in (header[:100], header[345:500])
    )
    return f"{prefix}/{name}" if prefix else name


def _pax_path(stream: _Stream, size: int) -> str:
    """The path that a pax header gives the next member: for names too long for ustar."""
    if size > _PAX_BYTES:
        raise BundleError(f"a pax header of {size:,} bytes: a bundle has none so long.")
    data = stream.read(size + -size % _BLOCK)[:size]
    length, _, record = data.partition(b" ")
    key, _, value = record.partition(b"=")
    if length != str(size).encode() or key != b"path" or value[-1:] != b"\n":
        raise BundleError("a pax header with something else than a path: a bundle has none.")
    return value[:-1].decode("utf-8", "backslashreplace")


def _parts(told: str) -> tuple[str, str]:
    """The root and the name below it. Raises BundleError where it is no plain relative path."""
    parts = told.split("/")
    if (
        len(parts) < 2
        or any(part in ("", ".", "..") for part in parts)
        or not told.isprintable()
        or "\\" in told
        or len(told.encode()) > _NAME_BYTES
        or any(len(part.encode()) > _PART_BYTES for part in parts)
    ):
        raise BundleError(f"{told!r}: is no plain path below the bundle's own folder.")
    return parts[0], "/".join(parts[1:])
