"""What is exported for vLLM, held against vLLM's own computations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from helpers.bundling import STUDY, write_results
from servegrid.cli.main import main
from servegrid.records import parquet

# Its requests as vLLM would have noted them, taken to its own aggregation.
OF_VLLM = """
import dataclasses, json, sys
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
from vllm.benchmarks.serve import calculate_metrics
told = json.load(open(sys.argv[1]))
lists = ("errors", "input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times")
outputs = [
    RequestFuncOutput(success=not error, error=error, prompt_len=prompt, output_tokens=output,
                      ttft=ttft, itl=itl, latency=latency, start_time=start)
    for error, prompt, output, ttft, itl, latency, start in zip(*(told[key] for key in lists))
]
found, lengths = calculate_metrics([], outputs, told["duration"], None, [99.0], {})
found = dataclasses.asdict(found)
found["output_lens"] = lengths
json.dump(found, open(sys.argv[2], "w"), default=float)
"""


def spoil(path: Path) -> None:
    """Give five requests irregular times; the last one has failed, and one had a single token."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        stamps = [1_000_003 * (number + 7) * (at + 3) ** 2 for at in range(10 - number)]
        row |= {
            "sent_ns": 1_111 * number,
            "first_token_ns": stamps[0],
            "token_ns": stamps,
            "chunk_tokens": [1] * (9 - number) + [1 + number],
            "done_ns": stamps[-1] + 500_000,
        }
    rows[3] |= {"token_ns": rows[3]["token_ns"][:1], "chunk_tokens": [1], "completion_tokens": 1}
    failed = {"error": "http_error: 500", "first_token_ns": None, "completion_tokens": None}
    rows[4] |= failed | {"token_ns": [], "chunk_tokens": [], "done_ns": 9_000_000_000}
    parquet.write(table.from_pylist(rows, schema=table.schema), path)


@pytest.mark.slow
@pytest.mark.crowded
def test_the_figures_of_an_export_are_those_that_vllm_computes(tmp_path: Path) -> None:
    study = {**STUDY, "workload": STUDY["workload"] | {"concurrency": 5, "trials": 1}}
    write_results(tmp_path, study)
    trial = "d/burst-c5-i31-o10/trial-1"
    spoil(tmp_path / "results/cells" / trial / "requests.parquet")
    into = tmp_path / "exported"
    assert main(["export", str(tmp_path), "--format", "vllm-bench", "--output-dir", str(into)]) == 0
    file, found = into / f"{trial.replace('/', '.')}.json", tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-c", OF_VLLM, str(file), str(found)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told, theirs = json.loads(file.read_text()), json.loads(found.read_text())
    names = {"total_input": "total_input_tokens", "total_output": "total_output_tokens"}
    compared = 0
    for name, value in theirs.items():
        if name.startswith("percentiles_"):
            name, value = f"p99_{name.removeprefix('percentiles_')}", value[0][1]
        if (own := told.get(names.get(name, name))) is not None:
            assert own == pytest.approx(value, rel=1e-9), name
            compared += 1
    assert (told["completed"], told["failed"], told["output_lens"]) == (4, 1, [10, 10, 10, 1, 0])
    assert compared == 4 * 4 + 8  # of each latency four figures, and all that is counted
