"""Stored data: columns of all tables, Parquet files with their records, verdicts."""
