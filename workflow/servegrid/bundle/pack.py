"""From a study's results to a bundle: collected, redacted, described, written, verified."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from servegrid import __version__
from servegrid.bundle import crate, sources, tarball
from servegrid.bundle.derive import analysis_environment
from servegrid.bundle.layout import (
    BUNDLE,
    BUNDLE_FORMAT,
    CELLS,
    CONFIGURATION,
    DERIVED,
    ENVIRONMENTS,
    FIGURES,
    HARDWARE,
    LOGS,
    MANIFEST,
    MODELS,
    PATCH,
    RECORDS,
    TABLES,
    manifest_digest,
)
from servegrid.bundle.redact import Redactor
from servegrid.bundle.secrets import is_text, refuse_secrets
from servegrid.bundle.verify import FAIL, verify
from servegrid.errors import BundleError, RecordError
from servegrid.records import parquet
from servegrid.study.config import study_of
from servegrid.study.grid import Study, Trial, canonical

OWN_LOG = "results/logs/bundle.log"
"""It is written while the bundle is made, and is not part of it."""


@dataclass(frozen=True)
class Origin:
    """Where the results come from beside the records: the repository, and the profiles used."""

    root: Path
    hardware: Path
    """The file of prices that the capacity plan was made with."""
    profiles: Sequence[Path] = ()


@dataclass(frozen=True)
class Packed:
    """The archive that was made, and how much of the study is in it."""

    archive: Path
    trials: int
    missing: int
    without_record: Sequence[str]
    """Allocations that are not over yet, or whose record was removed."""

    def told(self) -> str:
        """As lines for people."""
        lines = [f"{self.archive}: {self.trials - self.missing} of {self.trials} trials"]
        if self.without_record:
            names = ", ".join(self.without_record)
            lines.append(
                f"Without the records of these allocations: {names}. Once they have ended, the "
                "same command makes a bundle that has them."
            )
        return "\n".join(lines)


def pack(
    config: Mapping[str, Any], origin: Origin, folder: Path, users: Sequence[str] = ()
) -> Packed:
    """Write `results/bundles/<study>-<digest>.tar.gz` below `folder`.

    `folder` has `results/` of the study that `config` describes; `users` are login names that
    are redacted beside those that the results name. Where trials are missing the name says
    `partial`, and tables and figures, which are of complete studies, are left out.
    Raises BundleError where nothing is measured, where something that must not leave the site
    stands where it cannot be redacted, or where `verify` finds the bundle wanting.
    """
    study = study_of(config)
    found = {trial.id: _record_or_error(trial, folder / CELLS) for trial in study.measured}
    known = {trial: each for trial, each in found.items() if isinstance(each, dict)}
    missing = {trial: each for trial, each in found.items() if isinstance(each, str)}
    if not known:
        raise BundleError(f"{folder / CELLS}: no trial of the study `{study.name}` is there.")
    jobs = list(_allocations(folder))
    without_record = _without_record(known.values(), jobs)
    redactor = Redactor.of([*known.values(), *jobs], users)
    bundles = folder / "results" / "bundles"
    parquet.refuse_unwritable(bundles)
    with tempfile.TemporaryDirectory(prefix=".", dir=bundles) as temporary:
        tree = Path(temporary)
        for name, path in _collected(folder, known, bool(missing)):
            _stage_redacted(path, tree / name, redactor, name.startswith(LOGS))
        for name, path in sources.files(origin.root):
            _stage(path.read_bytes(), tree / name, path.stat().st_mode)
        _stage(origin.hardware.read_bytes(), tree / HARDWARE)
        for each in origin.profiles:
            for name, path in sources.profile_files(each):
                _stage_redacted(path, tree / name, redactor, True)
        source, patch = sources.commit(origin.root)
        if patch:
            _stage(redactor.text(patch).encode(), tree / PATCH)
        facts = {
            "format": BUNDLE_FORMAT,
            "study": study.name,
            "servegrid": __version__,
            "source": source,
            "analysis": analysis_environment(),
            "partial": bool(missing),
            "missing": missing,
            "allocations_without_record": without_record,
        }
        told: dict[str, Any] = {name: redactor.data(each) for name, each in known.items()}
        for name, data in (
            (CONFIGURATION, config),
            (BUNDLE, facts),
            (ENVIRONMENTS, _environments(told)),
            (MODELS, _models(study, told)),
        ):
            _stage(f"{canonical(data)}\n".encode(), tree / name)
        _stage(_readme(study, len(missing)).encode(), tree / crate.README)
        refuse_secrets(tree, redactor)
        digest = _describe(tree, study, told, sorted(missing))
        name = f"{study.name}-partial-{digest}" if missing else f"{study.name}-{digest}"
        archive = bundles / f"{name}.tar.gz"
        tarball.write(tree, name, archive)
    _refuse_unverified(archive)
    return Packed(archive, len(study.measured), len(missing), without_record)


def _record_or_error(trial: Trial, folder: Path) -> dict[str, Any] | str:
    """The trial's record, or why it has none."""
    place = folder / trial.id
    if not (place / "requests.parquet").exists():
        return "not measured"
    try:
        record = parquet.read_record(place / "requests.parquet")
        same = parquet.read_record(place / "telemetry.parquet")
    except RecordError:
        return "its record is missing in part, or damaged"
    if record.get("spec_digest") != trial.digest:
        return "measured with another specification"
    return record if same == record else "its two files are of two measurements"


def _allocations(folder: Path) -> Iterator[Any]:
    """Slurm's records of the jobs, and ours."""
    for path in sorted((folder / LOGS / "allocations").glob("*.json")):
        try:
            yield json.loads(path.read_text())
        except ValueError as error:
            raise BundleError(f"{path}: is not JSON ({error}). Remove it.") from error


def _without_record(told: Iterable[Mapping[str, Any]], jobs: Iterable[Any]) -> list[str]:
    """The allocations that measured something and left no record, as those still up do."""
    kept = {(each["allocation"].get("name"), each["allocation"].get("job_id")) for each in jobs}
    names = {name for name, _ in kept}
    lacking = set()
    for environment in (record["environment"] for record in told):
        name, job = environment.get("allocation"), environment.get("job", {}).get("SLURM_JOB_ID")
        if name is not None and ((name, job) not in kept if job else name not in names):
            lacking.add(f"{name}, job {job}" if job else str(name))
    return sorted(lacking)


def _collected(
    folder: Path, trials: Mapping[str, Any], partial: bool
) -> Iterator[tuple[str, Path]]:
    """The name and the path of every result that goes into the bundle."""
    for trial in trials:
        for file in RECORDS:
            yield f"{CELLS}/{trial}/{file}", folder / CELLS / trial / file
    for part in (LOGS,) if partial else (LOGS, *DERIVED):
        for name in tarball.names_below(folder / part):
            hidden = any(each.startswith(".") for each in name.split("/"))
            if f"{part}/{name}" != OWN_LOG and not hidden:
                yield f"{part}/{name}", folder / part / name


def _stage(data: bytes, path: Path, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o755 if mode & 0o100 else 0o644)


def _stage_redacted(path: Path, place: Path, redactor: Redactor, of_site: bool) -> None:
    """Copy a file, redacted as far as it is text or Parquet; of the site's, JSON by its keys."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        _stage_parquet(path, place, redactor)
        return
    try:
        text = data.decode("utf-8", "replace" if of_site else "strict")
        if of_site and path.suffix == ".json":
            data = (json.dumps(redactor.data(json.loads(text)), indent=2) + "\n").encode()
        else:
            data = redactor.text(text).encode()
    except ValueError:  # an image, say
        pass
    _stage(data, place)


def _stage_parquet(path: Path, place: Path, redactor: Redactor) -> None:
    """Copy a table; it is written anew where its record or its strings are redacted."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read()
    redacted = table
    for position, field in enumerate(table.schema):
        if is_text(field.type):
            texts = table.column(position).to_pylist()
            told = [text and redactor.text(text) for text in texts]
            if told != texts:
                redacted = redacted.set_column(position, field, pa.array(told, field.type))
    metadata = dict(table.schema.metadata or {})
    if parquet.RECORD_KEY in metadata:
        record = redactor.data(json.loads(metadata[parquet.RECORD_KEY]))
        metadata[parquet.RECORD_KEY] = json.dumps(record, sort_keys=True).encode()
        redacted = redacted.replace_schema_metadata(metadata)
    if redacted.equals(table, check_metadata=True):
        _stage(path.read_bytes(), place)
    else:
        parquet.write(redacted, place)


def _environments(told: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each distinct environment that jobs saw, with the bring-ups that were in it."""
    found: dict[str, dict[str, Any]] = {}
    for trial, record in told.items():
        environment = dict(record["environment"])
        own = {key: environment.pop(key, None) for key in ("allocation", "started", "job")}
        own |= {"deployment": trial.partition("/")[0], "engine": record["engine"]}
        entry = found.setdefault(
            canonical(environment), {"environment": environment, "bring_ups": []}
        )
        if own not in entry["bring_ups"]:
            entry["bring_ups"].append(own)
    return list(found.values())


def _models(study: Study, told: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each deployment served, as far as its records say: null where they do not."""
    engines = {trial.partition("/")[0]: record["engine"] for trial, record in told.items()}
    return {
        each.name: {
            "model": each.model,
            "checkpoint": each.checkpoint,
            "tokenizer": each.tokenizer,
            "quantization": each.quantization,
            "revision": engines.get(each.name, {}).get("revision"),
            "files": engines.get(each.name, {}).get("model_files"),
        }
        for each in study.deployments
    }


def _readme(study: Study, missing: int) -> str:
    """What a reader without servegrid needs to know."""
    measured = len(study.measured) - missing
    partial = f"; {missing} are missing, see `missing` in `{BUNDLE}`" if missing else ""
    return f"""# Study {study.name}

Measurements of what language models serve under load, made with servegrid {__version__}:
{measured} of {len(study.measured)} trials{partial}.

| where | what |
|---|---|
| `{CONFIGURATION}`, `{HARDWARE}` | the configuration, as resolved, and prices |
| `{CELLS}/` | the raw records: Parquet, a row per request, and the telemetry |
| `{TABLES}/`, `{FIGURES[0]}/`, `{FIGURES[1]}/` | what was made of them; a partial study has none |
| `{LOGS}/` | logs and Slurm's records of the jobs, redacted |
| `{ENVIRONMENTS}`, `{MODELS}` | what the jobs ran on, and what they served |
| `Snakefile`, `workflow/`, `profiles/` | the workflow and the profile; `{BUNDLE}` has the commit |
| `{MANIFEST}` | the hash of every file: `sha256sum -c {MANIFEST}` |
| `{crate.CRATE}` | the same as a Workflow Run RO-Crate |

`servegrid verify` checks the whole bundle, `servegrid unpack` makes a folder of it in which
the study goes on.
"""


def _describe(
    tree: Path, study: Study, told: Mapping[str, Mapping[str, Any]], missing: Sequence[str]
) -> str:
    """Write the crate and the manifest, and return the digest of the latter."""
    started, ended = _times(told.values())
    run = crate.Run(study.name, __version__, CONFIGURATION, started, ended, missing)
    files = [_file(tree, name) for name in tarball.names_below(tree)]
    data = crate.crate(run, files, [MANIFEST])
    _stage((json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode(), tree / crate.CRATE)
    files = [_file(tree, name) for name in tarball.names_below(tree)]
    manifest = "".join(f"{each.sha256}  {each.name}\n" for each in files).encode()
    _stage(manifest, tree / MANIFEST)
    return manifest_digest(manifest)


def _file(tree: Path, name: str) -> crate.File:
    with (tree / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return crate.File(name, (tree / name).stat().st_size, digest)


def _times(told: Iterable[Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """When the first load began and the last one ended, as far as the records say."""
    clients = [record["client"] for record in told]
    started = [
        datetime.fromisoformat(each["started_at"]) for each in clients if "started_at" in each
    ]
    ended = [
        datetime.fromtimestamp((each["window_ns"][1] + offset) // 10**9, UTC)
        for each in clients
        if (offset := each.get("clock_offset_after_ns")) is not None
    ]
    return _told(min(started, default=None)), _told(max(ended, default=None))


def _told(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="seconds")


def _refuse_unverified(archive: Path) -> None:
    failed = [check for check in verify(archive) if check.status == FAIL]
    if failed:
        archive.unlink()
        told = "\n".join(check.told() for check in failed)
        raise BundleError(
            f"{archive}: was not made, for it would not pass `servegrid verify`:\n{told}\n"
            "Where tables or figures are older than the records, remove results/tables, "
            "results/plots and results/report, and run the same command again: it makes them "
            "anew and measures nothing."
        )
