"""Limits on what is read from a bundle, checked before a file is loaded."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml

from servegrid.errors import BundleError

TABLE_ROWS = 20_000_000
TABLE_BYTES = 4 * 2**30
JSON_BYTES = 256 * 2**20
CONFIGURATION_BYTES = 2**20
MEMORY_BYTES = 8 * 2**30
"""Memory that the checks may allocate. A small Parquet file can repeat a long text a million times,
and only reading it shows this."""


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Let allocations in the block fail if they exceed MEMORY_BYTES in total."""
    before, maximum = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    known = [value for value in (limit, before, maximum) if value != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(known), maximum))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, maximum))


def read_json(path: Path, max_bytes: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises BundleError if it is missing, too large or not one."""
    name = path.name
    if not path.exists() or path.stat().st_size > max_bytes:
        raise BundleError(f"{name}: is missing, or larger than {max_bytes:,} bytes.")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: is not JSON ({error}).") from error
    if not isinstance(data, dict):
        raise BundleError(f"{name}: is not a JSON object.")
    return data


def check_yaml(path: Path) -> None:
    """Raise BundleError if a YAML file is missing, too large, invalid, or has aliases.

    Nested aliases can expand a few lines to more than the memory can hold.
    """
    if not path.exists() or path.stat().st_size > CONFIGURATION_BYTES:
        raise BundleError(f"{path.name}: is missing, or larger than {CONFIGURATION_BYTES:,} bytes.")
    try:
        has_alias = any(
            isinstance(event, yaml.AliasEvent) for event in yaml.parse(path.read_bytes())
        )
    except (yaml.YAMLError, RecursionError) as error:
        raise BundleError(f"{path.name}: is not valid YAML.") from error
    if has_alias:
        raise BundleError(f"{path.name}: contains a YAML alias.")


def check_table_size(path: Path) -> None:
    """Raise BundleError if the metadata of a Parquet file announce a table above the limits."""
    if not path.exists():
        return
    try:
        metadata = pq.read_metadata(path)
    except Exception:  # damaged: its reader reports this
        return
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    values = max(
        (group.column(n).num_values for group in groups for n in range(group.num_columns)),
        default=0,
    )
    size = sum(group.total_byte_size for group in groups)
    if max(metadata.num_rows, values) > TABLE_ROWS or size > TABLE_BYTES:
        raise BundleError(
            f"{path.parent.name}/{path.name}: has more than {TABLE_ROWS:,} values in a column, or "
            f"more than {TABLE_BYTES:,} bytes."
        )
