"""Makes the results of a small study without measuring, bundles of it, and tampered bundles."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from servegrid.analysis.tables import gather_study
from servegrid.bundle.derive import AnalysisInputs, write_figures, write_tables
from servegrid.bundle.pack import Sources, pack
from servegrid.records import columns, parquet
from servegrid.study.config import parse_study
from servegrid.study.grid import Trial

HARDWARE = Path(__file__).parents[2] / "config" / "hardware.yaml"
HOST = "sirocco14.site.example"
USER = "amarchand"
TOKEN = "hf_" + "a1B2" * 8
STUDY: dict[str, Any] = {
    "study": "small",
    "workload": {"concurrency": [1, 2], "input_len": 31, "output_len": 10, "trials": 2},
    "deployments": [
        {
            "name": "d",
            "model": "m",
            "checkpoint": "org/m",
            "quantization": "q",
            "engine": "vllm",
            "gpu": "cpu",
            "max_model_len": 512,
        }
    ],
}
TRIALS = [f"d/burst-c{level}-i31-o10/trial-{trial}" for level in (1, 2) for trial in (1, 2)]
SECOND_NS = 10**9
STARTED_NS = 1_767_225_600 * SECOND_NS
"""2026-01-01 00:00:00 UTC."""


def make_record(trial: Trial) -> dict[str, Any]:
    """The record of a job on `sirocco14`: a workload that took 2 s on 2026-01-01."""
    return {
        "format": parquet.RECORD_FORMAT,
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "verdict": "ok",
        "verdict_detail": None,
        "engine": {
            "engine": "vllm",
            "version": "0.32.0",
            "engine_args": ["--model", f"/home/{USER}/models/m"],
            "model_files": {"config.json": {"bytes": 3, "sha256": "0" * 64}},
        },
        "client": {
            "window_ns": [0, 2 * SECOND_NS],
            "cpu_s_busiest": 0.1,
            "token_chunks": 2,
            "started_at": "2026-01-01T00:00:00+00:00",
            "clock_offset_after_ns": STARTED_NS,
        },
        "environment": {
            "allocation": "d.1",
            "started": "2026-01-01T00:00:00+00:00",
            "node": HOST,
            "job": {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "sirocco[14-15]"},
            "python": "3.11.7",
            "packages": {"vllm": "0.32.0"},
        },
        "calibration": None,
        "metrics_before": None,
        "metrics_after": None,
    }


def write_trial(folder: Path, trial: Trial) -> None:
    """Write both files of a trial. Each request takes as many seconds as there are users."""
    n = trial.workload.concurrency
    assert n is not None
    request = {
        "request_id": "r",
        "wave": 0,
        "scheduled_ns": 0,
        "sent_ns": 0,
        "first_token_ns": SECOND_NS // 10,
        "token_ns": [SECOND_NS // 10, n * SECOND_NS],
        "chunk_tokens": [1, 9],
        "done_ns": n * SECOND_NS,
        "prompt_tokens": 31,
        "completion_tokens": 10,
        "requested_tokens": 10,
    }
    record = make_record(trial)
    sample = {"time_ns": 5, "device": "engine", "memory_bytes": 10**9}
    parquet.write_table(
        parquet.arrow_table(columns.TELEMETRY, [sample], record),
        folder / trial.id / "telemetry.parquet",
    )
    parquet.write_table(
        parquet.arrow_table(columns.REQUESTS, [request] * n, record),
        folder / trial.id / "requests.parquet",
    )


def write_results(folder: Path, study: Mapping[str, Any] = STUDY) -> None:
    """Write `results/` of the study: cells, tables, figures, logs and an allocation's record."""
    cells = folder / "results" / "cells"
    expanded = parse_study(study)
    for trial in expanded.all_trials:
        write_trial(cells, trial)
    tables = folder / "results" / "tables"
    inputs = AnalysisInputs(study, cells, HARDWARE, *gather_study(expanded, cells))
    write_tables(inputs, tables)
    write_figures(inputs, tables, folder / "results")
    logs = folder / "results" / "logs"
    (logs / "allocations").mkdir(parents=True)
    job = {"JobId": "7", "UserId": f"{USER}(1000)", "NodeList": "sirocco[14-15]"}
    kept = {"name": "d.1", "job_id": "7", "host": "miriel01"}
    allocation = {"allocation": kept, "slurm": job | {"WorkDir": f"/beegfs/{USER}"}}
    (logs / "allocations" / "d.1.7.json").write_text(json.dumps(allocation))
    (logs / "gather.log").write_text(
        f"{HOST}: reads /beegfs/{USER}/x with {TOKEN}\nsirocco15: Authorization: Bearer {TOKEN}\n"
    )


def record_revisions(file: Path, **engine: str) -> None:
    """Add commits to a record, as for a model of the Hugging Face Hub."""
    for path in (file, file.with_name("telemetry.parquet")):
        table, record = pq.read_table(path), parquet.read_record(path)
        changed = record | {"engine": record["engine"] | engine}
        metadata = {parquet.RECORD_KEY: json.dumps(changed, sort_keys=True).encode()}
        parquet.write_table(table.replace_schema_metadata(metadata), path)


def write_sources(folder: Path) -> Path:
    """Write a small repository with a profile."""
    for name in ("Snakefile", "LICENSE", "workflow/rules/all.smk", "workflow/envs/create.sh"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    (folder / "workflow/envs/create.sh").chmod(0o755)
    (folder / "workflow/__pycache__").mkdir()
    (folder / "workflow/__pycache__/x.pyc").write_bytes(b"x")
    profile = folder / "profiles" / "site"
    profile.mkdir(parents=True)
    (profile / "config.yaml").write_text(f"slurm_nodelist: sirocco14\npath: /home/{USER}/x\n")
    return folder


def make_bundle(folder: Path, study: Mapping[str, Any] = STUDY) -> Path:
    """Bundle the results in `folder`; the sources are in `folder / "repository"`."""
    root = folder / "repository"
    if not root.exists():
        write_sources(root)
    return pack(study, Sources(root, HARDWARE, [root / "profiles" / "site"]), folder).archive


def tamper(bundle: Path, folder: Path, change: Callable[[Path], object], rehash: bool) -> Path:
    """A copy of `bundle` after `change`, which gets its root folder.

    With `rehash`, all hashes in the bundle are made to fit, as a forger would do.
    """
    tree = folder / "tampered"
    with tarfile.open(bundle) as tar:
        tar.extractall(tree, filter="data")
    (root,) = tree.iterdir()
    change(root)
    name = root.name
    if rehash:
        name = f"{name.rpartition('-')[0]}-{write_hashes(root)}"
    files = sorted(each for each in root.rglob("*") if each.is_file())
    members = [(f"{name}/{each.relative_to(root).as_posix()}", each.read_bytes()) for each in files]
    return write_tar(folder / f"{name}.tar.gz", *members)


def write_hashes(root: Path) -> str:
    """Write crate and manifest of the files below `root` again; returns the digest for the name."""
    crate_path, manifest_path = root / "ro-crate-metadata.json", root / "manifest-sha256.txt"
    files = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path not in (crate_path, manifest_path)
    }
    crate = json.loads(crate_path.read_text())
    others = [each for each in crate["@graph"] if "sha256" not in each]
    described = [
        {"@id": name, "@type": "File", "contentSize": len(data), "sha256": _sha256(data)}
        for name, data in files.items()
    ]
    crate["@graph"] = others + described
    files["ro-crate-metadata.json"] = json.dumps(crate).encode()
    crate_path.write_bytes(files["ro-crate-metadata.json"])
    manifest = "".join(f"{_sha256(data)}  {name}\n" for name, data in files.items()).encode()
    manifest_path.write_bytes(manifest)
    return _sha256(manifest)[:16]


def change_request(root: Path, trial: str, **values: Any) -> None:
    """Change values of a trial's first request; the record stays."""
    path = root / "results" / "cells" / trial / "requests.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0] |= values
    parquet.write_table(table.from_pylist(rows, schema=table.schema), path)


def write_tar(path: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    """Write a .tar.gz with these members, good or hostile."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tuple):
                name, data = member
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                tar.addfile(member)
    path.write_bytes(gzip.compress(packed.getvalue(), mtime=0))
    return path


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
