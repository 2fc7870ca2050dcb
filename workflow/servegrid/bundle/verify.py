"""Checks that a bundle is complete and that its tables follow from its records.

Runs no code from the bundle. The checks are analysis reproduction: they prove that the bundle
agrees with itself, not that a new measurement would agree, nor that the records are honest.
"""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid import __version__
from servegrid.bundle import tarball
from servegrid.bundle.check import FAIL, PASS, SKIP, Check
from servegrid.bundle.derive import analysis_environment, write_figures
from servegrid.bundle.diff import describe_row, diff_tables
from servegrid.bundle.integrity import find_integrity_problems
from servegrid.bundle.layout import (
    CELLS,
    CRATE,
    FIGURES,
    MANIFEST,
    METADATA,
    RECORDS,
    TABLES,
)
from servegrid.bundle.limits import check_table_size, limited_memory
from servegrid.bundle.progress import Report, report_nothing
from servegrid.bundle.secrets import scan_tree
from servegrid.bundle.unpacked import UnpackedBundle
from servegrid.errors import BundleError, RecordError, ServegridError
from servegrid.records import parquet
from servegrid.study.grid import Trial


def verify(archive: Path, report: Report = report_nothing) -> list[Check]:
    """All checks of a bundle, in order. It is unpacked into a temporary folder.

    Raises BundleError if `archive` does not exist. If it is not safe to unpack, the first check
    fails and the others are skipped.
    """
    tarball.check_is_file(archive)
    steps = ["unpack", *CHECKS]
    with tempfile.TemporaryDirectory(prefix="servegrid-") as temporary:
        tree, scratch = Path(temporary) / "tree", Path(temporary) / "scratch"
        tree.mkdir()
        report(steps[0], 0, len(steps))
        try:
            unpacked = tarball.unpack_archive(archive, tree)
        except BundleError as error:
            reason = "the bundle could not be unpacked safely"
            skipped = [Check(name, SKIP, reason) for name in CHECKS if name != "integrity"]
            summary = "not safe to unpack, or not a bundle"
            return [Check("integrity", FAIL, summary, [str(error)]), *skipped]
        bundle = UnpackedBundle(tree, unpacked, scratch)
        checks = []
        with limited_memory():
            for done, (name, check) in enumerate(CHECKS.items(), 1):
                report(name, done, len(steps))
                checks.append(_run(name, check, bundle))
        return checks


def _check_integrity(bundle: UnpackedBundle) -> Check:
    problems = find_integrity_problems(bundle.tree, bundle.archive)
    files = len(bundle.archive.sha256)
    if problems:
        return Check("integrity", FAIL, f"of {files} files", problems)
    return Check("integrity", PASS, f"{files} files agree with {MANIFEST} and {CRATE}")


def _check_completeness(bundle: UnpackedBundle) -> Check:
    expected = {trial.id: trial for trial in bundle.study.all_trials}
    present = {
        path.relative_to(bundle.tree / CELLS).parent.as_posix()
        for path in (bundle.tree / CELLS).rglob("*")
        if path.is_file()
    }
    problems = [
        f"{trial}: is not a trial of the study" for trial in sorted(present - expected.keys())
    ]
    for trial in expected.values():
        problems += _find_trial_problems(bundle, trial, trial.id in present)
    problems += [
        f"{trial}: {METADATA} lists it as missing, but it is not a trial of the study"
        for trial in sorted(bundle.missing.keys() - expected.keys())
    ]
    if bundle.metadata["partial"] != bool(bundle.missing):
        problems.append(f"{METADATA}: `partial` contradicts `missing`")
    count = f"{len(expected) - len(bundle.missing)} of {len(expected)} trials"
    if problems:
        return Check("completeness", FAIL, count, problems)
    if bundle.missing:
        missing = [f"{trial}: {reason}" for trial, reason in sorted(bundle.missing.items())]
        return Check("completeness", PASS, f"{count}; the bundle says that it is partial", missing)
    return Check("completeness", PASS, f"{count}, as the configuration describes them")


def _find_trial_problems(bundle: UnpackedBundle, trial: Trial, present: bool) -> list[str]:
    if trial.id in bundle.missing:
        problem = f"{trial.id}: {METADATA} lists it as missing, but it is present"
        return [problem] if present else []
    if not present:
        return [f"{trial.id}: is missing, and {METADATA} does not list it"]
    problems = []
    for name in RECORDS:
        path = bundle.tree / CELLS / trial.id / name
        if not path.exists():
            problems.append(f"{trial.id}: {name} is missing")
            continue
        try:
            record = parquet.read_record(path)
        except RecordError:
            problems.append(f"{trial.id}: {name} is damaged")
            continue
        if record.get("spec_digest") != trial.digest or record.get("spec") != trial.spec:
            problems.append(f"{trial.id}: {name} has a different specification")
    return problems


def _check_validity(bundle: UnpackedBundle) -> Check:
    cells, _ = bundle.derived_cells
    if bundle.missing:
        summary = "a partial bundle has no table of cells to compare with"
        return Check("validity", SKIP, summary)
    rows = _by_digest(cells)
    shipped, derived = (
        {digest: _describe_validity(row) for digest, row in _by_digest(table).items()}
        for table in (bundle.shipped_cells, cells)
    )
    problems = [
        f"{describe_row(row)}: {shipped[digest]} in the table, {derived[digest]} in its records"
        for digest, row in rows.items()
        if digest in shipped and shipped[digest] != derived[digest]
    ]
    problems += [
        f"{describe_row(row)}: is not in the table"
        for digest, row in rows.items()
        if digest not in shipped
    ]
    if problems:
        return Check("validity", FAIL, f"of {len(cells)} trials", problems)
    valid = int(cells["valid"].eq(True).sum())
    return Check("validity", PASS, f"{len(cells)} trials, {valid} valid; table and records agree")


def _check_tables(bundle: UnpackedBundle) -> Check:
    if bundle.missing:
        return _check_absence(bundle, "tables", TABLES)
    names = tarball.list_files(bundle.derived_tables)
    for name in names:
        if name.endswith(".parquet"):
            check_table_size(bundle.tree / TABLES / name)
    problems = [
        f"{TABLES}/{name}: {difference}"
        for name in names
        for difference in diff_tables(bundle.tree / TABLES / name, bundle.derived_tables / name)
    ]
    unchecked = sorted({*tarball.list_files(bundle.tree / TABLES)} - {*names})
    note = f"; not derived: {', '.join(unchecked)}" if unchecked else ""
    if bundle.metadata["servegrid"] != __version__:
        note += f"; made by servegrid {bundle.metadata['servegrid']}, checked by {__version__}"
    if problems:
        return Check("tables", FAIL, f"of {len(names)} tables{note}", problems)
    return Check("tables", PASS, f"{len(names)} tables follow from the records{note}")


def _check_figures(bundle: UnpackedBundle) -> Check:
    if bundle.missing:
        return _check_absence(bundle, "figures", *FIGURES)
    here, there = analysis_environment(), bundle.metadata["analysis"]
    different = [
        f"{name} {there.get(name)}, here {here[name]}"
        for name in here
        if here[name] != there.get(name)
    ]
    if different:
        summary = f"made with {'; '.join(different)}: the bytes may differ"
        return Check("figures", SKIP, summary)
    write_figures(bundle.inputs, bundle.derived_tables, bundle.scratch)
    names = [
        f"{folder}/{name}"
        for folder in FIGURES
        for name in tarball.list_files(bundle.scratch / Path(folder).name)
    ]
    problems = []
    for name in names:
        shipped, derived = bundle.tree / name, bundle.scratch / Path(name).relative_to("results")
        if not shipped.exists():
            problems.append(f"{name}: is missing")
        elif not filecmp.cmp(shipped, derived, shallow=False):
            problems.append(f"{name}: differs from the figure that the records give")
    present = {
        f"{folder}/{name}"
        for folder in FIGURES
        for name in tarball.list_files(bundle.tree / folder)
    }
    unchecked = sorted(present - {*names})
    note = f"; not drawn: {', '.join(unchecked)}" if unchecked else ""
    if problems:
        return Check("figures", FAIL, f"of {len(names)} files{note}", problems)
    summary = f"{len(names)} files, including the page, are the same when drawn again{note}"
    return Check("figures", PASS, summary)


def _check_absence(bundle: UnpackedBundle, name: str, *folders: str) -> Check:
    """Tables and figures belong to complete studies."""
    present = [folder for folder in folders if tarball.list_files(bundle.tree / folder)]
    if present:
        problems = [f"{folder}: a partial bundle has none" for folder in present]
        return Check(name, FAIL, "", problems)
    return Check(name, SKIP, "a partial bundle has none")


def _check_secrets(bundle: UnpackedBundle) -> Check:
    found = list(scan_tree(bundle.tree))
    if found:
        return Check("secrets", FAIL, "the bundle contains secrets", found)
    return Check("secrets", PASS, "no key, token or path with a user name")


CHECKS: Mapping[str, Callable[[UnpackedBundle], Check]] = {
    "integrity": _check_integrity,
    "completeness": _check_completeness,
    "validity": _check_validity,
    "tables": _check_tables,
    "figures": _check_figures,
    "secrets": _check_secrets,
}


def _run(name: str, check: Callable[[UnpackedBundle], Check], bundle: UnpackedBundle) -> Check:
    try:
        return check(bundle)
    except ServegridError as error:
        return Check(name, FAIL, "cannot be checked", str(error).splitlines())
    except Exception as error:  # a hostile file can cause any exception
        return Check(name, FAIL, "cannot be checked", [f"{type(error).__name__}: {error}"])


def _by_digest(table: pd.DataFrame) -> dict[str, dict[Hashable, Any]]:
    return {str(row["spec_digest"]): row for row in table.to_dict("records")}


def _describe_validity(row: Mapping[Any, Any]) -> str:
    if pd.isna(row["valid"]):
        return "not served"
    if row["valid"]:
        return "valid"
    broken = zip(row["invalid_rules"], row["invalid_evidence"], strict=True)
    return f"not valid ({'; '.join(f'{rule}: {evidence}' for rule, evidence in broken)})"
