"""The paths in a bundle, relative to its one folder: a study's configuration and its results.

A bundle contains only the files that this module names. A folder with an unpacked bundle becomes
the working directory of Python and Snakemake, which import or obey files of many names there. So
the workflow that measured the study is in a folder of its own, where nothing looks for it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath

from servegrid.study.source_files import BUNDLED, BUNDLED_SUFFIXES

BUNDLE_FORMAT = 2
"""Raise it if a bundle gets other files or a file gets another meaning."""

METADATA = "bundle.json"
CONFIGURATION = "config/study.json"
HARDWARE = "config/hardware.yaml"
ENVIRONMENTS = "environments.json"
MODELS = "models.json"
MANIFEST = "manifest-sha256.txt"
CRATE = "ro-crate-metadata.json"
README = "README.md"
PATCH = "source.patch"
SOURCE = "source"
"""The folder of the workflow and the profiles that measured the study. They are for reading."""
CELLS = "results/cells"
LOGS = "results/logs"
TABLES = "results/tables"
FIGURES = ("results/plots", "results/report")
DERIVED = (TABLES, *FIGURES)
RECORDS = ("requests.parquet", "telemetry.parquet")
DEPTH = 12
"""Allowed folders above a file."""
_FILES = {METADATA, CONFIGURATION, HARDWARE, ENVIRONMENTS, MODELS, MANIFEST, CRATE, README, PATCH}
_PUBLISHED = PurePosixPath(CONFIGURATION).parent
_SUFFIXES = {
    LOGS: {".json", ".log"},
    **{part: {".csv", ".html", ".md", ".parquet", ".png", ".svg", ".tex"} for part in DERIVED},
}


def is_allowed(name: str) -> bool:
    """Whether a bundle may contain a file `name`, a plain path with slashes."""
    path = PurePosixPath(name)
    if len(path.parts) > DEPTH or any(part.startswith(".") for part in path.parts):
        return False
    if name.startswith(f"{CELLS}/"):
        return path.name in RECORDS
    if name.startswith(f"{SOURCE}/"):
        return True
    if name.startswith(f"{BUNDLED}/"):
        return str(path.parent) == BUNDLED and is_digest(path.stem, path.suffix)
    for folder, suffixes in _SUFFIXES.items():
        if name.startswith(f"{folder}/"):
            return path.suffix in suffixes
    return name in _FILES or (path.parent == _PUBLISHED and path.suffix == ".csv")


def is_digest(stem: str, suffix: str) -> bool:
    """Whether this is the name of a user's file in a bundle: its SHA-256, and a known ending."""
    return bool(re.fullmatch(r"[0-9a-f]{64}", stem)) and suffix in BUNDLED_SUFFIXES


def manifest_digest(manifest: bytes) -> str:
    """The end of a bundle's name. It depends on the manifest, and so on every file."""
    return hashlib.sha256(manifest).hexdigest()[:16]
