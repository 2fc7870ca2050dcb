"""The CSV file of published data that a study may name: in a bundle it is below config/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from servegrid.bundle.layout import CONFIGURATION
from servegrid.bundle.limits import JSON_BYTES
from servegrid.errors import BundleError
from servegrid.reference.published import is_path

_FOLDER = PurePosixPath(CONFIGURATION).parent


def published_path(config: Mapping[str, Any]) -> str | None:
    """The bundle's path for the study's CSV file, or None if the study names no file."""
    name = str(config.get("published", ""))
    return str(_FOLDER / PurePosixPath(name).name) if is_path(name) else None


def with_bundled_file(config: Mapping[str, Any], tree: Path) -> dict[str, Any]:
    """A bundle's configuration with the path of its CSV file below `tree`, if it has one.

    Reads no other file of this machine, whatever the configuration names. Raises BundleError if
    the file is missing or too large.
    """
    name = published_path(config)
    if name is None:
        return dict(config)
    file = tree / name
    if config["published"] != name or not file.is_file() or file.stat().st_size > JSON_BYTES:
        raise BundleError(
            f"{CONFIGURATION}: published: `{name}` is missing, or larger than {JSON_BYTES:,} bytes."
        )
    return {**config, "published": str(file)}
