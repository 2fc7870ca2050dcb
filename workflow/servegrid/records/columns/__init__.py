"""The columns of all tables.

Each `Column` is the only place that states a column's name, type, unit and meaning. The Arrow
schemas, the metadata of the Parquet files and docs/columns.md are made from them.
"""

from servegrid.records.columns.cells import CELLS, PERCENTILES
from servegrid.records.columns.column import Column
from servegrid.records.columns.derived import (
    CAPACITY_PLAN,
    FRONTIER,
    PUBLISHED_COMPARISON,
    SATURATION,
    SLO,
    SUMMARY,
    SUMMARY_KEYS,
    SUMMARY_METRICS,
)
from servegrid.records.columns.raw import REQUESTS, TELEMETRY

__all__ = [
    "CAPACITY_PLAN",
    "CELLS",
    "FRONTIER",
    "PERCENTILES",
    "PUBLISHED_COMPARISON",
    "REQUESTS",
    "SATURATION",
    "SLO",
    "SUMMARY",
    "SUMMARY_KEYS",
    "SUMMARY_METRICS",
    "TELEMETRY",
    "Column",
]
