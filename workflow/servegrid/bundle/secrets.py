"""Scans a tree of files for secrets: everything that must not leave the site."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from servegrid.bundle.layout import CONFIGURATION, SOURCE
from servegrid.bundle.limits import check_table_size
from servegrid.bundle.redact import Redactor, find_secrets, find_secrets_in_data
from servegrid.bundle.sources import PARTS
from servegrid.bundle.tarball import list_files
from servegrid.errors import BundleError
from servegrid.records import parquet

_MAX_LISTED = 10
_PART_BYTES = 2**24
_OVERLAP_BYTES = 2**12
"""The longest possible token: a token across two parts is complete in one of them."""
_SIGNATURE_BYTES = 512
_PRINTABLE = bytes(byte if 32 <= byte < 127 else 10 for byte in range(256))


def check_secrets(tree: Path, redactor: Redactor) -> None:
    """Raise BundleError, with files and kinds of secrets, if `tree` contains any."""
    found = list(scan_tree(tree, redactor))
    if found:
        more = f"\n  … and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
        listed = "\n  ".join(found[:_MAX_LISTED])
        raise BundleError(
            "The bundle would contain secrets that cannot be redacted, because redacting them "
            f"would change the identity of what was measured:\n  {listed}{more}\n"
            "Remove them from the configuration or the workflow (for example, use a path outside "
            "of /home), measure those cells again, and bundle the study again."
        )


def scan_tree(tree: Path, redactor: Redactor | None = None) -> Iterator[str]:
    """`file: kind` for each secret. Hosts are found only if `redactor` knows them.

    The workflow's files are not scanned for hosts, because any word can be a host's name.
    """
    for name in list_files(tree):
        is_source = any(
            name == f"{SOURCE}/{part}" or name.startswith(f"{SOURCE}/{part}/") for part in PARTS
        )
        kinds = dict.fromkeys(_scan_file(tree / name, name))
        if redactor is not None and not is_source:
            kinds |= dict.fromkeys(
                f"the host {host!r}"
                for text in _read_texts(tree / name)
                for host in sorted(redactor.find_hosts(text) - set(redactor.hosts.values()))
            )
        for kind in [*kinds, *find_secrets(name)]:
            yield f"{name}: {kind}"


def is_text(type: pa.DataType) -> bool:
    """Whether a column of this type contains strings."""
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type))


def _scan_file(path: Path, name: str) -> Iterator[str]:
    for text in _read_texts(path):
        yield from find_secrets(text)
    if name == CONFIGURATION:
        yield from find_secrets_in_data(json.loads(path.read_text(encoding="utf-8")))
    elif path.suffix == ".parquet":
        yield from find_secrets_in_data(_read_record(path))


def _read_record(path: Path) -> Any:
    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata.get(parquet.RECORD_KEY, b"{}"))


def _read_texts(path: Path) -> Iterator[str]:
    """The readable parts of a file: metadata and strings of Parquet, else its bytes as text.

    Raises BundleError if a table is too large.
    """
    if path.suffix != ".parquet":
        yield from _read_parts(path)
        return
    with pq.ParquetFile(path) as file:
        check_table_size(path)
        schema = file.schema_arrow
        for value in (schema.metadata or {}).values():
            yield value.decode("utf-8", "replace")
        texts = [field.name for field in schema if is_text(field.type)]
        table = file.read(texts)
    for column in table.columns:
        yield "\n".join(text for text in column.unique().to_pylist() if text)


def _read_parts(path: Path) -> Iterator[str]:
    """The text of a file, part by part; of a binary file only the printable characters.

    Other bytes of an image, decoded as text, would sooner or later look like a secret.
    """
    with path.open("rb") as file:
        overlap, is_binary = b"", b"\0" in file.read(_SIGNATURE_BYTES)
        file.seek(0)
        while data := file.read(_PART_BYTES):
            part = overlap + data
            readable = part.translate(_PRINTABLE) if is_binary else part
            yield readable.decode("utf-8", "replace")
            overlap = data[-_OVERLAP_BYTES:]
