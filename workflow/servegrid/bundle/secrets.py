"""A tree of files looked through for what must not leave the site."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from servegrid.bundle.layout import CONFIGURATION
from servegrid.bundle.limits import refuse_huge_table
from servegrid.bundle.redact import Redactor, secrets_in, secrets_in_data
from servegrid.bundle.sources import PARTS
from servegrid.bundle.tarball import names_below
from servegrid.errors import BundleError
from servegrid.records import parquet

_LISTED = 10
_PART_BYTES = 2**24
_OVERLAP_BYTES = 2**12
"""As long as any token may be: what lies across two parts is whole in one of them."""
_SIGNATURE_BYTES = 512
_PRINTABLE = bytes(byte if 32 <= byte < 127 else 10 for byte in range(256))


def refuse_secrets(tree: Path, redactor: Redactor) -> None:
    """Raise BundleError, naming files and kinds, where `tree` holds anything of the sort."""
    found = list(findings(tree, redactor))
    if found:
        more = f"\n  … and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        listed = "\n  ".join(found[:_LISTED])
        raise BundleError(
            "The bundle would hold what must not leave the site, where it cannot be redacted "
            f"without changing what was measured:\n  {listed}{more}\n"
            "Take it out of the configuration or the workflow and measure those cells again, for "
            "example under a path outside of /home; then make the bundle."
        )


def findings(tree: Path, redactor: Redactor | None = None) -> Iterator[str]:
    """`file: kind` of all that must not be there; hosts only where `redactor` knows them.

    Sources are not looked through for hosts, whose names may be any word.
    """
    for name in names_below(tree):
        is_source = any(name == part or name.startswith(f"{part}/") for part in PARTS)
        kinds = dict.fromkeys(_of_file(tree / name, name))
        if redactor is not None and not is_source:
            kinds |= dict.fromkeys(
                f"the host {host!r}"
                for text in _texts(tree / name)
                for host in sorted(redactor.hosts_in(text) - set(redactor.hosts.values()))
            )
        for kind in [*kinds, *secrets_in(name)]:
            yield f"{name}: {kind}"


def is_text(type: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type))


def _of_file(path: Path, name: str) -> Iterator[str]:
    for text in _texts(path):
        yield from secrets_in(text)
    if name == CONFIGURATION:
        yield from secrets_in_data(json.loads(path.read_text()))
    elif path.suffix == ".parquet":
        yield from secrets_in_data(_record(path))


def _record(path: Path) -> Any:
    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata.get(parquet.RECORD_KEY, b"{}"))


def _texts(path: Path) -> Iterator[str]:
    """What can be read in a file: of Parquet the metadata and the strings, else its bytes.

    Raises BundleError where a table is too large to be read.
    """
    if path.suffix != ".parquet":
        yield from _parts(path)
        return
    with pq.ParquetFile(path) as file:
        refuse_huge_table(path)
        schema = file.schema_arrow
        for value in (schema.metadata or {}).values():
            yield value.decode("utf-8", "replace")
        texts = [field.name for field in schema if is_text(field.type)]
        table = file.read(texts)
    for column in table.columns:
        yield "\n".join(text for text in column.unique().to_pylist() if text)


def _parts(path: Path) -> Iterator[str]:
    """The text of a file, of which only a part is in memory; of a binary one what is readable.

    Among the bytes of an image, taken for letters, a password in a URL will turn up one day.
    """
    with path.open("rb") as file:
        before, is_binary = b"", b"\0" in file.read(_SIGNATURE_BYTES)
        file.seek(0)
        while data := file.read(_PART_BYTES):
            whole = before + data
            readable = whole.translate(_PRINTABLE) if is_binary else whole
            yield readable.decode("utf-8", "replace")
            before = data[-_OVERLAP_BYTES:]
