"""An unpacked bundle: what its checks have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from servegrid.analysis import tables
from servegrid.analysis.slo import parse_slo
from servegrid.analysis.tables import gather_study
from servegrid.bundle.derive import AnalysisInputs, write_tables
from servegrid.bundle.layout import (
    BUNDLE_FORMAT,
    CELLS,
    CONFIGURATION,
    HARDWARE,
    METADATA,
    RECORDS,
    TABLES,
)
from servegrid.bundle.limits import (
    CONFIGURATION_BYTES,
    check_table_size,
    check_yaml,
    read_json,
)
from servegrid.bundle.published import with_bundled_file
from servegrid.bundle.tarball import UnpackedArchive
from servegrid.errors import BundleError, RecordError
from servegrid.study.config import parse_study
from servegrid.study.grid import Study
from servegrid.study.source_files import drop_paths


@dataclass(frozen=True)
class UnpackedBundle:
    """The content of a bundle. Each property is computed when it is used for the first time.

    Properties raise BundleError if the bundle lacks a file or exceeds a limit.
    """

    tree: Path
    archive: UnpackedArchive
    scratch: Path
    """A folder for derived files."""

    @cached_property
    def metadata(self) -> dict[str, Any]:
        metadata = read_json(self.tree / METADATA)
        if metadata.get("format") != BUNDLE_FORMAT:
            raise BundleError(
                f"{METADATA}: the bundle has format {metadata.get('format')!r}; this version of "
                f"servegrid reads format {BUNDLE_FORMAT}. Use the version that made the bundle."
            )
        return metadata

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as it is in the bundle. It can name no file for a workload."""
        return drop_paths(read_json(self.tree / CONFIGURATION, CONFIGURATION_BYTES))

    @cached_property
    def study(self) -> Study:
        return parse_study(self.config, [CONFIGURATION])

    @cached_property
    def inputs(self) -> AnalysisInputs:
        check_yaml(self.tree / HARDWARE)
        config = with_bundled_file(self.config, self.tree)
        return AnalysisInputs(config, self.tree / CELLS, self.tree / HARDWARE, *self.derived_cells)

    @cached_property
    def missing(self) -> dict[str, str]:
        """The trials that are missing according to the bundle, with the reason."""
        missing: dict[str, str] = self.metadata["missing"]
        return missing

    @cached_property
    def derived_cells(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The cells and the drift checks, derived from the records that should be there."""
        for trial in self.study.all_trials:
            for name in RECORDS:
                check_table_size(self.tree / CELLS / trial.id / name)
        trials, drift_checks = (
            tuple(trial for trial in group if trial.id not in self.missing)
            for group in (self.study.trials, self.study.drift_checks)
        )
        try:
            study = Study(self.study.name, trials, drift_checks)
            return gather_study(study, self.tree / CELLS, parse_slo(self.config))
        except RecordError as error:
            # The other lines say how to measure again, which does not apply to a bundle.
            lines = [line.strip() for line in str(error).splitlines() if line[:2] == "  "]
            problems = [line for line in lines if not line.startswith("rm -r ")]
            raise BundleError("\n".join(problems)) from error

    @cached_property
    def derived_tables(self) -> Path:
        """The folder of the tables that are derived from the records."""
        write_tables(self.inputs, self.scratch / "tables")
        return self.scratch / "tables"

    @cached_property
    def shipped_cells(self) -> pd.DataFrame:
        """The table of cells that is in the bundle."""
        path = self.tree / TABLES / "cells.parquet"
        check_table_size(path)
        try:
            rows = pq.read_metadata(path).num_rows
            if rows != len(self.study.trials):
                raise BundleError(
                    f"{TABLES}/{path.name}: has {rows} rows, but the study has "
                    f"{len(self.study.trials)} trials."
                )
            return tables.load_table(path)
        except (OSError, pa.ArrowException, RecordError) as error:
            raise BundleError(f"{TABLES}/{path.name}: cannot be read ({error}).") from error
