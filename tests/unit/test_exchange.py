"""Results of other clients read, and trials written for other tools.

The files under data/ are what vllm bench serve 0.32 and guidellm 0.8.1 wrote of twelve requests,
four at a time, to a scripted server; without texts, and of guidellm's the parts that are read.
Their own figures are what is expected.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from llmd_benchmark_report.schema_v0_2 import BenchmarkReportV02

from helpers.bundling import STUDY, TRIALS, write_results
from servegrid.analysis import tables
from servegrid.analysis.comparison import compare
from servegrid.cli.main import main
from servegrid.errors import ComparisonError
from servegrid.exchange.foreign import with_users

DATA = Path(__file__).parents[1] / "data"
VLLM = json.loads((DATA / "vllm-bench-0.32.json").read_text())
GUIDELLM = json.loads((DATA / "guidellm-0.8.1.json").read_text())
DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors", "latencies")


def imported(folder: Path, *results: Any, status: int = 0) -> pd.DataFrame:
    folder.mkdir(exist_ok=True)
    files = []
    for number, result in enumerate(results):
        files.append(folder / f"result-{number}.json")
        files[-1].write_text(result if isinstance(result, str) else json.dumps(result))
    into = folder / "imported"
    command = ["import", *map(str, files), "--output-dir", str(into), "--gpu", "a100-40gb"]
    assert main([*command, "--gpu-count", "2", "--quantization", "awq"]) == status
    return tables.read_cells(into / "tables/cells.parquet") if status == 0 else pd.DataFrame()


def test_what_vllm_bench_has_measured_has_the_figures_that_it_gave(tmp_path: Path) -> None:
    (row,) = imported(tmp_path, VLLM).to_dict("records")
    for name in ("ttft", "tpot", "itl"):
        for ours, theirs in (("mean", "mean"), ("p50", "median")):
            told = VLLM[f"{theirs}_{name}_ms"] / 1e3
            assert row[f"{name}_s_{ours}"] == pytest.approx(told, abs=2e-9), name
    # Its clock runs 0.5 ms longer: until all is gathered.
    assert row["output_tokens_per_s"] == pytest.approx(VLLM["output_throughput"], rel=2e-3)
    assert (row["protocol"], row["concurrency"], row["requests"]) == ("closed_loop", 4, 12)
    assert (row["input_len"], row["output_len"]) == (46, 6)  # 551 and 72 tokens in all
    assert (row["model"], row["gpu"], row["gpu_count"]) == ("scripted", "a100-40gb", 2)
    assert row["deployment"] == "scripted_awq_vllm_2xa100-40gb"
    assert row["origin"] == "vllm bench serve"
    assert pd.isna(row["valid"])
    assert "not certified: measured by vllm bench serve" in row["invalid_evidence"][0]
    assert "prompts of 34 to 65 tokens" in row["invalid_evidence"][0]
    assert "figures of the whole load" in row["invalid_evidence"][0]
    assert pd.isna(row["ttft_s_p99"]), "twelve samples"
    assert pd.isna(row["prompts"])


def test_without_details_its_own_figures_are_taken(tmp_path: Path) -> None:
    bare = {key: value for key, value in VLLM.items() if key not in DETAILS}
    (row,) = imported(tmp_path, bare).to_dict("records")
    assert row["ttft_s_mean"] == VLLM["mean_ttft_ms"] / 1e3
    assert row["itl_s_p50"] == VLLM["median_itl_ms"] / 1e3
    assert row["output_tokens_per_s"] == VLLM["output_throughput"]
    assert row["output_tokens_per_s_per_user"] == VLLM["output_throughput"] / 4
    assert row["window_s"] == row["makespan_s"] == VLLM["duration"]
    assert pd.isna(row["ttft_s_p99"])
    assert pd.isna(row["seconds_per_100_tokens"]), "no end-to-end latency was saved"
    assert "--save-detailed" in row["invalid_evidence"][0]
    many = bare | {"completed": 700, "num_prompts": 700, "total_output_tokens": 4200}
    (row,) = imported(tmp_path / "many", many).to_dict("records")
    assert row["ttft_s_p99"] == VLLM["p99_ttft_ms"] / 1e3


def test_what_guidellm_has_measured_has_the_figures_that_it_gave(tmp_path: Path) -> None:
    (row,) = imported(tmp_path, GUIDELLM).to_dict("records")
    told = {name: each["successful"] for name, each in GUIDELLM["benchmarks"][0]["metrics"].items()}
    # Its clock is that of the day, whose floats are right to 0.2 us.
    assert row["ttft_s_mean"] == pytest.approx(
        told["time_to_first_token_ms"]["mean"] / 1e3, abs=5e-7
    )
    # What it calls so is (end - first token) / (tokens - 1): a mean per request.
    assert row["tpot_s_mean"] == pytest.approx(
        told["inter_token_latency_ms"]["mean"] / 1e3, abs=5e-7
    )
    assert pd.isna(row["itl_s_mean"])
    assert row["output_tokens_per_s"] == pytest.approx(
        told["output_tokens_per_second"]["mean"], rel=1e-5
    )
    assert (row["protocol"], row["concurrency"], row["input_len"]) == ("closed_loop", 4, 24)
    assert row["origin"] == "guidellm 0.8.1"
    assert row["allocation"].startswith("result-0.json, benchmarks[0] 2026-")


def test_files_of_the_same_load_are_trials_of_a_cell(tmp_path: Path) -> None:
    other = VLLM | {"max_concurrency": 2}
    cells = imported(tmp_path, VLLM, other, VLLM)
    assert cells[["concurrency", "trial"]].to_numpy().tolist() == [[4, 1], [2, 1], [4, 2]]


@pytest.mark.parametrize(
    ("change", "protocol", "concurrency", "rate"),
    [
        ({"max_concurrency": None}, "burst", 12, None),
        ({"max_concurrency": 12}, "burst", 12, None),
        ({"request_rate": 5.0, "max_concurrency": None}, "poisson", None, 5.0),
    ],
)
def test_protocols_of_vllm_bench(
    tmp_path: Path,
    change: dict[str, Any],
    protocol: str,
    concurrency: int | None,
    rate: float | None,
) -> None:
    (row,) = imported(tmp_path, VLLM | change).to_dict("records")
    assert row["protocol"] == protocol
    told = [None if pd.isna(row[key]) else row[key] for key in ("concurrency", "request_rate")]
    assert told == [concurrency, rate]


def test_a_failed_request_is_counted_and_told(tmp_path: Path) -> None:
    failed = copy.deepcopy(VLLM)
    failed["errors"][3] = "Bad Gateway"
    failed["ttfts"][3], failed["itls"][3], failed["output_lens"][3] = 0.0, [], 0
    failed["latencies"][3] = 0.0
    (row,) = imported(tmp_path, failed).to_dict("records")
    assert (row["requests"], row["failed_requests"], row["verdict"]) == (12, 1, "http_error")
    assert "Bad Gateway" in row["reason"]


def strategy(kind: str) -> Any:
    changed = copy.deepcopy(GUIDELLM)
    changed["benchmarks"][0]["config"]["strategy"] = {"type_": kind, "rate": 3.0}
    return changed


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ("{", "is not JSON"),
        ("{}\n{}", "put each into a file of its own"),
        ("[]", "is of neither vllm bench serve nor guidellm"),
        (VLLM | {"request_rate": 2.0, "burstiness": 0.5}, "burstiness is 0.5"),
        (VLLM | {"ttfts": VLLM["ttfts"][:-1]}, "ttfts 11"),
        (VLLM | {"itls": [None] * 12}, "is not as its tool writes it"),
        (VLLM | {"errors": ["no"] * 12}, "no request of it succeeded"),
        (GUIDELLM | {"benchmarks": []}, "has no benchmarks"),
        (GUIDELLM | {"benchmarks": [None]}, "benchmarks[0]: holds nothing"),
        (strategy("constant"), "its strategy is 'constant'"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], result: Any, told: str
) -> None:
    imported(tmp_path, result, status=2)
    error = capsys.readouterr().err
    assert "result-0.json" in error
    assert told in error


def test_a_table_that_is_there_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported(tmp_path, VLLM)
    imported(tmp_path, VLLM, status=2)
    assert "is there already" in capsys.readouterr().err


def test_requests_are_given_to_the_streams_that_are_free() -> None:
    times = [(0, 10), (1, 5), (6, 9), (10, 12), (11, 13), (11, 12)]
    rows = with_users([{"sent_ns": sent, "done_ns": done} for sent, done in times])
    assert [row["user"] for row in rows] == [0, 1, 1, 1, 0, 2]


def test_they_are_compared_with_ones_own_only_if_asked_for(tmp_path: Path) -> None:
    theirs = imported(tmp_path, VLLM)
    own = theirs.assign(origin="servegrid", valid=pd.array([True], dtype="boolean"))
    with pytest.raises(ComparisonError, match="measured by vllm bench serve and measured by"):
        compare(theirs, own)
    assert compare(theirs, own, mixed=True).cells[0].ratio == pytest.approx(1)
    # Of one origin they are of a kind, though not certified; one's own must be.
    assert len(compare(theirs, theirs).cells) == 1
    with pytest.raises(ComparisonError, match="no trial of the first may be believed"):
        compare(own.assign(valid=pd.array([None], dtype="boolean")), own)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Bursts of 1 and 2 requests, each of 10 tokens in two chunks after 0.1 and n seconds."""
    write_results(tmp_path, STUDY)
    return tmp_path / "results"


def exported(results: Path, kind: str) -> dict[str, Any]:
    into = results.parent / kind
    assert main(["export", str(results), "--format", kind, "--output-dir", str(into)]) == 0
    files = {path.name: json.loads(path.read_text()) for path in into.iterdir()}
    assert files.keys() == {f"{trial.replace('/', '.')}.json" for trial in TRIALS}
    return files


def test_a_trial_as_vllm_bench_writes_it(results: Path) -> None:
    told = exported(results, "vllm-bench")["d.burst-c2-i31-o10.trial-1.json"]
    # Two requests, both from 0 to 2 s, the first tokens after 0.1 s.
    assert (told["num_prompts"], told["completed"], told["failed"]) == (2, 2, 0)
    assert (told["max_concurrency"], told["request_rate"]) == (2, "inf")
    assert (told["duration"], told["output_throughput"]) == (2.0, 10.0)
    assert told["total_token_throughput"] == (2 * 31 + 2 * 10) / 2
    assert told["itls"] == [[1.9]] * 2
    assert told["mean_ttft_ms"] == pytest.approx(100)
    assert told["p99_tpot_ms"] == pytest.approx(1900 / 9)
    assert told["median_e2el_ms"] == pytest.approx(2000)
    assert told["date"] == "20260101-000000"
    assert "generated_texts" not in told


def test_what_is_exported_can_be_imported(results: Path) -> None:
    told = exported(results, "vllm-bench")["d.burst-c2-i31-o10.trial-1.json"]
    (row,) = imported(results.parent, told).to_dict("records")
    cells = tables.read_cells(results / "tables/cells.parquet")
    (own,) = cells[(cells["concurrency"] == 2) & (cells["trial"] == 1)].to_dict("records")
    # How many tokens a chunk had is lost on the way, and with it the time between two tokens.
    for name in ("ttft_s_mean", "tpot_s_p50", "e2el_s_mean", "output_tokens_per_s"):
        assert row[name] == pytest.approx(own[name]), name
    assert (row["protocol"], row["concurrency"]) == ("burst", 2)


def test_a_trial_as_a_benchmark_report_of_llm_d(results: Path) -> None:
    told = exported(results, "llm-d")["d.burst-c2-i31-o10.trial-1.json"]
    report = BenchmarkReportV02(**told)
    assert report.dump()["version"] == "0.2.1"
    assert report.run.time is not None
    assert report.run.time.duration == "PT2.000000S"
    assert report.scenario is not None
    assert report.scenario.workload is not None
    workload = report.scenario.workload.standardized
    assert (workload.concurrency, workload.input_seq_len.value) == (2, 31)
    aggregate = told["results"]["request_performance"]["aggregate"]
    latency = aggregate["latency"]
    assert latency["time_to_first_token"] == {"units": "s", "mean": 0.1, "p50": 0.1}
    assert latency["time_per_output_token"]["mean"] == pytest.approx(1.9 / 9)
    assert latency["request_latency"]["mean"] == 2.0
    assert aggregate["throughput"]["output_token_rate"] == {"units": "tokens/s", "mean": 10.0}
    assert aggregate["throughput"]["request_rate"]["mean"] == 1.0
    assert "rate_qps" not in told["scenario"]["workload"]["standardized"], "not known, not told"
    accelerator = told["scenario"]["stack"][0]["standardized"]["accelerator"]
    assert (accelerator["model"], accelerator["count"]) == ("cpu", 0)


def test_every_trial_has_a_uid_of_its_own(results: Path) -> None:
    files = exported(results, "llm-d").values()
    assert len({told["run"]["uid"] for told in files}) == len(TRIALS)


@pytest.mark.parametrize("kind", ["llm-d", "vllm-bench"])
def test_nothing_to_export_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    command: Callable[[], int] = lambda: main(  # noqa: E731
        ["export", str(tmp_path), "--format", kind, "--output-dir", str(tmp_path / "out")]
    )
    assert command() == 2
    assert "has no cells/" in capsys.readouterr().err
    (tmp_path / "cells").mkdir()
    assert command() == 2
    assert "has no trials" in capsys.readouterr().err
