"""Whether a bundle's files are those that it was made of, by its manifest and by its crate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from servegrid.bundle import crate
from servegrid.bundle.layout import MANIFEST, manifest_digest
from servegrid.bundle.limits import JSON_BYTES, read_json
from servegrid.bundle.tarball import Unpacked
from servegrid.errors import BundleError


def culprits_of(tree: Path, unpacked: Unpacked) -> list[str]:
    """The culprits of an unpacked bundle's integrity: none where every hash is as it was."""
    culprits = [unpacked.damage] if unpacked.damage else []
    if MANIFEST not in unpacked.sha256:
        return [*culprits, f"{MANIFEST}: is missing"]
    if (tree / MANIFEST).stat().st_size > JSON_BYTES:
        return [*culprits, f"{MANIFEST}: is larger than {JSON_BYTES:,} bytes"]
    manifest = (tree / MANIFEST).read_bytes()
    listed = _listed(manifest)
    actual = {name: digest for name, digest in unpacked.sha256.items() if name != MANIFEST}
    culprits += [f"{name}: is missing" for name in sorted(listed.keys() - actual.keys())]
    culprits += [f"{name}: is not in {MANIFEST}" for name in sorted(actual.keys() - listed.keys())]
    culprits += [
        f"{name}: is not what {MANIFEST} was made of"
        for name in sorted(listed.keys() & actual.keys())
        if listed[name] != actual[name]
    ]
    if not unpacked.root.endswith(f"-{manifest_digest(manifest)}"):
        culprits.append(
            f"{unpacked.root}: the bundle's name is not of its content, which has the digest "
            f"{manifest_digest(manifest)}"
        )
    return culprits + _crate_culprits(tree, actual)


def _listed(manifest: bytes) -> dict[str, str]:
    listed: dict[str, str] = {}
    for line in manifest.decode("utf-8", "replace").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest if name not in listed else "listed twice"
    return listed


def _crate_culprits(tree: Path, actual: Mapping[str, str]) -> list[str]:
    if crate.CRATE not in actual:
        return []  # the manifest's check tells it
    try:
        described = crate.files_of(read_json(tree / crate.CRATE))
    except (BundleError, KeyError, TypeError, ValueError, RecursionError) as error:
        return [f"{crate.CRATE}: cannot be read ({error})"]
    files = {name: digest for name, digest in actual.items() if name != crate.CRATE}
    culprits = [
        f"{name}: is in {crate.CRATE} and not in the bundle"
        for name in sorted(described.keys() - files.keys())
    ]
    for name, digest in sorted(files.items()):
        if name not in described:
            culprits.append(f"{name}: is not in {crate.CRATE}")
        elif (described[name].sha256, described[name].bytes) != (
            digest,
            (tree / name).stat().st_size,
        ):
            culprits.append(f"{name}: is not what {crate.CRATE} describes")
    return culprits
