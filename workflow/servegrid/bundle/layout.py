"""The names in a bundle, below its one folder, which is a repository with its results."""

from __future__ import annotations

import hashlib

BUNDLE_FORMAT = 1
"""Raise it when a bundle gets other files or another meaning."""

BUNDLE = "bundle.json"
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
    """What a bundle's name ends with: of the manifest, and so of every file."""
    return hashlib.sha256(manifest).hexdigest()[:16]
