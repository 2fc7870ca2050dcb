"""Compares a bundle's files with its manifest and its crate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from servegrid.bundle import crate
from servegrid.bundle.layout import (
    CRATE,
    MANIFEST,
    manifest_digest,
)
from servegrid.bundle.limits import JSON_BYTES, read_json
from servegrid.bundle.tarball import UnpackedArchive
from servegrid.errors import BundleError
from servegrid.study.source_files import BUNDLED


def find_integrity_problems(tree: Path, unpacked: UnpackedArchive) -> list[str]:
    """A line per problem with an unpacked bundle; none if every file has its original hash."""
    problems = [unpacked.damage] if unpacked.damage else []
    if MANIFEST not in unpacked.sha256:
        return [*problems, f"{MANIFEST}: is missing"]
    if (tree / MANIFEST).stat().st_size > JSON_BYTES:
        return [*problems, f"{MANIFEST}: is larger than {JSON_BYTES:,} bytes"]
    manifest = (tree / MANIFEST).read_bytes()
    listed = _parse_manifest(manifest)
    actual = {name: digest for name, digest in unpacked.sha256.items() if name != MANIFEST}
    problems += [f"{name}: is missing" for name in sorted(listed.keys() - actual.keys())]
    problems += [f"{name}: is not in {MANIFEST}" for name in sorted(actual.keys() - listed.keys())]
    problems += [
        f"{name}: differs from its hash in {MANIFEST}"
        for name in sorted(listed.keys() & actual.keys())
        if listed[name] != actual[name]
    ]
    problems += [
        f"{name}: its name is not the digest of its content"
        for name, digest in sorted(actual.items())
        if name.startswith(f"{BUNDLED}/") and PurePosixPath(name).stem != digest
    ]
    if not unpacked.root.endswith(f"-{manifest_digest(manifest)}"):
        problems.append(
            f"{unpacked.root}: the bundle's name does not match the digest of its content, "
            f"{manifest_digest(manifest)}"
        )
    return problems + _find_crate_problems(tree, actual)


def _parse_manifest(manifest: bytes) -> dict[str, str]:
    digests: dict[str, str] = {}
    for line in manifest.decode("utf-8", "replace").splitlines():
        digest, _, name = line.partition("  ")
        digests[name] = digest if name not in digests else "listed twice"
    return digests


def _find_crate_problems(tree: Path, actual: Mapping[str, str]) -> list[str]:
    if CRATE not in actual:
        return []  # a problem of the manifest, which lists it
    try:
        described = crate.parse_files(read_json(tree / CRATE))
    except (BundleError, KeyError, TypeError, ValueError, RecursionError) as error:
        return [f"{CRATE}: cannot be read ({error})"]
    files = {name: digest for name, digest in actual.items() if name != CRATE}
    problems = [
        f"{name}: is in {CRATE} but not in the bundle"
        for name in sorted(described.keys() - files.keys())
    ]
    for name, digest in sorted(files.items()):
        if name not in described:
            problems.append(f"{name}: is not in {CRATE}")
        elif (described[name].sha256, described[name].bytes) != (
            digest,
            (tree / name).stat().st_size,
        ):
            problems.append(f"{name}: differs from its description in {CRATE}")
    return problems
