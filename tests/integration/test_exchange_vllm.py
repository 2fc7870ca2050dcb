"""An export for vLLM has the metrics that vLLM itself computes."""

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

# Computes the metrics of the exported requests with vLLM's own function.
VLLM_METRICS = """
import dataclasses, json, sys
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
from vllm.benchmarks.serve import calculate_metrics
exported = json.load(open(sys.argv[1]))
lists = ("errors", "input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times")
outputs = [
    RequestFuncOutput(success=not error, error=error, prompt_len=prompt, output_tokens=output,
                      ttft=ttft, itl=itl, latency=latency, start_time=start)
    for error, prompt, output, ttft, itl, latency, start in zip(*(exported[key] for key in lists))
]
found, lengths = calculate_metrics([], outputs, exported["duration"], None, [99.0],
                                   {"ttft": 75, "e2el": 1000})
found = dataclasses.asdict(found)
found["output_lens"] = lengths
json.dump(found, open(sys.argv[2], "w"), default=float)
"""


def make_irregular(path: Path) -> None:
    """Give five requests irregular times. The last one fails, and one has a single token."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        stamps = [1_000_003 * (number + 7) * (index + 3) ** 2 for index in range(10 - number)]
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
    parquet.write_table(table.from_pylist(rows, schema=table.schema), path)


@pytest.mark.slow
@pytest.mark.crowded
def test_an_export_has_the_metrics_that_vllm_computes(tmp_path: Path) -> None:
    workload = STUDY["workload"] | {"concurrency": 5, "trials": 1}
    slo = {"tokens_per_s_per_user": 0.1, "ttft_s": 0.075, "e2el_s": 1}
    study = {**STUDY, "workload": workload, "slo": slo}
    write_results(tmp_path, study)
    configfile = tmp_path / "study.json"
    configfile.write_text(json.dumps(study))
    trial = "d/burst-c5-i31-o10/trial-1"
    make_irregular(tmp_path / "results/cells" / trial / "requests.parquet")
    output = tmp_path / "exported"
    options = ("--output-dir", str(output), "--configfile", str(configfile))
    assert main(["export", str(tmp_path), "--format", "vllm-bench", *options]) == 0
    file, found = output / f"{trial.replace('/', '.')}.json", tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-c", VLLM_METRICS, str(file), str(found)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    exported, theirs = json.loads(file.read_text()), json.loads(found.read_text())
    names = {"total_input": "total_input_tokens", "total_output": "total_output_tokens"}
    compared = 0
    for name, value in theirs.items():
        if name.startswith("percentiles_"):
            name, value = f"p99_{name.removeprefix('percentiles_')}", value[0][1]
        if (own := exported.get(names.get(name, name))) is not None:
            assert own == pytest.approx(value, rel=1e-9), name
            compared += 1
    assert (exported["completed"], exported["failed"], exported["output_lens"]) == (
        4,
        1,
        [10, 10, 10, 1, 0],
    )
    # By hand: only the second request has its first token within 75 ms and its last within 1 s.
    assert exported["request_goodput"] == pytest.approx(1 / exported["duration"])
    assert compared == 4 * 4 + 9  # four statistics of each latency, and all counts
