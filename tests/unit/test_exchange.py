"""Results of other clients are read, and trials are written for other tools.

The files in data/ were written by vllm bench serve 0.32 and guidellm 0.8.1 for twelve requests,
four at a time, to a mock server. Texts were removed, and guidellm's parts that are not read. The
metrics in these files are the expected values.
"""

import copy
import errno
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from llmd_benchmark_report.schema_v0_2 import BenchmarkReportV02, LoadStandardized

from helpers.bundling import STUDY, TRIALS, write_results
from servegrid.analysis import tables
from servegrid.analysis.comparison import compare
from servegrid.cli.main import main
from servegrid.errors import ComparisonError
from servegrid.exchange import llmd
from servegrid.exchange.imported import IMPORTED, assign_users
from servegrid.records import columns, parquet
from servegrid.study.grid import Workload
from servegrid.study.source import Distribution, FileFacts, Source

DATA = Path(__file__).parents[1] / "data"
VLLM = json.loads((DATA / "vllm-bench-0.32.json").read_text())
GUIDELLM = json.loads((DATA / "guidellm-0.8.1.json").read_text())
DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors", "latencies")


def import_results(folder: Path, *results: Any, status: int = 0) -> pd.DataFrame:
    folder.mkdir(exist_ok=True)
    files = []
    for number, result in enumerate(results):
        files.append(folder / f"result-{number}.json")
        files[-1].write_text(result if isinstance(result, str) else json.dumps(result))
    output = folder / "imported"
    command = ["import", *map(str, files), "--output-dir", str(output), "--gpu", "a100-40gb"]
    assert main([*command, "--gpu-count", "2", "--quantization", "awq"]) == status
    return tables.load_table(output / "tables/cells.parquet") if status == 0 else pd.DataFrame()


def test_an_imported_vllm_bench_result_has_vllm_s_own_metrics(tmp_path: Path) -> None:
    (row,) = import_results(tmp_path, VLLM).to_dict("records")
    for name in ("ttft", "tpot", "itl"):
        for ours, theirs in (("mean", "mean"), ("p50", "median")):
            expected = VLLM[f"{theirs}_{name}_ms"] / 1e3
            assert row[f"{name}_s_{ours}"] == pytest.approx(expected, abs=2e-9), name
    # Its clock stops 0.5 ms later, when all results are gathered.
    assert row["output_tokens_per_s"] == pytest.approx(VLLM["output_throughput"], rel=2e-3)
    assert (row["protocol"], row["concurrency"], row["requests"]) == ("closed_loop", 4, 12)
    assert (row["input_len"], row["output_len"]) == (46, 6)  # 551 and 72 tokens in all
    assert (row["model"], row["gpu"], row["gpu_count"]) == ("scripted", "a100-40gb", 2)
    assert row["deployment"] == "scripted_awq_vllm_2xa100-40gb"
    assert row["origin"] == "vllm bench serve"
    assert pd.isna(row["valid"])
    assert row["invalid_rules"] == [IMPORTED] * 3
    assert row["invalid_evidence"] == [
        "validity not checked: measured by vllm bench serve",
        "prompts of 34 to 65 tokens",
        "no stationary part: the metrics include the start and the end of the run",
    ]
    assert pd.isna(row["ttft_s_p99"]), "twelve samples"
    assert pd.isna(row["prompts"])


def test_without_details_the_client_s_own_metrics_are_imported(tmp_path: Path) -> None:
    bare = {key: value for key, value in VLLM.items() if key not in DETAILS}
    (row,) = import_results(tmp_path, bare).to_dict("records")
    assert row["ttft_s_mean"] == VLLM["mean_ttft_ms"] / 1e3
    assert row["itl_s_p50"] == VLLM["median_itl_ms"] / 1e3
    assert row["output_tokens_per_s"] == VLLM["output_throughput"]
    assert row["output_tokens_per_s_per_user"] == VLLM["output_throughput"] / 4
    assert row["window_s"] == row["makespan_s"] == VLLM["duration"]
    assert pd.isna(row["ttft_s_p99"])
    assert pd.isna(row["seconds_per_100_tokens"]), "no end-to-end latency was saved"
    assert row["invalid_rules"] == [IMPORTED] * 3
    assert "--save-detailed" in row["invalid_evidence"][1]
    many = bare | {"completed": 700, "num_prompts": 700, "total_output_tokens": 4200}
    (row,) = import_results(tmp_path / "many", many).to_dict("records")
    assert row["ttft_s_p99"] == VLLM["p99_ttft_ms"] / 1e3


def test_times_per_token_are_of_the_exact_mean_of_the_output_lengths(tmp_path: Path) -> None:
    few = [1] * 11 + [6]  # 17 tokens of 12 requests, 1.42 on average; output_len is 1
    (row,) = import_results(tmp_path / "detailed", VLLM | {"output_lens": few}).to_dict("records")
    seconds = [ttft + sum(itls) for ttft, itls in zip(VLLM["ttfts"], VLLM["itls"], strict=True)]
    assert row["output_len"] == 1
    assert row["seconds_per_100_tokens"] == pytest.approx(100 * sum(seconds) / 17)
    bare = {key: value for key, value in VLLM.items() if key not in DETAILS}
    bare |= {"total_output_tokens": 17, "mean_e2el_ms": 340.0}
    (row,) = import_results(tmp_path / "bare", bare).to_dict("records")
    assert row["seconds_per_100_tokens"] == pytest.approx(100 * 0.34 * 12 / 17)


def test_an_imported_guidellm_result_has_guidellm_s_own_metrics(tmp_path: Path) -> None:
    (row,) = import_results(tmp_path, GUIDELLM).to_dict("records")
    metrics = GUIDELLM["benchmarks"][0]["metrics"]
    expected = {name: values["successful"] for name, values in metrics.items()}
    # Its times are floats since 1970, which are exact to 0.2 us.
    assert row["ttft_s_mean"] == pytest.approx(
        expected["time_to_first_token_ms"]["mean"] / 1e3, abs=5e-7
    )
    # It defines this as (end - first token) / (tokens - 1), a mean per request.
    assert row["tpot_s_mean"] == pytest.approx(
        expected["inter_token_latency_ms"]["mean"] / 1e3, abs=5e-7
    )
    assert pd.isna(row["itl_s_mean"])
    assert row["output_tokens_per_s"] == pytest.approx(
        expected["output_tokens_per_second"]["mean"], rel=1e-5
    )
    assert (row["protocol"], row["concurrency"], row["input_len"]) == ("closed_loop", 4, 24)
    assert row["origin"] == "guidellm 0.8.1"
    assert row["allocation"].startswith("result-0.json, benchmarks[0] 2026-")


def test_files_with_the_same_workload_are_trials_of_a_cell(tmp_path: Path) -> None:
    other = VLLM | {"max_concurrency": 2}
    cells = import_results(tmp_path, VLLM, other, VLLM)
    assert cells[["concurrency", "trial"]].to_numpy().tolist() == [[4, 1], [2, 1], [4, 2]]


@pytest.mark.parametrize(
    ("change", "protocol", "concurrency", "rate"),
    [
        ({"max_concurrency": None}, "burst", 12, None),
        ({"max_concurrency": 12}, "burst", 12, None),
        ({"request_rate": 5.0, "max_concurrency": None}, "poisson", None, 5.0),
        ({"request_rate": 5.0, "burstiness": math.inf}, "constant", None, 5.0),
        ({"request_rate": 5.0, "burstiness": 0.5}, "gamma", None, 5.0),
    ],
)
def test_the_protocol_follows_from_the_options_of_vllm_bench(
    tmp_path: Path,
    change: dict[str, Any],
    protocol: str,
    concurrency: int | None,
    rate: float | None,
) -> None:
    (row,) = import_results(tmp_path, VLLM | change).to_dict("records")
    assert row["protocol"] == protocol
    found = [None if pd.isna(row[key]) else row[key] for key in ("concurrency", "request_rate")]
    assert found == [concurrency, rate]


def test_the_acceptance_of_drafted_tokens_is_imported(tmp_path: Path) -> None:
    drafts = {"spec_decode_acceptance_rate": 62.5, "spec_decode_acceptance_length": 2.5}
    (row,) = import_results(tmp_path, VLLM | drafts).to_dict("records")
    assert row["spec_decode_acceptance_rate"] == 0.625
    assert row["spec_decode_acceptance_length"] == 2.5
    assert row["requests"] == 12


def test_arrivals_of_another_burstiness_are_another_cell(tmp_path: Path) -> None:
    runs = [VLLM | {"request_rate": 5.0, "burstiness": each} for each in (0.5, 2.0, 0.5)]
    runs[2] |= {"date": "20261130-000000"}
    cells = import_results(tmp_path, *runs)
    assert cells["burstiness"].tolist() == [0.5, 2.0, 0.5]
    assert cells["trial"].tolist() == [1, 1, 2]
    assert [name.rpartition("_")[2] for name in cells["deployment"]] == [
        "burstiness-0.5",
        "burstiness-2.0",
        "burstiness-0.5",
    ]
    (row,) = import_results(tmp_path / "one", runs[0]).to_dict("records")
    assert "burstiness" not in row["deployment"]


def test_a_failed_request_is_counted_and_reported(tmp_path: Path) -> None:
    failed = copy.deepcopy(VLLM)
    failed["errors"][3] = "Bad Gateway"
    failed["ttfts"][3], failed["itls"][3], failed["output_lens"][3] = 0.0, [], 0
    failed["latencies"][3] = 0.0
    (row,) = import_results(tmp_path, failed).to_dict("records")
    assert (row["requests"], row["failed_requests"], row["verdict"]) == (12, 1, "http_error")
    assert "Bad Gateway" in row["verdict_detail"]


def strategy(kind: str) -> Any:
    changed = copy.deepcopy(GUIDELLM)
    changed["benchmarks"][0]["config"]["strategy"] = {"type_": kind, "rate": 3.0}
    return changed


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("{", "is not JSON"),
        ("{}\n{", "Check that the client finished writing"),
        ("{}\n{}", "result-0.json[1]: was not written by vllm bench serve or guidellm"),
        ("[]", "was not written by vllm bench serve or guidellm"),
        ("[{}, []]", "result-0.json[0]: was not written by vllm bench serve or guidellm"),
        (VLLM | {"request_rate": 2.0, "burstiness": 0.0}, "burstiness is 0.0, but it must be more"),
        (VLLM | {"ramp_up_strategy": "linear"}, "its request rate rose during the run"),
        (VLLM | {"ttfts": VLLM["ttfts"][:-1]}, "ttfts 11"),
        (VLLM | {"itls": [None] * 12}, "has an unexpected structure"),
        (VLLM | {"errors": ["no"] * 12}, "no request succeeded"),
        (VLLM | {"request_rate": float("nan")}, "its request rate is nan. Check that the client"),
        (VLLM | {"request_rate": -2}, "its request rate is -2.0."),
        (VLLM | {"max_concurrency": -3}, "its `concurrency` is -3."),
        (VLLM | {"input_lens": [-5] * 12}, "its `input_len` is -5."),
        (VLLM | {"output_lens": [2**40] * 12}, "its `output_len` is 1.09951e+12."),
        (VLLM | {"output_lens": [0, *[6] * 11]}, "its request 0 has times of tokens, but no tok"),
        (VLLM | {"output_lens": [True, *[6] * 11]}, "unexpected structure (ArrowTypeError"),
        (VLLM | {"ttfts": [-0.1] * 12}, "the times of its request 0 go backwards."),
        (VLLM | {"start_times": [0.0] * 11 + [1e10]}, "its requests span more than 104 days"),
        (VLLM | {"start_times": [1e18] * 12}, "has an unexpected structure (OverflowError"),
        (VLLM | {"model_id": None}, "`model_id` is None and not the name of a model"),
        (
            {key: value for key, value in VLLM.items() if key not in DETAILS} | {"duration": 1e999},
            "its `makespan_s` is inf.",
        ),
        (GUIDELLM | {"benchmarks": []}, "has no benchmarks"),
        (GUIDELLM | {"benchmarks": [None]}, "benchmarks[0]: is empty"),
        (GUIDELLM | {"benchmarks": {}}, "`benchmarks` a list"),
        (strategy("trace"), "the strategy 'trace' has no equivalent"),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], result: Any, message: str
) -> None:
    import_results(tmp_path, result, status=2)
    error = capsys.readouterr().err
    assert "result-0.json" in error
    assert message in error


def guidellm_request(due: float, start: float) -> dict[str, Any]:
    """Tokens 0.2 and 0.3 s after `start`: five, the first alone."""
    timings = {
        "targeted_start": due,
        "request_start": start,
        "first_token_iteration": start + 0.2,
        "last_token_iteration": start + 0.3,
        "request_end": start + 0.3,
    }
    return {
        "info": {"status": "completed", "timings": timings, "error": None},
        "input_metrics": {"text_tokens": 256},
        "output_metrics": {"text_tokens": 5},
    }


def guidellm_benchmark(
    strategy: dict[str, Any], requests: list[dict[str, Any]], cut_off: int = 0
) -> dict[str, Any]:
    benchmark = copy.deepcopy(GUIDELLM["benchmarks"][0])
    benchmark["config"]["strategy"] = strategy
    incomplete = [guidellm_request(1e9, 1e9) for _ in range(cut_off)]
    benchmark["requests"] = {"successful": requests, "errored": [], "incomplete": incomplete}
    return benchmark


def sweep_report() -> dict[str, Any]:
    """As the profile `sweep` writes it: synchronous, throughput, then rates in between.

    The server sends the first token 0.2 s after the request. The client sends each request of the
    open loop 0.05 s late.
    """
    one_by_one = [guidellm_request(1e9 + n, 1e9 + n) for n in range(3)]
    at_once = [guidellm_request(1e9, 1e9) for _ in range(30)]
    at_a_rate = [guidellm_request(1e9 + n / 4, 1e9 + n / 4 + 0.05) for n in range(80)]
    benchmarks = [
        guidellm_benchmark({"type_": "synchronous"}, one_by_one),
        guidellm_benchmark({"type_": "throughput", "max_concurrency": 512}, at_once, cut_off=10),
        guidellm_benchmark({"type_": "constant", "rate": 4.0, "max_concurrency": 512}, at_a_rate),
        guidellm_benchmark({"type_": "constant", "rate": 4.0, "max_concurrency": 2}, at_a_rate),
        guidellm_benchmark({"type_": "constant", "rate": 9.0, "max_concurrency": 512}, []),
    ]
    return GUIDELLM | {"benchmarks": benchmarks}


def test_a_sweep_of_guidellm_is_imported_and_what_cannot_be_taken_is_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = import_results(tmp_path, sweep_report())
    assert cells["protocol"].tolist() == ["closed_loop", "burst", "constant", "constant"]
    # 30 requests ended and 10 were cut off, so 40 were in flight at the same time.
    assert cells["concurrency"].tolist()[:2] == [1, 40]
    assert cells["request_rate"].tolist()[2:] == [4.0, 4.0]
    notes = cells["invalid_evidence"].tolist()
    assert "10 requests cut off at the end and left out" in notes[1]
    rate = cells.iloc[2]
    assert rate["ttft_s_mean"] == pytest.approx(0.25, abs=1e-6), "from the due time"
    assert rate["ttft_from_sent_s_mean"] == pytest.approx(0.2, abs=1e-6)
    assert rate["tpot_s_mean"] == pytest.approx(0.1 / 4, abs=1e-6)
    assert rate["in_flight_mean"] == pytest.approx(4 * 0.3, rel=0.05), "Little's law"
    assert notes[2] == ["validity not checked: measured by guidellm 0.8.1"], "stationary"
    assert any("limit of 2 requests in flight was reached" in note for note in notes[3])
    printed = capsys.readouterr()
    assert "4 trials in" in printed.out
    assert "left out: 1 of 5 benchmarks" in printed.err
    assert "result-0.json, benchmarks[4]: no request succeeded" in printed.err


def test_a_load_that_rises_is_no_burst(tmp_path: Path) -> None:
    at_once = [guidellm_request(1e9, 1e9 + n / 10) for n in range(30)]
    rising = {"type_": "throughput", "max_concurrency": 512, "rampup_duration": 3.0}
    report = GUIDELLM | {"benchmarks": [guidellm_benchmark(rising, at_once)]}
    (row,) = import_results(tmp_path, report).to_dict("records")
    assert (row["protocol"], row["concurrency"]) == ("closed_loop", 30)
    assert "the load rose during the first 3 s" in row["invalid_evidence"]


def sweep_runs(count: int, **parameters: Any) -> list[dict[str, Any]]:
    """The list that `vllm bench sweep serve` writes to summary.json, for one combination."""
    bare = {key: value for key, value in VLLM.items() if key not in DETAILS}
    return [
        bare | {"duration": 0.6 + number / 10, "run_number": number} | parameters
        for number in range(count)
    ]


def test_a_list_as_vllm_bench_sweep_writes_it_is_imported(tmp_path: Path) -> None:
    runs = sweep_runs(3, max_concurrency=4, random_input_len=46)
    cells = import_results(tmp_path, runs)
    assert cells["trial"].tolist() == [1, 2, 3]
    assert cells["makespan_s"].tolist() == [0.6, 0.7, 0.8]
    assert cells["allocation"].str.startswith("result-0.json[0] ").tolist() == [True, False, False]
    assert set(cells["deployment"]) == {"scripted_awq_vllm_2xa100-40gb"}


def test_a_run_of_a_sweep_that_is_in_two_files_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = sweep_runs(2)
    cells = import_results(tmp_path, runs, runs[1])
    assert cells["trial"].tolist() == [1, 2]
    printed = capsys.readouterr().err
    assert "left out: 1 of 3 benchmarks" in printed
    assert "result-1.json: the same run of the sweep as result-0.json[1]" in printed


def test_servers_that_a_sweep_started_with_other_parameters_are_other_deployments(
    tmp_path: Path,
) -> None:
    runs = [sweep_runs(2, max_num_seqs=size, random_input_len=46) for size in (32, 64)]
    runs[1][0]["seed"] = 1  # another trial, no other server
    cells = import_results(tmp_path, *runs)
    assert cells[["deployment", "trial"]].to_numpy().tolist() == [
        ["scripted_awq_vllm_2xa100-40gb_max_num_seqs-32", 1],
        ["scripted_awq_vllm_2xa100-40gb_max_num_seqs-32", 2],
        ["scripted_awq_vllm_2xa100-40gb_max_num_seqs-64", 1],
        ["scripted_awq_vllm_2xa100-40gb_max_num_seqs-64", 2],
    ]


def test_one_result_that_cannot_be_taken_leaves_the_others_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = {
        "run_number": 1,
        "error_type": "CalledProcessError",
        "error": "exit status 1",
        "serve_overrides": {},
        "bench_overrides": {"max_concurrency": 8},
    }
    bursty = VLLM | {"request_rate": 2.0, "ramp_up_strategy": "linear"}
    appended = "\n".join(map(json.dumps, (VLLM, bursty, VLLM | {"itls": [None] * 12})))
    cells = import_results(tmp_path, appended, failure, VLLM)
    assert cells["trial"].tolist() == [1, 2]
    printed = capsys.readouterr().err
    assert "left out: 3 of 5 benchmarks" in printed
    for reason in (
        "result-0.json[1]: its request rate rose during the run",
        "result-0.json[2]: has an unexpected structure",
        "result-1.json: this run of vllm bench sweep failed (CalledProcessError: exit status 1)",
    ):
        assert reason in printed


def test_more_chunks_than_tokens_are_no_division_by_zero(tmp_path: Path) -> None:
    # Warnings are errors in tests. Six chunks with three tokens: three of the chunks have none.
    (row,) = import_results(tmp_path, VLLM | {"output_lens": [3] * 12}).to_dict("records")
    assert row["output_len"] == 3
    assert 0 < row["itl_s_p50"] < 1


def test_a_number_of_gpus_that_makes_no_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for count in ("-1", "0", "many"):
        with pytest.raises(SystemExit):
            main(["import", "x", "--output-dir", str(tmp_path), "--gpu", "g", "--gpu-count", count])
        assert f"--gpu-count: '{count}' is not an integer above 0" in capsys.readouterr().err


def test_an_existing_table_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_results(tmp_path, VLLM)
    import_results(tmp_path, VLLM, status=2)
    assert "already exists" in capsys.readouterr().err


def test_requests_are_assigned_to_idle_users() -> None:
    times = [(0, 10), (1, 5), (6, 9), (10, 12), (11, 13), (11, 12)]
    rows = assign_users([{"sent_ns": sent, "done_ns": done} for sent, done in times])
    assert [row["user"] for row in rows] == [0, 1, 1, 1, 0, 2]


def test_imported_results_are_compared_with_own_ones_only_on_request(tmp_path: Path) -> None:
    theirs = import_results(tmp_path, VLLM)
    own = theirs.assign(origin="servegrid", valid=pd.array([True], dtype="boolean"))
    with pytest.raises(
        ComparisonError, match="measured by vllm bench serve; the second is measured by"
    ):
        compare(theirs, own)
    assert compare(theirs, own, allow_mixed=True).cells[0].ratio == pytest.approx(1)
    # Results of one client can be compared, although none is certified. Own results must be valid.
    assert len(compare(theirs, theirs).cells) == 1
    with pytest.raises(ComparisonError, match="no trial of the first study is valid"):
        compare(own.assign(valid=pd.array([None], dtype="boolean")), own)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Bursts of 1 and 2 requests, with 10 tokens each, in two chunks after 0.1 and n seconds."""
    write_results(tmp_path, STUDY)
    return tmp_path / "results"


def export_results(results: Path, kind: str, *options: str) -> dict[str, Any]:
    output = results.parent / kind
    command = ["export", str(results), "--format", kind, "--output-dir", str(output)]
    assert main([*command, *options]) == 0
    files = {path.name: json.loads(path.read_text()) for path in output.iterdir()}
    assert files.keys() == {f"{trial.replace('/', '.')}.json" for trial in TRIALS}
    return files


def test_a_trial_is_exported_in_the_format_of_vllm_bench(results: Path) -> None:
    exported = export_results(results, "vllm-bench")["d.burst-c2-i31-o10.trial-1.json"]
    # Two requests, both from 0 to 2 s, the first tokens after 0.1 s.
    assert (exported["num_prompts"], exported["completed"], exported["failed"]) == (2, 2, 0)
    assert (exported["max_concurrency"], exported["request_rate"]) == (2, "inf")
    assert (exported["duration"], exported["output_throughput"]) == (2.0, 10.0)
    assert exported["total_token_throughput"] == (2 * 31 + 2 * 10) / 2
    assert exported["itls"] == [[1.9]] * 2
    assert exported["mean_ttft_ms"] == pytest.approx(100)
    assert exported["p99_tpot_ms"] == pytest.approx(1900 / 9)
    assert exported["median_e2el_ms"] == pytest.approx(2000)
    assert exported["date"] == "20260101-000000"
    assert "generated_texts" not in exported
    assert (exported["servegrid"]["valid"], exported["servegrid"]["emulated"]) == (True, False)


@pytest.mark.parametrize(
    ("slo", "goodput"),
    [
        ({}, 1.0),  # 10 tokens in 2 s are 5 tokens/s, the default
        ({"tokens_per_s_per_user": 5.1}, 0.0),
        ({"ttft_s": 0.1}, 1.0),
        ({"ttft_s": 0.099}, 0.0),
        ({"e2el_s": 1.9}, 0.0),
    ],
)
def test_an_export_counts_the_requests_that_meet_the_slo_of_a_study(
    results: Path, slo: dict[str, float], goodput: float
) -> None:
    study = results / "study.json"
    study.write_text(json.dumps({**STUDY, "slo": slo}))
    exported = export_results(results, "vllm-bench", "--configfile", str(study))
    # Two requests in 2 s, each with the first token after 0.1 s and the last one after 2 s.
    assert exported["d.burst-c2-i31-o10.trial-1.json"]["request_goodput"] == goodput


def test_a_report_of_llm_d_has_no_goodput(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(results), "--format", "llm-d", "--output-dir", str(results / "out")]
    assert main([*command, "--configfile", str(results / "study.json")]) == 2
    assert "have no goodput" in capsys.readouterr().err


def test_an_exported_result_can_be_imported(results: Path) -> None:
    exported = export_results(results, "vllm-bench")["d.burst-c2-i31-o10.trial-1.json"]
    (row,) = import_results(results.parent, exported).to_dict("records")
    cells = tables.load_table(results / "tables/cells.parquet")
    (own,) = cells[(cells["concurrency"] == 2) & (cells["trial"] == 1)].to_dict("records")
    # The file does not say how many tokens a chunk had, so the inter-token latency is lost.
    for name in ("ttft_s_mean", "tpot_s_p50", "e2el_s_mean", "output_tokens_per_s"):
        assert row[name] == pytest.approx(own[name]), name
    assert (row["protocol"], row["concurrency"]) == ("burst", 2)


def test_a_trial_is_exported_as_a_benchmark_report_of_llm_d(results: Path) -> None:
    exported = export_results(results, "llm-d")["d.burst-c2-i31-o10.trial-1.json"]
    report = BenchmarkReportV02(**exported)
    assert report.dump()["version"] == "0.2.1"
    assert report.run.time is not None
    assert report.run.time.duration == "PT2.000000S"
    assert report.scenario is not None
    assert report.scenario.load is not None
    load = report.scenario.load.standardized
    assert (load.concurrency, load.input_seq_len.value) == (2, 31)
    aggregate = exported["results"]["request_performance"]["aggregate"]
    latency = aggregate["latency"]
    assert latency["time_to_first_token"] == {"units": "s", "mean": 0.1, "p50": 0.1}
    assert latency["time_per_output_token"]["mean"] == pytest.approx(1.9 / 9)
    assert latency["request_latency"]["mean"] == 2.0
    assert aggregate["throughput"]["output_token_rate"] == {"units": "tokens/s", "mean": 10.0}
    assert aggregate["throughput"]["request_rate"]["mean"] == 1.0
    assert "rate_qps" not in exported["scenario"]["load"]["standardized"], "unknown"
    accelerator = exported["scenario"]["stack"][0]["standardized"]["accelerator"]
    assert (accelerator["model"], accelerator["count"]) == ("cpu", 0)


SHA = "0" * 64


@pytest.mark.parametrize(
    ("source", "kind", "prompts"),
    [
        (None, "sampled", {"distribution": "fixed", "value": 31}),
        (Source("random"), "random", {"distribution": "fixed", "value": 31}),
        (
            Source("random", input_lens=Distribution("lognormal", 0.5, 90)),
            "random",
            {"distribution": "other", "value": 31, "max": 90},
        ),
        (
            Source("file", file=FileFacts(SHA, 9)),
            "sampled",
            {"distribution": "other", "value": 31, "max": 31},
        ),
        (
            Source(
                "trace",
                file=FileFacts(SHA, 9, max_input_len=70, max_output_len=20, shares_blocks=True),
            ),
            "random",
            {"distribution": "other", "value": 31, "max": 70},
        ),
        (
            Source("trace", file=FileFacts(SHA, 9, max_input_len=70, max_output_len=20)),
            "sampled",
            {"distribution": "other", "value": 31, "max": 70},
        ),
    ],
)
def test_a_report_of_llm_d_says_where_prompts_come_from(
    source: Source | None, kind: str, prompts: dict[str, Any]
) -> None:
    workload = Workload("burst", 2, 31, 10, 2, source=source)
    load = llmd._format_load(workload, "servegrid")["standardized"]
    assert (load["source"], load["input_seq_len"]) == (kind, prompts)
    LoadStandardized(**load)
    spread = llmd._format_load(replace(workload, output_spread=0.2), "servegrid")["standardized"]
    if source is None:
        uniform = {"distribution": "uniform", "value": 10, "min": 8, "max": 12}
        assert spread["output_seq_len"] == uniform


def test_every_trial_has_its_own_uid(results: Path) -> None:
    files = export_results(results, "llm-d").values()
    assert len({exported["run"]["uid"] for exported in files}) == len(TRIALS)


def test_a_folder_that_cannot_be_read_is_not_left_out(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = results / "cells/closed"
    closed.mkdir()
    scandir, listdir = os.scandir, os.listdir

    def refuse(path: Any, to: Callable[[Any], Any]) -> Any:  # root may read every folder
        if str(path) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return to(path)

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path, scandir))
    monkeypatch.setattr(os, "listdir", lambda path: refuse(path, listdir))
    command = ["export", str(results), "--format", "llm-d", "--output-dir", str(results / "out")]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"servegrid: {closed}: cannot be used (Permission ")


@pytest.mark.parametrize("spec", [None, {"format": 1}, [], {"deployment": {}, "workload": {}}])
def test_a_record_that_is_not_that_of_a_trial_is_named(
    spec: Any, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = results / "cells/d/c/trial-1/requests.parquet"  # as `servegrid load` writes it
    record = {"format": parquet.RECORD_FORMAT} | ({} if spec is None else {"spec": spec})
    parquet.write_table(parquet.arrow_table(columns.REQUESTS, [], record), file)
    command = ["export", str(results), "--format", "llm-d", "--output-dir", str(results / "out")]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"servegrid: {file}: is not the record of a trial of this version")
    assert printed.endswith("Move it out of the folder.\n")


@pytest.mark.parametrize("kind", ["llm-d", "vllm-bench"])
def test_an_export_without_trials_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    command: Callable[[], int] = lambda: main(  # noqa: E731
        ["export", str(tmp_path), "--format", kind, "--output-dir", str(tmp_path / "out")]
    )
    assert command() == 2
    assert "has no folder cells/" in capsys.readouterr().err
    (tmp_path / "cells").mkdir()
    assert command() == 2
    assert "contains no trials" in capsys.readouterr().err
