"""Packs a study's results into a bundle: collect, redact, describe, write and verify."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servegrid import __version__
from servegrid.bundle import crate, describe, sources, tarball
from servegrid.bundle.check import FAIL
from servegrid.bundle.derive import analysis_environment
from servegrid.bundle.layout import (
    BUNDLE_FORMAT,
    CELLS,
    CONFIGURATION,
    CRATE,
    DERIVED,
    ENVIRONMENTS,
    HARDWARE,
    LOGS,
    MANIFEST,
    METADATA,
    MODELS,
    PATCH,
    README,
    RECORDS,
    SOURCE,
    is_allowed,
    manifest_digest,
)
from servegrid.bundle.progress import Report, report_nothing
from servegrid.bundle.published import published_path
from servegrid.bundle.redact import Redactor
from servegrid.bundle.secrets import check_secrets
from servegrid.bundle.staging import stage, stage_redacted
from servegrid.bundle.verify import CHECKS, verify
from servegrid.errors import BundleError, RecordError
from servegrid.records import parquet
from servegrid.study.config import parse_study
from servegrid.study.deployment import canonical_json
from servegrid.study.grid import Study, Trial
from servegrid.study.recorded_users import resolve_users
from servegrid.study.source_files import (
    BUNDLED,
    bundled_name,
    resolve_sources,
    with_bundled_paths,
)

BUNDLE_LOG = "results/logs/bundle.log"
"""The log of packing itself. It is still being written, so it is not in the bundle."""
STEPS = ("read records", "copy and redact", "look for secrets", "write archive")


@dataclass(frozen=True)
class Sources:
    """What a study was made with: the repository, the file of prices, the profiles."""

    repository: Path
    hardware: Path
    profiles: Sequence[Path] = ()


@dataclass(frozen=True)
class PackedBundle:
    """The archive, and how much of the study is in it."""

    archive: Path
    trials: int
    missing: int
    allocations_without_record: Sequence[str]
    """Allocations that are still active, or whose record was deleted."""

    def format(self) -> str:
        """Lines for people."""
        lines = [f"{self.archive}: {self.trials - self.missing} of {self.trials} trials"]
        if self.allocations_without_record:
            names = ", ".join(self.allocations_without_record)
            lines.append(
                f"The records of these allocations are not in the bundle: {names}. To add them, "
                "run the same command again when the allocations have ended."
            )
        return "\n".join(lines)


def pack(
    config: Mapping[str, Any],
    made_with: Sources,
    folder: Path,
    users: Sequence[str] = (),
    report: Report = report_nothing,
) -> PackedBundle:
    """Write `results/bundles/<study>-<digest>.tar.gz` below `folder`.

    `folder` has the `results/` of the study `config`. `users` are login names to redact, in
    addition to those in the results. If trials are missing, the bundle's name contains `partial`,
    and tables and figures, which belong to complete studies, are left out.

    Raises BundleError if nothing was measured, if a secret cannot be redacted, or if the bundle
    does not pass `verify`.
    """
    steps = len(STEPS) + 1 + len(CHECKS)
    report(STEPS[0], 0, steps)
    study = parse_study(config)
    records, missing = _read_records(study, folder / CELLS)
    if not records:
        raise BundleError(
            f"{folder / CELLS}: contains no trial of the study `{study.name}`. Measure it first."
        )
    allocations = list(_read_allocations(folder))
    without_record = _find_allocations_without_record(records.values(), allocations)
    redactor = Redactor.from_documents([*records.values(), *allocations], users)
    bundles = folder / "results" / "bundles"
    parquet.check_writable(bundles)
    with tempfile.TemporaryDirectory(prefix=".", dir=bundles) as temporary:
        tree = Path(temporary)
        report(STEPS[1], 1, steps)
        _stage_results(tree, folder, records, bool(missing), redactor)
        source = _stage_sources(tree, made_with, redactor)
        metadata = {
            "format": BUNDLE_FORMAT,
            "study": study.name,
            "servegrid": __version__,
            "source": source,
            "analysis": analysis_environment(),
            "partial": bool(missing),
            "missing": missing,
            "allocations_without_record": without_record,
        }
        redacted = {trial: redactor.redact_data(record) for trial, record in records.items()}
        for name, data in (
            (CONFIGURATION, _stage_files(tree, config, folder)),
            (METADATA, metadata),
            (ENVIRONMENTS, describe.describe_environments(redacted)),
            (MODELS, describe.describe_models(study, redacted)),
        ):
            stage(f"{canonical_json(data)}\n".encode(), tree / name)
        stage(describe.render_readme(study, len(missing)).encode(), tree / README)
        report(STEPS[2], 2, steps)
        check_secrets(tree, redactor)
        report(STEPS[3], 3, steps)
        digest = _write_manifest(tree, study, redacted, sorted(missing))
        name = f"{study.name}-partial-{digest}" if missing else f"{study.name}-{digest}"
        archive = bundles / f"{name}.tar.gz"
        tarball.write_archive(tree, name, archive)
    _check_verifies(
        archive, lambda step, done, _: report(f"verify {step}", len(STEPS) + done, steps)
    )
    return PackedBundle(archive, len(study.all_trials), len(missing), without_record)


def _read_records(study: Study, folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The records of the trials, and why the other trials have none."""
    found = {trial.id: _read_record(trial, folder) for trial in study.all_trials}
    records = {trial: record for trial, record in found.items() if isinstance(record, dict)}
    missing = {trial: reason for trial, reason in found.items() if isinstance(reason, str)}
    return records, missing


def _read_record(trial: Trial, folder: Path) -> dict[str, Any] | str:
    """The trial's record, or why it has none."""
    requests, telemetry = (folder / trial.id / name for name in RECORDS)
    if not requests.exists():
        return "not measured"
    try:
        record, other = parquet.read_record(requests), parquet.read_record(telemetry)
    except RecordError:
        return "its record is incomplete or damaged"
    if record.get("spec_digest") != trial.digest:
        return "measured with a different specification"
    return record if record == other else "its two files are from different measurements"


def _read_allocations(folder: Path) -> Iterator[Any]:
    """The records of allocations: Slurm's and the executor's."""
    for path in sorted((folder / LOGS / "allocations").glob("*.json")):
        try:
            yield json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BundleError(f"{path}: is not JSON ({error}). Delete it.") from error


def _find_allocations_without_record(
    records: Iterable[Mapping[str, Any]], allocations: Iterable[Any]
) -> list[str]:
    """Allocations that measured a trial but have no record, because they are still active."""
    recorded = {
        (each["allocation"].get("name"), each["allocation"].get("job_id")) for each in allocations
    }
    names = {name for name, _ in recorded}
    missing = set()
    for environment in (record["environment"] for record in records):
        name, job = environment.get("allocation"), environment.get("job", {}).get("SLURM_JOB_ID")
        is_recorded = (name, job) in recorded if job else name in names
        if name is not None and not is_recorded:
            missing.add(f"{name}, job {job}" if job else str(name))
    return sorted(missing)


def _stage_results(
    tree: Path, folder: Path, trials: Iterable[str], partial: bool, redactor: Redactor
) -> None:
    """Copy the records of `trials`, the logs, and, unless `partial`, tables and figures.

    Files that nothing of servegrid writes, such as an editor's backups, are left out.
    """
    names = [f"{CELLS}/{trial}/{file}" for trial in trials for file in RECORDS]
    for part in (LOGS,) if partial else (LOGS, *DERIVED):
        found = [f"{part}/{name}" for name in tarball.list_files(folder / part)]
        names += [name for name in found if name != BUNDLE_LOG and is_allowed(name)]
    tarball.check_limits([folder / name for name in names])
    for name in names:
        stage_redacted(folder / name, tree / name, redactor, name.startswith(LOGS))


def _stage_sources(tree: Path, made_with: Sources, redactor: Redactor) -> dict[str, Any]:
    """Copy workflow, prices and profiles. Returns the commit; changes to it become a patch."""
    for name, path in sources.list_source_files(made_with.repository):
        stage(path.read_bytes(), tree / SOURCE / name)
    stage(made_with.hardware.read_bytes(), tree / HARDWARE)
    for profile in made_with.profiles:
        for name, path in sources.list_profile_files(profile):
            stage_redacted(path, tree / SOURCE / name, redactor, True)
    source, patch = sources.describe_commit(made_with.repository)
    if patch:
        stage(redactor.redact_text(patch).encode(), tree / PATCH)
    return source


def _stage_files(tree: Path, config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Copy the files that a bundle may have; the bundle's configuration.

    These are the CSV file of published data, if the study names one, and files of workloads with
    `in_bundle`. Of other files of workloads, and of the file of the capacity plan's users, the
    configuration has only the facts.
    """
    resolved, _ = resolve_sources(resolve_users(config))
    for entry in resolved["deployments"]:
        source = entry.get("workload", {}).get("source", {})
        if "path" in source and source.get("in_bundle"):
            (tree / BUNDLED).mkdir(exist_ok=True)
            shutil.copyfile(source["path"], tree / bundled_name(source))
    config = with_bundled_paths(resolved)
    name = published_path(config)
    if name is None:
        return config
    file = folder / str(config["published"])
    try:
        stage(file.read_bytes(), tree / name)
    except OSError as error:
        raise BundleError(
            f"{file}: cannot be read ({error.strerror}). Correct `published` in the study."
        ) from error
    return {**config, "published": name}


def _write_manifest(
    tree: Path, study: Study, records: describe.Records, missing: Sequence[str]
) -> str:
    """Write the crate and the manifest, and return the manifest's digest."""
    started, ended = describe.find_times(records.values())
    run = crate.RunFacts(study.name, __version__, CONFIGURATION, started, ended, missing)
    files = [_describe_file(tree, name) for name in tarball.list_files(tree)]
    data = crate.build_crate(run, files, [MANIFEST])
    stage((json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode(), tree / CRATE)
    files = [_describe_file(tree, name) for name in tarball.list_files(tree)]
    manifest = "".join(f"{file.sha256}  {file.name}\n" for file in files).encode()
    stage(manifest, tree / MANIFEST)
    return manifest_digest(manifest)


def _describe_file(tree: Path, name: str) -> crate.CrateFile:
    with (tree / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return crate.CrateFile(name, (tree / name).stat().st_size, digest)


def _check_verifies(archive: Path, report: Report) -> None:
    """Delete the archive and raise BundleError if it does not pass `verify`."""
    failed = [check for check in verify(archive, report) if check.status == FAIL]
    if failed:
        archive.unlink()
        checks = "\n".join(check.format() for check in failed)
        raise BundleError(
            f"{archive}: was not written, because it fails `servegrid verify`:\n{checks}\n"
            "If tables or figures are older than the records, delete results/tables, "
            "results/plots and results/report and run the same command again. It derives them "
            "again and measures nothing."
        )
