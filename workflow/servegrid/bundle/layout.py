"""The paths in a bundle. They are relative to its one folder, a repository with its results."""

from __future__ import annotations

import hashlib

BUNDLE_FORMAT = 1
"""Raise it if a bundle gets other files or a file gets another meaning."""

METADATA = "bundle.json"
CONFIGURATION = "config/study.json"
HARDWARE = "config/hardware.yaml"
ENVIRONMENTS = "environments.json"
MODELS = "models.json"
MANIFEST = "manifest-sha256.txt"
PATCH = "source.patch"
CELLS = "results/cells"
LOGS = "results/logs"
TABLES = "results/tables"
FIGURES = ("results/plots", "results/report")
DERIVED = (TABLES, *FIGURES)
RECORDS = ("requests.parquet", "telemetry.parquet")


def manifest_digest(manifest: bytes) -> str:
    """The end of a bundle's name. It depends on the manifest, and so on every file."""
    return hashlib.sha256(manifest).hexdigest()[:16]
