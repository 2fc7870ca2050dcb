"""Compares the time to gather records with the time to only read the same files: `make bench`.

The files are those of an artificial study, each as large as that of a real cell. The plain read
reads all columns and does nothing with them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from servegrid.analysis import summary, tables
from servegrid.records import columns, parquet
from servegrid.study.config import parse_study
from servegrid.study.grid import Study, Trial

REQUESTS, TOKENS = 128, 100
MS = 1_000_000
DEPLOYMENT = {
    "model": "m",
    "checkpoint": "m",
    "quantization": "q",
    "engine": "vllm",
    "gpu": "a100-40gb",
    "max_model_len": 100_000,
}


def make_study(cells: int) -> Study:
    """A study of `cells` cells, a hundred per prompt length."""
    lengths = -(-cells // 100)
    study = parse_study(
        {
            "study": "gathered",
            "workload": {
                "protocol": "burst",
                "concurrency": list(range(1, 101)),
                "input_len": list(range(1, lengths + 1)),
                "output_len": TOKENS,
                "drift_checks": False,
            },
            "deployments": [DEPLOYMENT],
        }
    )
    return Study(study.name, study.trials[:cells])


def make_requests(
    rng: np.random.Generator, requests: int = REQUESTS, tokens: int = TOKENS
) -> pa.Table:
    """The requests of one cell, with times as irregular as real ones."""
    gaps = rng.integers(15 * MS, 25 * MS, (requests, tokens))
    arrivals = 10**13 + np.cumsum(gaps, axis=1)
    rows = [
        {
            "request_id": f"{number:032x}",
            "user": number,
            "wave": 0,
            "scheduled_ns": 10**13,
            "sent_ns": 10**13 + 10_000 * number,
            "first_token_ns": int(token_ns[0]),
            "token_ns": token_ns.tolist(),
            "chunk_tokens": [1] * tokens,
            "chunk_tokens_estimated": False,
            "done_ns": int(token_ns[-1]) + 50_000,
            "status": 200,
            "prompt_tokens": 31,
            "completion_tokens": tokens,
            "requested_tokens": tokens,
        }
        for number, token_ns in enumerate(arrivals)
    ]
    return parquet.arrow_table(columns.REQUESTS, rows)


def make_telemetry(samples: int = 100) -> pa.Table:
    """Samples of four GPUs, ten per second."""
    rows = [
        {
            "time_ns": 10**13 + 100 * MS * sample,
            "device": f"GPU-{gpu}",
            "memory_bytes": 30 * 2**30,
            "power_w": 300.0 + gpu,
            "energy_j": 1000.0 + 30 * sample,
        }
        for sample in range(samples)
        for gpu in range(4)
    ]
    return parquet.arrow_table(columns.TELEMETRY, rows)


def make_record(trial: Trial) -> dict[str, Any]:
    packages = {f"package-{number}": "1.2.3" for number in range(180)}
    return {
        "format": parquet.RECORD_FORMAT,
        "servegrid": "0",
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "verdict": "ok",
        "verdict_detail": None,
        "client": {"window_ns": [10**13, 10**13 + 10**10], "cpu_s_busiest": 0.1, "cpu_s": 0.1},
        "engine": {"engine": "vllm", "version": "0", "prefix_caching": False},
        "environment": {"allocation": "a", "started": "then", "packages": packages},
        "calibration": None,
        "metrics_before": {},
        "metrics_after": {},
    }


def write_records(study: Study, folder: Path) -> None:
    """Write the records of all trials. They repeat eight different measurements."""
    rng = np.random.default_rng(0)
    requests, telemetry = [make_requests(rng) for _ in range(8)], make_telemetry()
    for number, trial in enumerate(study.trials):
        write_trial(trial, folder, requests[number % 8], telemetry)


def write_trial(trial: Trial, folder: Path, requests: pa.Table, telemetry: pa.Table) -> None:
    """Write both files of a trial, each with the trial's record."""
    record = {parquet.RECORD_KEY: json.dumps(make_record(trial), sort_keys=True).encode()}
    trial_folder = folder / trial.id
    trial_folder.mkdir(parents=True)
    for name, table in (("requests", requests), ("telemetry", telemetry)):
        parquet.write_table(table.replace_schema_metadata(record), trial_folder / f"{name}.parquet")


def plain_read(study: Study, folder: Path) -> None:
    """Read all columns of all files, with one thread per core."""
    from concurrent.futures import ThreadPoolExecutor

    def read(path: Path) -> int:
        rows: int = pq.read_table(path, use_threads=False).num_rows
        return rows

    files = [
        folder / trial.id / f"{name}.parquet"
        for trial in study.trials
        for name in ("requests", "telemetry")
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        assert sum(pool.map(read, files)) > 0


def gather(study: Study, folder: Path) -> None:
    cells, _ = tables.gather_study(study, folder)
    assert cells["valid"].notna().all()
    started = time.monotonic()
    summary.summarise(cells)
    print(f"summarised in {time.monotonic() - started:.1f} s", file=sys.stderr)


TASKS = {"plain read": plain_read, "gather": gather}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=500, help="number of cells in the study")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    study = make_study(options.cells)
    if options.task:
        started = time.monotonic()
        TASKS[options.task](study, options.folder)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        workers = len(os.sched_getaffinity(0)) if children else 0
        print(json.dumps([time.monotonic() - started, (own + workers * children) / 1024]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(study, folder)
        # The second round overwrites the first: by then the files are in the page cache.
        results = {task: _run(task, options.cells, folder) for task in [*TASKS, *TASKS]}
    read_s = results["plain read"][0]
    print(f"{options.cells} cells of {REQUESTS} requests with {TOKENS} tokens each:")
    for task, (seconds, mib) in results.items():
        ratio = "" if task == "plain read" else f", {seconds / read_s:.1f} × the plain read"
        print(f"  {task:<12}{seconds:6.1f} s, at most {mib:5.0f} MiB{ratio}")


def _run(task: str, cells: int, folder: Path) -> tuple[float, float]:
    """Run one task in a new process. Returns its seconds and MiB."""
    command = [sys.executable, __file__, "--cells", str(cells), "--task", task]
    done = subprocess.run(
        [*command, "--folder", str(folder)], check=True, stdout=subprocess.PIPE, encoding="utf-8"
    )
    seconds, mib = json.loads(done.stdout)
    return seconds, mib


if __name__ == "__main__":
    main()
