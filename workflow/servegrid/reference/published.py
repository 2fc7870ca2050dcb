"""Published latencies that a study can be compared with: a data set of this package, or a CSV file.

Nothing here imports pandas, so that reading a study's configuration stays quick.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from servegrid.errors import ConfigError
from servegrid.study.grid import CONCURRENCY_PROTOCOLS
from servegrid.study.limits import MAX_INTEGER, MAX_NUMBER, MIN_NUMBER

FOLDER = Path(__file__).parent

_COUNT_COLUMNS = ("gpu_count", "concurrency", "input_len", "output_len")
_MAX_DIGITS = 100
"""Python converts no text with thousands of digits."""
SECONDS_COLUMN = "seconds_per_100_tokens"
PUBLISHED_COLUMNS = (
    *("model", "quantization", "gpu", "gpu_count"),
    *("protocol", "concurrency", "input_len", "output_len", SECONDS_COLUMN),
)
"""Columns of a file of published latencies, named as in docs/columns.md. Other columns are
ignored. An empty `seconds_per_100_tokens` means that the cell was not served."""


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and what its authors say about their measurement."""

    citation: str
    method: Mapping[str, str] = field(default_factory=dict)
    """By `prompts`, `software`, `trials` and `time`."""


SOURCES: Mapping[str, Source] = {
    "inria-2024": Source(
        "Bendi-Ouis, Dutarte, Hinaut, 2024",
        {
            "prompts": "the article does not say whether simultaneous requests had the same "
            "prompt, which a prefix cache would answer faster",
            "software": "vLLM; the article does not give the version",
            "trials": "the article gives neither the number of trials nor a warm-up",
            "time": "the time required to generate 100 tokens",
        },
    )
}
"""The data sets of this package. README.md describes their files."""


@dataclass(frozen=True)
class PublishedData:
    """Published latencies: one row per cell, with the keys PUBLISHED_COLUMNS.

    `rounding_s` is half of the last digit of the published seconds.
    """

    name: str
    source: Source
    rows: Sequence[Mapping[str, Any]]
    rounding_s: float


def load_published(name: str, origin: str = "--published") -> PublishedData:
    """The data set `name` of this package, or the data in the CSV file at the path `name`.

    A path is relative to the working directory. `origin` says in messages who asked for it.
    Raises ConfigError if there is no such data set, or if the file cannot be used.
    """
    if name in SOURCES:
        return _read(FOLDER / f"{name}.csv", name, SOURCES[name], origin)
    if not is_path(name):
        near = difflib.get_close_matches(name, SOURCES, n=1)
        meant = f" Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(
            f"{origin}: there is no published data set `{name}`.{meant} "
            f"Name one of {_format_names(SOURCES)}, or the path of a CSV file (`….csv`)."
        )
    file = Path(name)
    return _read(file, file.name, Source(file.name), origin)


def is_path(name: str) -> bool:
    """Whether `published` is the path of a CSV file, not the name of a data set."""
    return name not in SOURCES and name.endswith(".csv")


def published_from_config(
    config: Mapping[str, Any], files: Sequence[Path | str] = ()
) -> PublishedData | None:
    """The published data that a study's configuration names, or None if it names none.

    `files` are the files of the configuration, for messages. Raises ConfigError like
    `load_published`.
    """
    name = config.get("published")
    if name is None:
        return None
    source = ", ".join(str(file) for file in files) or "configuration"
    return load_published(str(name), f"{source}: published")


def _read(file: Path, name: str, source: Source, origin: str) -> PublishedData:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            head, found = reader.fieldnames or [], list(reader)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{origin}: the file {file} cannot be read ({reason}). Name a CSV file that exists; a "
            "relative path starts at the working directory."
        ) from error
    missing = [column for column in PUBLISHED_COLUMNS if column not in head]
    if missing:
        raise ConfigError(
            f"{origin}: the file {file} does not have all columns; missing: "
            f"{_format_names(missing)}. Add them. Required columns: "
            f"{_format_names(PUBLISHED_COLUMNS)}."
        )
    rows = [
        _row(each, f"{origin}: {file}, line {number}") for number, each in enumerate(found, start=2)
    ]
    if not rows:
        raise ConfigError(f"{origin}: the file {file} has no rows. Add one row per published cell.")
    _check_duplicates(rows, f"{origin}: {file}")
    return PublishedData(name, source, rows, _rounding_s(found))


def _row(found: Mapping[str, str | None], where: str) -> dict[str, Any]:
    """The values of one line with their types. Raises ConfigError if one does not fit."""
    texts = {column: (found.get(column) or "").strip() for column in PUBLISHED_COLUMNS}
    row: dict[str, Any] = {}
    for column, text in texts.items():
        value: Any = text
        if column in _COUNT_COLUMNS:
            minimum = 0 if column == "gpu_count" else 1
            value = int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else None
            value = value if value is not None and minimum <= value <= MAX_INTEGER else None
            expected = f"an integer from {minimum} to {MAX_INTEGER}"
        elif column == SECONDS_COLUMN:
            value = _seconds(text)
            expected = "a positive number, or empty for a cell that was not served"
        elif column == "protocol":
            value = text if text in CONCURRENCY_PROTOCOLS else None
            expected = f"one of {_format_names(CONCURRENCY_PROTOCOLS)}"
        else:
            value = text or None
            expected = "a name"
        if value is None:
            raise ConfigError(f"{where}: `{column}` is {text!r}. It must be {expected}.")
        row[column] = value
    return row


def _seconds(text: str) -> float | None:
    """The number; NaN for an empty text, None for anything else."""
    if not text:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        return None
    return value if MIN_NUMBER <= value <= MAX_NUMBER else None


def _check_duplicates(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    lines: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows, start=2):
        key = tuple(row[column] for column in PUBLISHED_COLUMNS if column != SECONDS_COLUMN)
        first = lines.setdefault(key, number)
        if first != number:
            raise ConfigError(
                f"{where}: lines {first} and {number} describe the same cell. Remove one of them."
            )


def _rounding_s(rows: Sequence[Mapping[str, str | None]]) -> float:
    """Half of the last digit of the value with most decimals: 0.05 if that is `1.8`."""
    texts = filter(None, ((row[SECONDS_COLUMN] or "").strip() for row in rows))
    exponents = [int(Decimal(text).as_tuple().exponent) for text in texts]
    return 0.5 * 10.0 ** min(exponents, default=0)


def _format_names(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
