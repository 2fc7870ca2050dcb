"""`servegrid plan`, from the command line, and its review of what was measured."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from servegrid.analysis.capacity import HardwarePrices
from servegrid.analysis.earlier import earlier_bursts, find_measured_trials
from servegrid.analysis.plan import AllocationPlan, Range, StudyPlan, plan_study
from servegrid.analysis.predictor import load_calibration
from servegrid.analysis.review import review_study
from servegrid.analysis.tables import gather_trials
from servegrid.cli.main import main
from servegrid.errors import ModelError
from servegrid.records import columns, parquet
from servegrid.reference.checkpoint import find_model
from servegrid.report.plan_report import render_plan
from servegrid.study.config import load_study, parse_study
from servegrid.study.grid import Study, Trial
from servegrid.study.models import locate

ROOT = Path(__file__).parents[2]
SECOND_NS = 10**9
STUDY: dict[str, Any] = {
    "study": "small",
    "workload": {"concurrency": [1, 2, 4], "input_len": 100, "drift_checks": False},
    "deployments": [
        {
            "model": "mistral-7b",
            "checkpoint": "/nonexistent/mistral",
            "tokenizer": "/nonexistent/mistral",
            "quantization": "fp16",
            "engine": "vllm",
            "gpu": "a100-40gb",
            "max_model_len": 4096,
        }
    ],
}
NAME = "mistral-7b_fp16_vllm_1xa100-40gb"


def write_study(folder: Path, **changes: Any) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY | changes), encoding="utf-8")
    return file


def write_trial(folder: Path, trial: Trial, seconds: float, verdict: str = "ok") -> None:
    """A record of a burst of which each request took `seconds` for 100 tokens."""
    end = round(seconds * SECOND_NS)
    request = {
        "wave": 0,
        "scheduled_ns": 0,
        "sent_ns": 0,
        "first_token_ns": end // 2,
        "token_ns": [end // 2, end],
        "chunk_tokens": [1, 99],
        "done_ns": end,
        "prompt_tokens": trial.workload.input_len,
        "completion_tokens": 100,
        "requested_tokens": 100,
    }
    record = {
        "format": parquet.RECORD_FORMAT,
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "verdict": verdict,
        "verdict_detail": None,
        "engine": {"engine": "vllm", "version": "0"},
        "client": {"window_ns": [0, end], "cpu_s_busiest": 0.1, "token_chunks": 2},
        "environment": {"allocation": "a", "started": "then"},
        "calibration": None,
        "metrics_before": None,
        "metrics_after": None,
    }
    requests = [request] * (trial.workload.concurrency or 1)
    for name, table, rows in (
        ("requests", columns.REQUESTS, requests),
        ("telemetry", columns.TELEMETRY, [{"time_ns": 5, "device": "engine"}]),
    ):
        path = folder / trial.id / f"{name}.parquet"
        parquet.write_table(parquet.arrow_table(table, rows, record), path)


def test_the_articles_study_with_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    study, profile = ROOT / "config/inria-2024.yaml", ROOT / "profiles/local"
    assert main(["plan", "--configfile", str(study), "--profile", str(profile), "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert len(parsed["deployments"]) == 7
    assert sum(len(each["cells"]) for each in parsed["deployments"]) == 392
    assert all(each["allocations"][0]["parts"] >= 1 for each in parsed["deployments"])


@pytest.mark.parametrize(
    "name", sorted({path.name for path in (ROOT / "config").glob("*.yaml")} - {"hardware.yaml"})
)
def test_every_study_of_config_has_a_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--configfile", str(ROOT / "config" / name)]) == 0
    text = capsys.readouterr().out
    assert "GPU-hours" in text and "not predicted" not in text
    on_cpu = name in ("demo.yaml", "external.yaml", "protocols.yaml")
    assert ("no data for a CPU" in text) == on_cpu


def test_the_plan_on_a_cpu_names_no_gpu_hours_and_few_requests_and_fractions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_cpu = STUDY["deployments"][0] | {"gpu": "cpu", "gpu_count": 0}
    users = {"protocol": "closed_loop", "concurrency": 1, "requests_per_user": 5, "input_len": 9}
    few = write_study(tmp_path, deployments=[on_cpu], workload=users)
    assert main(["plan", "--configfile", str(few), "--directory", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "GPU-hours: 0, because no deployment has a GPU.\n" in text
    assert "Too few requests for valid results: closed_loop-c1-i9-o100. At least 20" in text
    assert "rows: concurrent requests, columns" in text
    rates = {"protocol": "poisson", "request_rate": "sweep", "input_len": 9}
    swept = write_study(tmp_path, workload=rates)
    assert main(["plan", "--configfile", str(swept), "--directory", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "rows: rate / rate at saturation, columns: prompt tokens" in text
    assert "Too few" not in text and "because no deployment" not in text


def test_of_a_search_the_plan_names_no_cells_to_measure_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for grid, named in (("full", True), ("frontier", False)):
        file = write_study(tmp_path, workload=STUDY["workload"] | {"grid": grid})
        assert main(["plan", "--configfile", str(file), "--directory", str(tmp_path)]) == 0
        assert ("measured first, these" in capsys.readouterr().out) == named


def test_a_deployment_that_cannot_work_sets_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = STUDY["deployments"][0] | {"model": "llama-3-70b"}
    file = write_study(tmp_path, deployments=[large])
    assert main(["plan", "--configfile", str(file), "--directory", str(tmp_path)]) == 1
    assert "cannot work: weights of 131.3 GiB per GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configfile", "missing.yaml"], "missing.yaml: cannot be read"),
        (["--profile", "missing"], "--profile: missing/config.yaml cannot be read"),
        (["--hardware", "missing.yaml"], "missing.yaml: cannot be read"),
        (["--review"], "no cell of this study is finished. Run the study first"),
    ],
)
def test_bad_input_gives_one_error(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--configfile", str(write_study(tmp_path)), "--directory", str(tmp_path)]
    assert main(["plan", *base, *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


EMULATED = STUDY["deployments"][0] | {
    "engine": "emulated",
    "gpu": "v100-16gb",
    "gpu_count": 2,
    "engine_args": {"timing": "inria-2024"},
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"startup_s": None}, "engine_args.startup_s: None is not a number of seconds"),
        ({"startup_s": "soon"}, "engine_args.startup_s: 'soon' is not a number of seconds"),
        ({"time_scale": 1e308}, "engine_args.time_scale: 1e+308 is not a number above 0"),
        ({"slowdown": 5e-324}, "engine_args.slowdown: 5e-324 is not a number above 0"),
        ({"timing": None}, "engine_args.timing: None is not `roofline`, the name"),
        ({"timing": False}, "engine_args.timing: False is not `roofline`, the name"),
        ({"time_scael": 1}, "Did you mean `time_scale`?"),
    ],
)
def test_wrong_arguments_of_an_emulated_engine_give_one_error(
    arguments: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = EMULATED | {"engine_args": EMULATED["engine_args"] | arguments}
    file = write_study(tmp_path, deployments=[wrong])
    assert main(["plan", "--configfile", str(file), "--directory", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"servegrid: {file}: deployment `")
    assert message in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


@pytest.mark.parametrize("command", ["plan", "frontier", "fetch", "doctor"])
def test_a_file_is_no_working_directory(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_study(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main([command, "--configfile", file, "--directory", file])
    assert ended.value.code == 2
    assert f"argument --directory: {file!r} is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "frontier"])
def test_the_study_can_be_a_pipe(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end, start = os.pipe()
    os.write(start, yaml.safe_dump(STUDY | {"slo": {"ttft_s": 1}}).encode())
    os.close(start)
    try:
        status = main([command, "--configfile", f"/dev/fd/{end}", "--directory", str(tmp_path)])
    finally:
        os.close(end)
    assert (status, capsys.readouterr().err) == (0 if command == "plan" else 1, "")


def test_a_model_in_a_folder_that_cannot_be_entered_gives_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As in the folder of another user: root may enter that one, so a name too long stands for it.
    for checkpoint, reason in (("x" * 300, "File name too long"), ("~no-such-user/model", "home")):
        deployment = STUDY["deployments"][0] | {"checkpoint": checkpoint}
        with pytest.raises(ModelError, match=rf"^checkpoint `.*`: cannot be read \(.*{reason}"):
            locate(deployment["checkpoint"], tmp_path)
        file = write_study(tmp_path, deployments=[deployment])
        assert main(["plan", "--configfile", str(file), "--directory", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_a_table_of_another_version_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, study = write_study(tmp_path), parse_study(STUDY)
    write_trial(tmp_path / "results/cells", study.trials[0], 6.0)
    table = tmp_path / "results/tables/cells.parquet"
    table.parent.mkdir(parents=True)
    options = ["plan", "--configfile", str(file), "--directory", str(tmp_path), "--json"]
    plans = []
    for content in (None, pa.table({"spec_digest": [study.trials[0].digest]}), b"cut off"):
        if isinstance(content, bytes):
            table.write_bytes(content)
        elif content is not None:
            pq.write_table(content, table)
        assert main(options) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1] == plans[2]
    assert plans[0]["deployments"][0]["measured_cells_used"] == 1


def test_the_plan_says_how_many_nodes_each_deployment_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    options = ["plan", "--configfile", "config/inria-2024.yaml"]
    assert main([*options, "--profile", "profiles/plafrim", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["deployments"]
    # A node has two GPUs, and only Mixtral 8x22B needs four.
    nodes = {each["deployment"]: each["nodes"] for each in planned}
    assert nodes.pop("mixtral-8x22b_awq-4bit_vllm_4xa100-40gb") == 2
    assert list(nodes.values()) == [1] * 6
    assert main([*options, "--profile", "profiles/plafrim"]) == 0
    assert capsys.readouterr().out.count("\n  nodes: 2\n") == 1
    assert main([*options, "--json"]) == 0  # without a profile nobody knows
    planned = json.loads(capsys.readouterr().out)["deployments"]
    assert {each["nodes"] for each in planned} == {None}


def test_a_deployment_that_its_nodes_cannot_run_cannot_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds, packages = tmp_path / "kinds.yaml", tmp_path / "env/lib/python3.12/site-packages"
    (packages / "vllm-0.10.1.1.dist-info").mkdir(parents=True)
    kind = {"gpus_of_node": 1, "interface": "ib0", "python": str(tmp_path / "env/bin/python")}
    kinds.write_text(yaml.safe_dump({"a100-40gb": kind}))
    (tmp_path / "config.yaml").write_text(f"executor: submitit\nsubmitit-kinds: {kinds}\n")
    file = write_study(tmp_path, deployments=[STUDY["deployments"][0] | {"gpu_count": 2}])
    options = ["plan", "--configfile", str(file), "--profile", str(tmp_path)]
    assert main(options) == 1
    text = capsys.readouterr().out
    assert f"cannot work: {kinds}: a100-40gb: " in text
    assert "vLLM 0.10.1.1 of the kind `a100-40gb` cannot start on several nodes" in text


def test_a_kind_that_the_profile_lacks_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file = write_study(tmp_path, deployments=[STUDY["deployments"][0] | {"gpu": "h100-80gb"}])
    assert main(["plan", "--configfile", str(file), "--profile", "profiles/plafrim"]) == 2
    assert "kinds.yaml: has no kind `h100-80gb`" in capsys.readouterr().err


def test_what_is_measured_will_not_run_and_teaches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, study = write_study(tmp_path), parse_study(STUDY)
    options = ["plan", "--configfile", str(file), "--directory", str(tmp_path), "--json"]
    assert main(options) == 0
    (before,) = json.loads(capsys.readouterr().out)["deployments"]
    for trial in study.trials[:2]:
        write_trial(tmp_path / "results/cells", trial, 6.0)
    changed = parse_study(STUDY | {"workload": STUDY["workload"] | {"seed": 1}}).trials[2]
    write_trial(tmp_path / "results/cells", changed, 6.0)  # another specification: runs again
    assert main(options) == 0
    (after,) = json.loads(capsys.readouterr().out)["deployments"]
    assert [cell["missing"] for cell in after["cells"]] == [0, 0, 1]
    assert after["measured_cells_used"] == 2
    unmeasured = [each["cells"][2]["expected_s_per_100_tokens"] for each in (before, after)]
    assert unmeasured[1]["value"] > 1.5 * unmeasured[0]["value"]
    assert (
        unmeasured[1]["high"] / unmeasured[1]["low"] < unmeasured[0]["high"] / unmeasured[0]["low"]
    )


def test_the_plan_shows_measured_times_and_none_for_what_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, study = write_study(tmp_path), parse_study(STUDY)
    for trial, verdict in zip(study.trials, ("ok", "not_run"), strict=False):
        write_trial(tmp_path / "results/cells", trial, 6.25, verdict)
    options = ["plan", "--configfile", str(file), "--directory", str(tmp_path)]
    assert main(options) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert (rows["1"], rows["2"]) == (["6.25*"], ["-"])
    assert float(rows["4"][0]) > 0  # a prediction, without a mark
    overview = next(line for line in text.splitlines() if line.startswith(NAME)).split()
    assert overview[3:7] == ["3", "0", "0", "2"]  # fit, queue, can't, done
    assert "    *: measured, -: not served, or not run\n" in text
    write_trial(tmp_path / "results/cells", study.trials[2], 7.0)
    assert main(options) == 0
    text = capsys.readouterr().out
    assert "\nNothing is left to measure.\n" in text
    assert "GPU-hours:" not in text and "95% interval" not in text
    assert main([*options, "--review", "--json"]) == 0
    (review,) = json.loads(capsys.readouterr().out)["deployments"]
    assert review["finished"] == 2  # the one that was not run is no result


def test_a_very_short_time_has_no_sign() -> None:
    """The minus of an exponent is not the sign of a cell that was not served."""
    plan = made_plan(parse_study(STUDY))
    planned = tuple(
        replace(each, cells=tuple(replace(cell, measured_s=1.5e-5) for cell in each.cells))
        for each in plan.deployments
    )
    text = render_plan(replace(plan, deployments=planned), HardwarePrices("USD", {}), False)
    assert "1.5e-05*" in text
    assert "    *: measured\n" in text


def test_the_plan_says_how_long_all_allocations_take_and_that_whole_nodes_are_paid(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = STUDY["deployments"][0]
    study = parse_study(STUDY | {"deployments": [entry, entry | {"name": "second"}]})
    plan = made_plan(study)
    times = (Range(7200, 3600, 14400), Range(3600, 1800, 7200))
    planned = tuple(
        replace(each, allocations=(AllocationPlan(1, 3, seconds, seconds * (1 / 3600)),))
        for each, seconds in zip(plan.deployments, times, strict=True)
    )
    text = render_plan(replace(plan, deployments=planned), HardwarePrices("USD", {}), False)
    assert (
        "\nTime: 3 (1.5 to 6) h if one deployment runs after another, 2 (1 to 4) h if all run at "
        "the same time, without the wait for nodes.\n"
    ) in text
    assert "GPU-hours: 3 (1.5 to 6).\n" in text
    monkeypatch.chdir(ROOT)
    options = ["plan", "--configfile", "config/inria-2024.yaml", "--profile", "profiles/plafrim"]
    assert main(options) == 0  # Codestral in 4 bits uses one of the two GPUs of a node
    assert "All GPUs of a node count" in capsys.readouterr().out


def test_the_review_holds_predictions_against_finished_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, study = write_study(tmp_path), parse_study(STUDY)
    for trial in study.trials:
        write_trial(tmp_path / "results/cells", trial, 6.0)
    options = ["plan", "--configfile", str(file), "--directory", str(tmp_path), "--review"]
    assert main([*options, "--json"]) == 0
    (review,) = json.loads(capsys.readouterr().out)["deployments"]
    assert (review["deployment"], review["finished"], review["cells"]) == (NAME, 3, 3)
    # Reading 14.24 GB a hundred times at 1555 GB/s takes 0.916 s.
    assert review["over_bound"] == pytest.approx(6 / 0.916, rel=0.01)
    assert review["below_bound"] == 0 and review["covered"] < 3  # three times too slow
    assert main(options) == 0
    assert "0 of 3" in capsys.readouterr().out


def test_the_frontier_says_that_drift_makes_trials_not_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_study(tmp_path, workload=STUDY["workload"] | {"drift_checks": True})
    study = load_study(file, tmp_path)
    for trial in study.trials:
        write_trial(tmp_path / "results/cells", trial, 6.0)
    options = ["frontier", "--configfile", str(file), "--directory", str(tmp_path)]
    assert main(options) == 0
    assert "Not valid" not in capsys.readouterr().out
    for check, seconds in zip(study.drift_checks, (5.0, 6.0, 7.0), strict=True):  # 28% apart
        write_trial(tmp_path / "results/cells", check, seconds)
    assert main(options) == 0
    assert "\nNot valid: 3 of 3 trials." in capsys.readouterr().out


def made_plan(study: Study) -> StudyPlan:
    facts = {each.name: find_model(each, Path("/nonexistent")) for each in study.deployments}
    return plan_study(study, facts, load_calibration())


def test_the_review_by_hand() -> None:
    """One cell took twice the prediction, one was not served, one queued though it should fit."""
    study = parse_study(STUDY)
    plan = made_plan(study)
    cells = []
    for cell, factor in zip(plan.deployments[0].cells, (2.0, None, 1.0), strict=True):
        assert cell.expected_s is not None
        cells.append(
            {
                "deployment": NAME,
                **{key: getattr(cell.workload, key) for key in ("protocol", "concurrency")},
                **{key: getattr(cell.workload, key) for key in ("request_rate", "input_len")},
                "output_len": 100,
                "verdict": "ok" if factor else "timeout",
                "verdict_detail": None if factor else "4 of 4 requests failed",
                "seconds_per_100_tokens": factor and factor * cell.expected_s.value,
                "waiting_max": 3 if factor == 1.0 else 0,
            }
        )
    (review,) = review_study(plan, pd.DataFrame(cells))
    assert (review.finished, review.cells) == (3, 2)
    assert review.median_ratio == pytest.approx((0.5 * 1.0) ** 0.5)
    assert review.median == pytest.approx(100 * (2**0.5 - 1))  # between 1 and 2
    assert [each.split(": ")[0] for each in review.surprises] == [
        "burst-c2-i100-o100",
        "burst-c4-i100-o100",
    ]
    assert "timeout: 4 of 4" in review.surprises[0] and "up to 3 requests" in review.surprises[1]


def test_efficiency_columns_by_hand(tmp_path: Path) -> None:
    """One request of 6 s: 100 × 14.238e9 bytes of weights and 99 × 100 × 131072 of KV cache; 2 ×
    6.978e9 operations for 199 tokens, and 2 × 0.131e9 for 100."""
    study = parse_study(STUDY)
    write_trial(tmp_path, study.trials[0], 6.0)
    (row,) = gather_trials(study.trials[:1], tmp_path).to_dict("records")
    read = 100 * 14.238e9 + 99 * 100 * 131072
    flop = 2 * 6.978e9 * 199 + 2 * 0.131e9 * 100
    assert row["bound_s_per_100_tokens"] == pytest.approx(read / 1555e9)
    assert row["measured_over_bound"] == pytest.approx(6 / (read / 1555e9))
    assert row["achieved_bandwidth_gb_s"] == pytest.approx(read / 6 / 1e9)
    assert row["achieved_tflops"] == pytest.approx(flop / 6 / 1e12)
    expected = made_plan(study).deployments[0].cells[0].expected_s
    assert expected is not None
    assert row["predicted_over_measured"] == pytest.approx(expected.value / 6, rel=1e-4)


def test_efficiency_of_an_unknown_model_is_null(tmp_path: Path) -> None:
    entry = STUDY["deployments"][0] | {"model": "new"}
    study = parse_study(STUDY | {"deployments": [entry]})
    write_trial(tmp_path, study.trials[0], 6.0)
    (row,) = gather_trials(study.trials[:1], tmp_path).to_dict("records")
    assert pd.isna(row["bound_s_per_100_tokens"]) and pd.isna(row["predicted_over_measured"])


def test_only_complete_records_of_this_specification_count(tmp_path: Path) -> None:
    study = parse_study(STUDY)
    assert find_measured_trials(study, tmp_path / "none") == []
    for trial in study.trials:
        write_trial(tmp_path, trial, 6.0)
    (tmp_path / study.trials[0].id / "telemetry.parquet").unlink()
    (tmp_path / study.trials[1].id / "requests.parquet").write_bytes(b"torn")
    assert find_measured_trials(study, tmp_path) == [study.trials[2]]


def test_times_of_an_emulated_engine_teach_without_their_scale() -> None:
    study = load_study(ROOT / "config/rehearsal.yaml")  # 200 times as fast
    name = study.deployments[0].name
    row = {"deployment": name, "concurrency": 2, "input_len": 31, "output_len": 50}
    cells = pd.DataFrame([row | {"seconds_per_100_tokens": 0.01, "think_time_s": 0.0}])
    bursts = earlier_bursts(study, cells)[name]
    assert bursts.seconds == pytest.approx([0.01 * 0.5 * 200])
