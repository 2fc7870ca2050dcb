"""Archives have the same bytes each time, and nothing harmful is unpacked."""

import gzip
import hashlib
import os
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest

from helpers.bundling import write_tar
from servegrid.bundle import tarball
from servegrid.errors import BundleError


def unpack(archive: Path, folder: Path) -> tarball.UnpackedArchive:
    target = folder / "inside" / "target"
    target.mkdir(parents=True)
    return tarball.unpack_archive(archive, target)


def refusal(archive: Path, folder: Path) -> str:
    """The error message. Nothing may be written outside the target folder."""
    with pytest.raises(BundleError) as caught:
        unpack(archive, folder)
    assert [each.name for each in (folder / "inside").iterdir()] == ["target"]
    # Of two bundles that are compared, the message says which one it is.
    assert str(caught.value).startswith(f"{archive}: ")
    return str(caught.value).removeprefix(f"{archive}: ")


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    names = ["b.txt", "a/z.txt", "a/é.txt", "a.txt"]
    for tree, order in (("one", names), ("two", names[::-1])):
        for name in order:
            path = tmp_path / tree / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
            path.chmod(0o600 if tree == "one" else 0o664)
            os.utime(path, (len(tree) + len(name), order.index(name)))
        tarball.write_archive(tmp_path / tree, "root", tmp_path / f"{tree}.tar.gz")
        time.sleep(1.1)  # gzip's timestamp has seconds
    one, two = ((tmp_path / f"{tree}.tar.gz").read_bytes() for tree in ("one", "two"))
    assert one == two
    with tarfile.open(tmp_path / "one.tar.gz") as tar:
        members = tar.getmembers()
    assert [each.name for each in members] == [
        f"root/source/{name}" for name in ("a.txt", "a/z.txt", "a/é.txt", "b.txt")
    ]
    assert {(m.uid, m.gid, m.uname, m.mtime, m.mode) for m in members} == {(0, 0, "", 0, 0o644)}


def test_names_of_any_length_can_be_written_and_read(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    files = {
        "source/x.sh": b"",
        f"source/{'d' * 200}/{'é' * 100}": b"1" * 70_000,
        "source/block": b"2" * 512,
    }
    for name, data in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    (tree / "source/x.sh").chmod(0o755)
    tarball.write_archive(tree, "root", tmp_path / "b.tar.gz")
    unpacked = unpack(tmp_path / "b.tar.gz", tmp_path)
    assert unpacked == tarball.UnpackedArchive(
        "root", {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    )
    target = tmp_path / "inside" / "target"
    assert {name: (target / name).read_bytes() for name in files} == files
    assert {(target / name).stat().st_mode & 0o777 for name in files} == {0o644}


def special(
    kind: bytes, name: str = "root/source/bad", target: str = "/etc/passwd"
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD = ("root/source/good", b"good")
HOSTILE = {
    "symbolic link": ([GOOD, special(tarfile.SYMTYPE)], "'root/source/bad': is a symbolic link"),
    "hard link": ([GOOD, special(tarfile.LNKTYPE)], "'root/source/bad': is a hard link"),
    "device": ([GOOD, special(tarfile.CHRTYPE)], "'root/source/bad': is a device"),
    "block device": ([special(tarfile.BLKTYPE)], "'root/source/bad': is a device"),
    "pipe": ([special(tarfile.FIFOTYPE)], "'root/source/bad': is a pipe"),
    "folder": ([special(tarfile.DIRTYPE)], "'root/source/bad/': is a folder entry"),
    "sparse": ([special(tarfile.GNUTYPE_SPARSE)], "'root/source/bad': is of the type b'S'"),
    "upwards": (
        [GOOD, ("root/source/../../up", b"")],
        "'root/source/../../up': is not a plain path",
    ),
    "upwards at once": ([("../up", b"")], "'../up': is not a plain path"),
    "absolute": ([GOOD, ("/tmp/absolute", b"")], "'/tmp/absolute': is not a plain path"),
    "dot": ([("root/source/./x", b"")], "'root/source/./x': is not a plain path"),
    "double slash": ([("root/source//x", b"")], "'root/source//x': is not a plain path"),
    "backslash": ([("root/source/a\\b", b"")], "is not a plain path"),
    "line feed": ([("root/source/a\nb", b"")], r"'root/source/a\nb': is not a plain path"),
    "outside the root": ([("good", b"")], "'good': is not a plain path"),
    "two roots": ([GOOD, ("other/README.md", b"")], "'other/README.md': is not below 'root'"),
    "twice": ([GOOD, ("root/source/good", b"bad")], "'root/source/good': occurs twice"),
    "file as folder": ([GOOD, ("root/source/good/x", b"")], "'root/source/good/x': occurs twice"),
    "folder as file": (
        [("root/source/a/x", b""), ("root/source/a", b"")],
        "'root/source/a': occurs twice",
    ),
    "root with a dot": ([(".git/source/x", b"")], "'.git/source/x': is not a file of a bundle"),
    "root like an option": ([("-C/source/x", b"")], "'-C/source/x': is not a file of a bundle"),
    "long part": ([("root/source/" + "a" * 256, b"")], "is not a plain path"),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_members_are_refused_by_name(tmp_path: Path, hostile: str) -> None:
    members, message = HOSTILE[hostile]
    assert message in refusal(write_tar(tmp_path / "b.tar.gz", *members), tmp_path)


NOT_OF_THE_LAYOUT = [
    # Python imports from the working directory.
    *("psutil.py", "snakemake/__init__.py", "sitecustomize.py", "pickle.so", "usercustomize.pth"),
    *("config/__init__.py", "results/x.py", "results/tables/pickle.py", "results/logs/json.py"),
    # Snakemake, git, tools and shells read settings and commands from it.
    *(
        "Snakefile",
        "workflow/Snakefile",
        "workflow/rules/measure.smk",
        "profiles/default/config.yaml",
    ),
    *(
        ".snakemake/scripts/pickle.py",
        ".git/config",
        "source/.git/config",
        ".envrc",
        ".venv/pyvenv.cfg",
    ),
    *(
        "Makefile",
        "pyproject.toml",
        "setup.py",
        "conftest.py",
        "config/kinds.yaml",
        "bin/snakemake",
    ),
    # Files that another part of the workflow would read.
    *("results/cells/d/c/trial-1/x.parquet", "results/cells/x.json", "results/bundles/x.tar.gz"),
    *("results/tables/.x.csv", "results/plots/x", "results/x.csv", "README.md/x", "readme.md"),
]


@pytest.mark.parametrize("name", NOT_OF_THE_LAYOUT)
def test_a_file_that_no_bundle_has_is_refused(tmp_path: Path, name: str) -> None:
    archive = write_tar(tmp_path / "b.tar.gz", (f"root/{name}", b"import os"))
    assert refusal(archive, tmp_path) == (
        f"'root/{name}': is not a file of a bundle, so nothing was unpacked."
    )


def test_a_bomb_of_folders_is_refused(tmp_path: Path) -> None:
    name = "root/source/" + "/".join("d" * 12)
    archive = write_tar(tmp_path / "b.tar.gz", (name, b""))
    assert "is not a file of a bundle" in refusal(archive, tmp_path)


def test_other_kinds_of_headers_are_refused(tmp_path: Path) -> None:
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
        folder = tmp_path / kind.decode()
        folder.mkdir()
        archive = write_tar(folder / "b.tar.gz", special(kind), GOOD)
        assert f"is of the type {kind!r}" in refusal(archive, folder)
    timed = tarfile.TarInfo("root/source/x")
    timed.pax_headers = {"mtime": "1.5"}
    archive = write_tar(tmp_path / "b.tar.gz", timed)
    assert "a pax header that is not a path" in refusal(archive, tmp_path)


def test_a_header_that_needs_too_much_memory_is_refused(tmp_path: Path) -> None:
    pax = tarfile.TarInfo("root/source/x")
    pax.type, pax.size = tarfile.XHDTYPE, 2**32
    archive = tmp_path / "b.tar.gz"
    archive.write_bytes(gzip.compress(pax.tobuf(tarfile.USTAR_FORMAT) + bytes(2**16)))
    assert "a pax header of 4,294,967,296 bytes" in refusal(archive, tmp_path)


def bomb(path: Path, size: int, members: int) -> Path:
    """A .tar.gz of files with `size` zeros each, 10 GB in total, made from one packed block."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    with path.open("wb") as file:
        file.write(gzip.compress(b"", mtime=0)[:10])
        for number in range(members):
            info = tarfile.TarInfo(f"root/source/zeros-{number}")
            info.size = size
            header = zlib.compressobj(9, zlib.DEFLATED, -15)
            file.write(header.compress(info.tobuf()) + header.flush(zlib.Z_FULL_FLUSH))
            file.write(block * (size // 2**20))
    return path


BOMBS = [
    (2**30, 10, "unpack to more than"),
    (
        5 * 2**30,
        2,
        "'root/source/zeros-0': a bundle has at most 400,000 files of 4,294,967,296 bytes",
    ),
    (10 * 2**30, 1, "a pax header that is not a path"),  # too large for another
]


@pytest.mark.parametrize(("size", "members", "why"), BOMBS)
def test_a_bomb_of_10_gb_is_refused_quickly_and_in_little_memory(
    tmp_path: Path, size: int, members: int, why: str
) -> None:
    archive = bomb(tmp_path / "b.tar.gz", size, members)
    assert archive.stat().st_size > 9_000_000  # it contains all 10 GB
    tracemalloc.start()
    began = time.monotonic()
    message = refusal(archive, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert why in message
    assert time.monotonic() - began < 5
    assert peak < 8 * 2**20
    written = sum(each.stat().st_size for each in tmp_path.rglob("zeros*"))
    assert written <= 32 * 2**20


def test_flipped_and_missing_bytes_are_reported_with_the_file(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    good = write_tar(
        tmp_path / "good.tar.gz", GOOD, ("root/source/large", data), ("root/source/z", b"z")
    )
    packed = good.read_bytes()
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 1
    for name, broken in (("cut", packed[: len(packed) // 2]), ("flipped", bytes(flipped))):
        (tmp_path / name).mkdir()
        archive = tmp_path / name / "b.tar.gz"
        archive.write_bytes(broken)
        unpacked = unpack(archive, tmp_path / name)
        damage = unpacked.damage or ""
        wrong = unpacked.sha256.get("large") not in (None, hashlib.sha256(data).hexdigest())
        assert "damaged in or after" in damage
        assert "large" in damage or wrong


def test_data_hidden_after_a_file_is_reported(tmp_path: Path) -> None:
    plain = bytearray(gzip.decompress(write_tar(tmp_path / "good.tar.gz", GOOD).read_bytes()))
    plain[512 + len(GOOD[1])] = 1
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain))
    unpacked = unpack(tmp_path / "b.tar.gz", tmp_path)
    assert unpacked.damage == (
        "damaged in or after source/good (its last block is not padded with zeros)"
    )


def test_other_files_and_archives_with_more_data_are_refused(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good.tar.gz", GOOD).read_bytes()
    for name, data in (
        ("empty", b""),
        ("text", b"not an archive"),
        ("gzip of text", gzip.compress(b"not an archive" * 100)),
        ("appended", good + good),
        ("hidden", gzip.compress(gzip.decompress(good) + b"more" * 128)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "b.tar.gz").write_bytes(data)
        message = refusal(folder / "b.tar.gz", folder)
        has_more = name in ("appended", "hidden")
        expected = "more data after its end" if has_more else "is not a servegrid bundle"
        assert expected in message
