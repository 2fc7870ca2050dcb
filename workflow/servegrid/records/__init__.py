"""What is stored: the columns of every table, Parquet files with their records, verdicts."""
