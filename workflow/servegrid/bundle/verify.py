"""Whether a bundle is whole and its tables follow from its records. Runs no code that it holds.

Checks 1 to 4 are analysis reproduction: they show that a bundle agrees with itself, not that
anything would be measured like this again, nor that the records are honest.
"""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from servegrid import __version__
from servegrid.analysis import tables
from servegrid.bundle import crate, tarball
from servegrid.bundle.derive import (
    Ground,
    analysis_environment,
    cells_of,
    write_figures,
    write_tables,
)
from servegrid.bundle.differences import between_files, of_cell
from servegrid.bundle.integrity import culprits_of
from servegrid.bundle.layout import (
    BUNDLE,
    BUNDLE_FORMAT,
    CELLS,
    CONFIGURATION,
    FIGURES,
    HARDWARE,
    MANIFEST,
    RECORDS,
    TABLES,
)
from servegrid.bundle.limits import (
    CONFIGURATION_BYTES,
    limited_memory,
    read_json,
    refuse_huge_study,
    refuse_huge_table,
    refuse_unplain_yaml,
)
from servegrid.bundle.secrets import findings
from servegrid.bundle.tarball import Unpacked
from servegrid.errors import BundleError, RecordError, ServegridError
from servegrid.records import parquet
from servegrid.study.config import study_of
from servegrid.study.grid import Study, Trial

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
_LISTED = 10
_SHOWN = 400


@dataclass(frozen=True)
class Check:
    """One check: what it found, and for FAIL the culprits, each with its file or trial."""

    name: str
    status: str
    found: str
    culprits: Sequence[str] = ()

    def told(self) -> str:
        """As lines: the status, the name, what was found, and up to ten culprits below."""
        lines = [f"{self.status}  {self.name:<13} {_printable(self.found)}"]
        lines += [f"      {_printable(each)}" for each in self.culprits[:_LISTED]]
        if len(self.culprits) > _LISTED:
            lines.append(f"      … and {len(self.culprits) - _LISTED} more")
        return "\n".join(lines)


def verify(archive: Path) -> list[Check]:
    """All checks of a bundle, in order. It is unpacked into a temporary folder that goes again.

    Raises BundleError where `archive` cannot be read at all; one that is not safe to unpack
    fails its first check, and the others are skipped.
    """
    if not archive.is_file():
        raise BundleError(f"{archive}: there is no such file.")
    with tempfile.TemporaryDirectory(prefix="servegrid-") as temporary:
        tree, again = Path(temporary) / "tree", Path(temporary) / "again"
        tree.mkdir()
        try:
            unpacked = tarball.unpack(archive, tree)
        except BundleError as error:
            reason = "what cannot be unpacked safely is not looked at"
            rest = [Check(name, SKIP, reason) for name in CHECKS if name != "integrity"]
            return [Check("integrity", FAIL, "not safe, or no bundle", [str(error)]), *rest]
        bundle = Bundle(tree, unpacked, again)
        with limited_memory():
            return [_checked(name, check, bundle) for name, check in CHECKS.items()]


@dataclass(frozen=True)
class Bundle:
    """An unpacked bundle, and what its checks share, each computed when it is asked for."""

    tree: Path
    unpacked: Unpacked
    again: Path
    """A folder for what is derived again."""

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts = read_json(self.tree / BUNDLE)
        if facts.get("format") != BUNDLE_FORMAT:
            raise BundleError(
                f"{BUNDLE}: the bundle's format is {facts.get('format')!r}, this version of "
                f"servegrid reads {BUNDLE_FORMAT}."
            )
        return facts

    @cached_property
    def config(self) -> dict[str, Any]:
        config = read_json(self.tree / CONFIGURATION, CONFIGURATION_BYTES)
        refuse_huge_study(config)
        return config

    @cached_property
    def study(self) -> Study:
        return study_of(self.config, [CONFIGURATION])

    @cached_property
    def ground(self) -> Ground:
        """What tables and figures are derived from, found safe to be read."""
        refuse_unplain_yaml(self.tree / HARDWARE)
        return Ground(self.config, self.tree / CELLS, self.tree / HARDWARE, *self.derived)

    @cached_property
    def missing(self) -> dict[str, str]:
        missing: dict[str, str] = self.facts["missing"]
        return missing

    @cached_property
    def derived(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The cells and sentinels, from the records that are there by the bundle's word."""
        for trial in self.study.measured:
            for name in RECORDS:
                refuse_huge_table(self.tree / CELLS / trial.id / name)
        trials, drift_checks = (
            tuple(each for each in group if each.id not in self.missing)
            for group in (self.study.trials, self.study.drift_checks)
        )
        try:
            return cells_of(Study(self.study.name, trials, drift_checks), self.tree / CELLS)
        except RecordError as error:
            # The first line and the last ones say what to do where the study is measured.
            culprits = [line.strip() for line in str(error).splitlines() if line[:2] == "  "]
            told = [each for each in culprits if not each.startswith("rm -r ")]
            raise BundleError("\n".join(told)) from error

    @cached_property
    def tables(self) -> Path:
        """The folder of the tables that follow from the records."""
        write_tables(self.ground, self.again / "tables")
        return self.again / "tables"

    @cached_property
    def shipped(self) -> pd.DataFrame:
        """The bundle's own table of cells."""
        path = self.tree / TABLES / "cells.parquet"
        refuse_huge_table(path)
        try:
            rows = pq.read_metadata(path).num_rows
            if rows != len(self.study.trials):
                raise BundleError(
                    f"{TABLES}/{path.name}: has {rows} rows, the study {len(self.study.trials)} "
                    "trials."
                )
            return tables.read_cells(path)
        except (OSError, pa.ArrowException) as error:
            raise BundleError(f"{TABLES}/{path.name}: cannot be read ({error}).") from error


def _integrity(bundle: Bundle) -> Check:
    culprits = culprits_of(bundle.tree, bundle.unpacked)
    files = len(bundle.unpacked.sha256)
    if culprits:
        return Check("integrity", FAIL, f"of {files} files", culprits)
    return Check("integrity", PASS, f"{files} files, each as {MANIFEST} and {crate.CRATE} have it")


def _completeness(bundle: Bundle) -> Check:
    wanted = {trial.id: trial for trial in bundle.study.measured}
    present = {
        path.relative_to(bundle.tree / CELLS).parent.as_posix()
        for path in (bundle.tree / CELLS).rglob("*")
        if path.is_file()
    }
    culprits = [f"{trial}: is no trial of the study" for trial in sorted(present - wanted.keys())]
    for trial in wanted.values():
        culprits += _trial_culprits(bundle, trial, trial.id in present)
    culprits += [
        f"{each}: is told to be missing, but is no trial of the study"
        for each in sorted(bundle.missing.keys() - wanted.keys())
    ]
    if bundle.facts["partial"] != bool(bundle.missing):
        culprits.append(f"{BUNDLE}: `partial` contradicts `missing`")
    told = f"{len(wanted) - len(bundle.missing)} of {len(wanted)} trials"
    if culprits:
        return Check("completeness", FAIL, told, culprits)
    if bundle.missing:
        missing = [f"{trial}: {why}" for trial, why in sorted(bundle.missing.items())]
        return Check("completeness", PASS, f"{told}: partial, as it says", missing)
    return Check("completeness", PASS, f"{told}, each once, as the configuration asks")


def _trial_culprits(bundle: Bundle, trial: Trial, present: bool) -> list[str]:
    if trial.id in bundle.missing:
        return [f"{trial.id}: is told to be missing, and is there"] if present else []
    if not present:
        return [f"{trial.id}: is missing, and the bundle does not say so"]
    culprits = []
    for name in RECORDS:
        path = bundle.tree / CELLS / trial.id / name
        if not path.exists():
            culprits.append(f"{trial.id}: {name} is missing")
            continue
        try:
            record = parquet.read_record(path)
        except RecordError:
            culprits.append(f"{trial.id}: {name} is damaged")
            continue
        if record.get("spec_digest") != trial.digest or record.get("spec") != trial.spec:
            culprits.append(f"{trial.id}: {name} is of another specification")
    extra = {each.name for each in (bundle.tree / CELLS / trial.id).iterdir()} - {*RECORDS}
    return culprits + [f"{trial.id}: {name} does not belong there" for name in sorted(extra)]


def _validity(bundle: Bundle) -> Check:
    cells, _ = bundle.derived
    if bundle.missing:
        told = f"{len(cells)} trials can be judged; a partial bundle has no table to compare with"
        return Check("validity", SKIP, told)
    rows = _by_digest(cells)
    shipped, found = (
        {digest: _validity_of(row) for digest, row in _by_digest(table).items()}
        for table in (bundle.shipped, cells)
    )
    culprits = [
        f"{of_cell(row)}: {shipped[digest]} in the table, {found[digest]} by its records"
        for digest, row in rows.items()
        if digest in shipped and shipped[digest] != found[digest]
    ]
    culprits += [
        f"{of_cell(row)}: is not in the table"
        for digest, row in rows.items()
        if digest not in shipped
    ]
    if culprits:
        return Check("validity", FAIL, f"of {len(cells)} trials", culprits)
    valid = int(cells["valid"].eq(True).sum())
    return Check("validity", PASS, f"{len(cells)} trials, {valid} of them valid, by their records")


def _tables(bundle: Bundle) -> Check:
    if bundle.missing:
        return _without_derived(bundle, "tables", TABLES)
    names = tarball.names_below(bundle.tables)
    for name in names:
        if name.endswith(".parquet"):
            refuse_huge_table(bundle.tree / TABLES / name)
    culprits = [
        f"{TABLES}/{name}: {each}"
        for name in names
        for each in between_files(bundle.tree / TABLES / name, bundle.tables / name)
    ]
    others = sorted({*tarball.names_below(bundle.tree / TABLES)} - {*names})
    also = f"; not derived again: {', '.join(others)}" if others else ""
    if bundle.facts["servegrid"] != __version__:
        also += f"; made by servegrid {bundle.facts['servegrid']}, checked by {__version__}"
    if culprits:
        return Check("tables", FAIL, f"of {len(names)} derived again{also}", culprits)
    return Check("tables", PASS, f"{len(names)} derived again from the records{also}")


def _figures(bundle: Bundle) -> Check:
    if bundle.missing:
        return _without_derived(bundle, "figures", *FIGURES)
    here, there = analysis_environment(), bundle.facts["analysis"]
    other = [
        f"{name} {there.get(name)}, here {here[name]}"
        for name in here
        if here[name] != there.get(name)
    ]
    if other:
        return Check("figures", SKIP, f"made with {'; '.join(other)}: bytes may differ")
    write_figures(bundle.ground, bundle.tables, bundle.again)
    names = [
        f"{folder}/{name}"
        for folder in FIGURES
        for name in tarball.names_below(bundle.again / Path(folder).name)
    ]
    culprits = []
    for name in names:
        path, own = bundle.tree / name, bundle.again / Path(name).relative_to("results")
        if not path.exists():
            culprits.append(f"{name}: is missing")
        elif not filecmp.cmp(path, own, shallow=False):
            culprits.append(f"{name}: is not what follows from the records")
    others = sorted(
        {
            f"{folder}/{name}"
            for folder in FIGURES
            for name in tarball.names_below(bundle.tree / folder)
        }
        - {*names}
    )
    also = f"; not made again: {', '.join(others)}" if others else ""
    if culprits:
        return Check("figures", FAIL, f"of {len(names)} made again{also}", culprits)
    return Check(
        "figures", PASS, f"{len(names)}, the page among them, made again byte for byte{also}"
    )


def _without_derived(bundle: Bundle, name: str, *folders: str) -> Check:
    present = [each for each in folders if tarball.names_below(bundle.tree / each)]
    if present:
        return Check(name, FAIL, "", [f"{each}: a partial bundle has none" for each in present])
    return Check(name, SKIP, "a partial bundle has none")


def _secrets(bundle: Bundle) -> Check:
    found = list(findings(bundle.tree))
    if found:
        return Check("secrets", FAIL, "what must not leave a site", found)
    return Check("secrets", PASS, "no key, token or user's path is found")


CHECKS: Mapping[str, Callable[[Bundle], Check]] = {
    "integrity": _integrity,
    "completeness": _completeness,
    "validity": _validity,
    "tables": _tables,
    "figures": _figures,
    "secrets": _secrets,
}


def _printable(text: str) -> str:
    """`text` as a terminal may get it: what a bundle says must not move its cursor."""
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _checked(name: str, check: Callable[[Bundle], Check], bundle: Bundle) -> Check:
    try:
        return check(bundle)
    except ServegridError as error:
        return Check(name, FAIL, "cannot be checked", str(error).splitlines())
    except Exception as error:  # whatever a hostile file brings about is its fault, not ours
        return Check(name, FAIL, "cannot be checked", [f"{type(error).__name__}: {error}"])


def _by_digest(table: pd.DataFrame) -> dict[str, dict[Hashable, Any]]:
    return {str(row["spec_digest"]): row for row in table.to_dict("records")}


def _validity_of(row: Mapping[Any, Any]) -> str:
    if pd.isna(row["valid"]):
        return "not served"
    if row["valid"]:
        return "valid"
    return f"not valid ({', '.join(row['invalid_rules'])})"
