"""A logger plugin that writes the data of each log record about an allocation to a file."""

import json
import logging
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase


class LogHandler(LogHandlerBase):
    writes_to_stream = False
    writes_to_file = False
    has_filter = True
    has_formatter = True
    needs_rulegraph = False

    def emit(self, record: logging.LogRecord) -> None:
        if allocation := getattr(record, "allocation", None):
            with Path("allocations.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(allocation) + "\n")
