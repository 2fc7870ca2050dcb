"""How long gathering takes beside a bare scan of the same files: `make bench`.

The files are those of a made-up study, each as large as a real cell's. A bare scan reads what is
in them and does nothing with it.
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
from servegrid.study.config import study_of
from servegrid.study.grid import Study, Trial

REQUESTS, STAMPS = 128, 100
MS = 1_000_000


def study_with(cells: int) -> Study:
    """A study of so many cells, a hundred to each prompt length."""
    lengths = -(-cells // 100)
    whole = study_of(
        {
            "study": "gathered",
            "workload": {
                "protocol": "burst",
                "concurrency": list(range(1, 101)),
                "input_len": list(range(1, lengths + 1)),
                "output_len": STAMPS,
                "drift_checks": False,
            },
            "deployments": [
                {
                    "model": "m",
                    "checkpoint": "m",
                    "quantization": "q",
                    "engine": "vllm",
                    "gpu": "a100-40gb",
                    "max_model_len": 100_000,
                }
            ],
        }
    )
    return Study(whole.name, whole.trials[:cells])


def requests_of(rng: np.random.Generator) -> pa.Table:
    """As many requests as a cell has, with times as irregular as real ones."""
    gaps = rng.integers(15 * MS, 25 * MS, (REQUESTS, STAMPS))
    stamps = 10**13 + np.cumsum(gaps, axis=1)
    rows = [
        {
            "request_id": f"{number:032x}",
            "user": number,
            "wave": 0,
            "scheduled_ns": 10**13,
            "sent_ns": 10**13 + 10_000 * number,
            "first_token_ns": int(own[0]),
            "token_ns": own.tolist(),
            "chunk_tokens": [1] * STAMPS,
            "chunk_tokens_estimated": False,
            "done_ns": int(own[-1]) + 50_000,
            "status": 200,
            "prompt_tokens": 31,
            "completion_tokens": STAMPS,
            "asked_tokens": STAMPS,
        }
        for number, own in enumerate(stamps)
    ]
    return parquet.table_of(columns.REQUESTS, rows)


def telemetry() -> pa.Table:
    """Ten seconds of four GPUs, ten samples a second."""
    rows = [
        {
            "time_ns": 10**13 + 100 * MS * sample,
            "device": f"GPU-{gpu}",
            "memory_bytes": 30 * 2**30,
            "power_w": 300.0 + gpu,
            "energy_j": 1000.0 + 30 * sample,
        }
        for sample in range(100)
        for gpu in range(4)
    ]
    return parquet.table_of(columns.TELEMETRY, rows)


def record_of(trial: Trial) -> dict[str, Any]:
    packages = {f"package-{number}": "1.2.3" for number in range(180)}
    return {
        "format": parquet.RECORD_FORMAT,
        "servegrid": "0",
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "verdict": "ok",
        "reason": None,
        "client": {"window_ns": [10**13, 10**13 + 10**10], "cpu_s_busiest": 0.1, "cpu_s": 0.1},
        "engine": {"engine": "vllm", "version": "0", "prefix_caching": False},
        "environment": {"allocation": "a", "started": "then", "packages": packages},
        "self_check": None,
        "metrics_before": {},
        "metrics_after": {},
    }


def make(study: Study, folder: Path) -> None:
    """Write the records of all trials, of eight different measurements."""
    rng = np.random.default_rng(0)
    measured, samples = [requests_of(rng) for _ in range(8)], telemetry()
    for place, trial in enumerate(study.trials):
        record = {parquet.RECORD_KEY: json.dumps(record_of(trial), sort_keys=True).encode()}
        own = folder / trial.id
        own.mkdir(parents=True)
        for name, table in (("requests", measured[place % 8]), ("telemetry", samples)):
            pq.write_table(
                table.replace_schema_metadata(record),
                own / f"{name}.parquet",
                compression="zstd",
                write_page_checksum=True,
            )


def scan(study: Study, folder: Path) -> None:
    """Read all columns of all files, as many at a time as there are cores."""
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
    cells = tables.gather(study.trials, folder)
    assert cells["valid"].notna().all()
    began = time.monotonic()
    summary.summarise(cells)
    print(f"summarised in {time.monotonic() - began:.1f} s", file=sys.stderr)


WAYS = {"bare scan": scan, "gather": gather}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=500, help="cells of the study")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    study = study_with(options.cells)
    if options.way:
        began = time.monotonic()
        WAYS[options.way](study, options.folder)
        used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF,)]
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        workers = len(os.sched_getaffinity(0)) if children else 0
        print(json.dumps([time.monotonic() - began, (used[0] + workers * children) / 1024]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(study, folder)
        told = {way: _run(way, options.cells, folder) for way in [*WAYS, *WAYS]}  # then warm
    of_scan = told["bare scan"][0]
    print(f"{options.cells} cells of {REQUESTS} requests with {STAMPS} stamps each:")
    for way, (seconds, mib) in told.items():
        ratio = "" if way == "bare scan" else f", {seconds / of_scan:.1f} × the bare scan"
        print(f"  {way:<12}{seconds:6.1f} s, {mib:5.0f} MiB at most{ratio}")


def _run(way: str, cells: int, folder: Path) -> tuple[float, float]:
    """Seconds and MiB of one way in a process of its own; each is taken when files are cached."""
    command = [sys.executable, __file__, "--cells", str(cells), "--way", way]
    done = subprocess.run(
        [*command, "--folder", str(folder)], check=True, stdout=subprocess.PIPE, text=True
    )
    seconds, mib = json.loads(done.stdout)
    return seconds, mib


if __name__ == "__main__":
    main()
