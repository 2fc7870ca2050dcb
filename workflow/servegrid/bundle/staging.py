"""Copies files into the tree of a bundle, redacted."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from servegrid.bundle.redact import Redactor
from servegrid.bundle.secrets import is_text
from servegrid.records import parquet


def stage(data: bytes, path: Path) -> None:
    """Write `data`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def stage_redacted(source: Path, path: Path, redactor: Redactor, is_site_file: bool) -> None:
    """Copy text or Parquet redacted, and other files unchanged.

    A file of the site (a log, a record of Slurm, a profile) may have invalid characters, and if it
    is JSON, its keys say which values are secrets.
    """
    if source.suffix == ".parquet":
        _stage_table(source, path, redactor)
        return
    data = source.read_bytes()
    try:
        text = data.decode("utf-8", "replace" if is_site_file else "strict")
        if is_site_file and source.suffix == ".json":
            data = (json.dumps(redactor.redact_data(json.loads(text)), indent=2) + "\n").encode()
        else:
            data = redactor.redact_text(text).encode()
    except ValueError:  # for example an image
        pass
    stage(data, path)


def _stage_table(source: Path, path: Path, redactor: Redactor) -> None:
    """Copy a table. It is rewritten only if its record or its strings change."""
    with pq.ParquetFile(parquet.read_intact(source)) as file:
        table = file.read()
    redacted = table
    for position, field in enumerate(table.schema):
        if is_text(field.type):
            texts = table.column(position).to_pylist()
            redacted_texts = [text and redactor.redact_text(text) for text in texts]
            if redacted_texts != texts:
                column = pa.array(redacted_texts, field.type)
                redacted = redacted.set_column(position, field, column)
    metadata = dict(table.schema.metadata or {})
    if parquet.RECORD_KEY in metadata:
        record = redactor.redact_data(json.loads(metadata[parquet.RECORD_KEY]))
        metadata[parquet.RECORD_KEY] = json.dumps(record, sort_keys=True).encode()
        redacted = redacted.replace_schema_metadata(metadata)
    if redacted.equals(table, check_metadata=True):
        stage(source.read_bytes(), path)
    else:
        parquet.write_table(redacted, path)
