"""What is read of a bundle, and not more: its files say how large they will get."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml

from servegrid.bundle.layout import CONFIGURATION
from servegrid.errors import BundleError

TRIALS = 1_000_000
TABLE_ROWS = 20_000_000
TABLE_BYTES = 4 * 2**30
JSON_BYTES = 64 * 2**20
CONFIGURATION_BYTES = 2**20
MEMORY_BYTES = 8 * 2**30
"""What a check may take. A small Parquet file can say in few bytes that a long text comes a
million times, which nothing but its reading shows."""


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Let allocations of the block fail where they would take more than MEMORY_BYTES in all."""
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    known = [each for each in (limit, before, most) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(known), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises BundleError where there is none of at most `most` bytes."""
    name = path.name
    if not path.exists() or path.stat().st_size > most:
        raise BundleError(f"{name}: is missing, or larger than {most:,} bytes.")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: is not JSON ({error}).") from error
    if not isinstance(data, dict):
        raise BundleError(f"{name}: is not a JSON object.")
    return data


def refuse_huge_study(config: Mapping[str, Any]) -> None:
    """Raise BundleError where a configuration would expand beyond what memory takes."""
    deployments = config.get("deployments")
    asked = 0
    for entry in deployments if isinstance(deployments, list) else []:
        workloads = [
            config.get("workload"),
            entry.get("workload") if isinstance(entry, dict) else None,
        ]
        keys: dict[str, Any] = {}
        for workload in workloads:
            keys |= workload if isinstance(workload, dict) else {}
        trials = keys.get("trials", 1)
        product = trials if isinstance(trials, int) else 1
        for key in ("protocol", "output_len", "input_len"):
            product *= max(1, len(value)) if isinstance(value := keys.get(key), list) else 1
        levels = [v for v in (keys.get("concurrency"), keys.get("request_rate")) if v is not None]
        product *= sum(len(value) if isinstance(value, list) else 1 for value in levels)
        asked += product
    if asked > TRIALS:
        raise BundleError(f"{CONFIGURATION}: asks for more than {TRIALS:,} trials.")


def refuse_unplain_yaml(path: Path) -> None:
    """Raise BundleError where a YAML file is missing, large, or refers to parts of itself.

    Such references can make a few lines into more than memory takes.
    """
    if not path.exists() or path.stat().st_size > CONFIGURATION_BYTES:
        raise BundleError(f"{path.name}: is missing, or larger than {CONFIGURATION_BYTES:,} bytes.")
    try:
        refers = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(path.read_bytes()))
    except (yaml.YAMLError, RecursionError) as error:
        raise BundleError(f"{path.name}: is not valid YAML.") from error
    if refers:
        raise BundleError(f"{path.name}: refers to parts of itself.")


def refuse_huge_table(path: Path) -> None:
    """Raise BundleError where a Parquet file says that it unpacks to more than memory takes."""
    if not path.exists():
        return
    try:
        metadata = pq.read_metadata(path)
    except Exception:  # damaged: told by those who read it
        return
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    values = max(
        (group.column(n).num_values for group in groups for n in range(group.num_columns)),
        default=0,
    )
    size = sum(group.total_byte_size for group in groups)
    if max(metadata.num_rows, values) > TABLE_ROWS or size > TABLE_BYTES:
        raise BundleError(
            f"{path.parent.name}/{path.name}: a table has at most {TABLE_ROWS:,} values a column "
            f"and {TABLE_BYTES:,} bytes."
        )
