"""Gathering records: the order and types of the table, and errors with a remedy."""

import csv
import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from servegrid.analysis.goodput import gather_slo_table
from servegrid.analysis.slo import Slo
from servegrid.analysis.tables import (
    drift_by_allocation,
    gather_study,
    gather_trials,
    load_table,
    write_cells,
)
from servegrid.errors import RecordError
from servegrid.records import columns, parquet
from servegrid.study.config import parse_study
from servegrid.study.grid import Study, Trial


def make_trials(concurrency: int = 2, **workload: Any) -> tuple[Trial, ...]:
    """Trials of two deployments, `b` before `a`, with concurrency 1 to `concurrency`."""
    deployment = {
        "model": "m",
        "checkpoint": "models/m",
        "quantization": "q",
        "engine": "vllm",
        "gpu": "cpu",
        "max_model_len": 512,
    }
    workloads = {"concurrency": [*range(1, concurrency + 1)], "input_len": 31, "output_len": 10}
    deployments = [{"name": name} | deployment for name in ("b", "a")]
    study = {"study": "s", "workload": workloads | workload, "deployments": deployments}
    return parse_study(study).trials


def make_record(trial: Trial, **changes: Any) -> dict[str, Any]:
    return {
        "format": parquet.RECORD_FORMAT,
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "verdict": "ok",
        "verdict_detail": None,
        "engine": {"engine": "vllm", "version": "0.32.0"},
        "client": {"window_ns": [0, 10**9], "cpu_s_busiest": 0.1, "token_chunks": 2},
        "environment": {"allocation": f"{trial.deployment.name}.1", "started": "now"},
        "calibration": None,
        "metrics_before": None,
        "metrics_after": None,
    } | changes


def write_requests(folder: Path, trial: Trial, record: Mapping[str, Any] | None = None) -> None:
    """Write requests with 10 tokens. Each takes as many seconds as the concurrency."""
    n = trial.workload.concurrency
    assert n is not None
    request = {
        "wave": 0,
        "scheduled_ns": 0,
        "sent_ns": 0,
        "first_token_ns": 10**8,
        "token_ns": [10**8, n * 10**9],
        "chunk_tokens": [1, 9],
        "done_ns": n * 10**9,
        "prompt_tokens": 31,
        "completion_tokens": 10,
        "requested_tokens": 10,
    }
    record = record or make_record(trial)
    table = parquet.arrow_table(columns.REQUESTS, [request] * n, record)
    parquet.write_table(table, folder / trial.id / "requests.parquet")


def write_trial(folder: Path, trial: Trial, record: Mapping[str, Any] | None = None) -> None:
    sample = {"time_ns": 5, "device": "engine", "memory_bytes": 2**60 + 1}
    table = parquet.arrow_table(columns.TELEMETRY, [sample], record or make_record(trial))
    parquet.write_table(table, folder / trial.id / "telemetry.parquet")
    write_requests(folder, trial, record)


@pytest.fixture
def study(tmp_path: Path) -> tuple[tuple[Trial, ...], Path]:
    trials = make_trials()
    for trial in trials:
        write_trial(tmp_path, trial)
    return trials, tmp_path


StudyFolder = tuple[tuple[Trial, ...], Path]


def gather_error(trials: tuple[Trial, ...], folder: Path) -> str:
    with pytest.raises(RecordError) as caught:
        gather_trials(trials, folder)
    return str(caught.value)


def test_rows_are_in_study_order(study: StudyFolder) -> None:
    trials, folder = study
    cells = gather_trials(trials, folder)
    assert list(cells["deployment"]) == ["b", "b", "a", "a"]
    assert list(cells["concurrency"]) == [1, 2, 1, 2]
    assert list(cells["seconds_per_100_tokens"]) == [10.0, 20.0, 10.0, 20.0]
    assert list(cells["spec_digest"]) == [trial.digest for trial in trials]


def test_several_processes_gather_the_same_table(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials, folder = study
    expected = gather_trials(trials, folder)
    (folder / trials[0].id / "telemetry.parquet").unlink()
    monkeypatch.setattr("servegrid.analysis.tables._MIN_FOR_PROCESSES", 1)
    with pytest.raises(RecordError, match=r"telemetry\.parquet is missing"):
        gather_trials(trials, folder)
    pd.testing.assert_frame_equal(
        gather_trials(trials[1:], folder),
        expected.iloc[1:].reset_index(drop=True),
        check_dtype=True,
    )


def test_cells_of_an_allocation_with_drift_are_not_valid(study: StudyFolder) -> None:
    trials, folder = study
    # Drift checks of a: 1, 1.2 and 1 tokens/s. Only one of b was served, so its drift is unknown:
    # one was not run, and of one a request failed, which made its tokens/s small.
    drift_checks = pd.DataFrame(
        {
            "allocation": ["a.1 now"] * 3 + ["b.1 now"] * 3,
            "output_tokens_per_s": [1.0, 1.2, 1.0, 9.0, None, 0.5],
            "verdict": ["ok", "queued", "ok", "ok", "not_run", "timeout"],
        }
    )
    drifts = drift_by_allocation(drift_checks)
    assert drifts == {"a.1 now": pytest.approx(0.2)}
    cells = gather_trials(trials, folder, drifts).set_index("deployment")
    assert cells.loc["b", "allocation_drift"].isna().all()
    assert cells.loc["b", "valid"].all()
    assert not cells.loc["a", "valid"].any()
    for rules, evidence in cells.loc["a", ["invalid_rules", "invalid_evidence"]].to_numpy():
        assert list(rules) == ["drifted"]
        assert list(evidence) == ["output tokens/s of the drift checks differ by 20%"]


def test_a_study_is_gathered_with_the_drift_of_its_drift_checks(study: StudyFolder) -> None:
    trials, folder = study
    drift_checks = tuple(replace(trial, drift_check=True) for trial in trials[2:])
    for trial in drift_checks:
        write_trial(folder, trial)
    cells, gathered = gather_study(Study("s", trials, drift_checks), folder)
    assert list(gathered["spec_digest"]) == [trial.digest for trial in drift_checks]
    assert list(cells["spec_digest"]) == [trial.digest for trial in trials]
    # Only deployment a has drift checks. Both have 10 tokens/s.
    assert cells["allocation_drift"].isna().tolist() == [True, True, False, False]
    assert cells["allocation_drift"].dropna().tolist() == [0.0, 0.0]


def test_cells_are_written_with_units_and_loaded_without_changes(study: StudyFolder) -> None:
    trials, folder = study
    cells = gather_trials(trials, folder)
    write_cells(cells, folder / "cells.parquet", folder / "cells.csv")
    assert load_table(folder / "cells.parquet").equals(cells)
    schema = pq.read_schema(folder / "cells.parquet")
    assert schema.equals(parquet.arrow_schema(columns.CELLS), check_metadata=True)


def test_unknown_values_are_null_and_large_integers_are_exact(study: StudyFolder) -> None:
    trials, folder = study
    reason = "2 of 2 requests failed, most often: timeout: none"
    write_trial(folder, trials[1], make_record(trials[1], verdict="timeout", verdict_detail=reason))
    write_cells(gather_trials(trials, folder), folder / "cells.parquet", folder / "cells.csv")
    rows = pq.read_table(folder / "cells.parquet").to_pylist()
    assert [row["seconds_per_100_tokens"] for row in rows] == [10.0, None, 10.0, 20.0]
    assert [row["verdict_detail"] for row in rows] == [None, reason, None, None]
    assert [row["memory_peak_bytes"] for row in rows] == [2**60 + 1] * 4


def test_the_csv_has_the_same_numbers(study: StudyFolder) -> None:
    trials, folder = study
    reason = "1, 2"
    write_trial(folder, trials[1], make_record(trials[1], verdict="timeout", verdict_detail=reason))
    write_cells(gather_trials(trials[:2], folder), folder / "cells.parquet", folder / "cells.csv")
    with (folder / "cells.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        first, second = reader
    assert reader.fieldnames == [column.name for column in columns.CELLS]
    # tpot: (1 - 0.1) / 9 and (2 - 0.1) / 9, with all digits of these floats
    for row, expected in (
        (first, {"verdict": "ok", "verdict_detail": "", "valid": "True", "tpot_s_mean": "0.1"}),
        (second, {"verdict": "timeout", "verdict_detail": "1, 2", "valid": ""}),
        (second, {"tpot_s_mean": "0.2111111111111111", "seconds_per_100_tokens": ""}),
        (first, {"concurrency": "1", "request_rate": "", "memory_peak_bytes": str(2**60 + 1)}),
    ):
        assert row | expected == row


def test_stale_records_are_refused_with_the_changed_key(study: StudyFolder) -> None:
    _, folder = study
    changed = make_trials(prompts="identical")
    write_trial(folder, changed[2])
    message = gather_error(changed, folder)
    assert f"{folder}: 3 of 4 trials" in message
    assert (
        f"  {changed[0].id}: measured with a different specification: "
        'workload.prompts is "identical" and was "distinct"\n'
    ) in message
    assert changed[2].id + ":" not in message


def test_a_record_with_only_another_digest_is_refused(study: StudyFolder) -> None:
    trials, folder = study
    write_requests(folder, trials[0], make_record(trials[0], spec_digest="0" * 16))
    assert f'digest is "{trials[0].digest}" and was "{"0" * 16}"' in gather_error(trials, folder)


def test_records_with_another_format_are_refused(study: StudyFolder) -> None:
    trials, folder = study
    write_trial(folder, trials[0], make_record(trials[0], format=1))
    expected = "its record has the format 1, but this version of servegrid reads the format 4"
    assert expected in gather_error(*study)


def test_the_remedy_removes_only_stale_trials(study: StudyFolder) -> None:
    trials, folder = study
    only_b = (make_trials(prompts="identical")[1], *trials[2:])
    command = next(line for line in gather_error(only_b, folder).split("\n") if "rm -r" in line)
    assert shlex.split(command) == ["rm", "-r", str(folder / trials[1].id)]


def test_the_remedy_removes_the_folder_of_a_deployment_if_all_its_trials_are_stale(
    study: StudyFolder,
) -> None:
    trials, folder = study
    stale_b = (*make_trials(prompts="identical")[:2], *trials[2:])
    assert f"rm -r {folder / 'b'}\n" in gather_error(stale_b, folder)
    kept = make_trials(concurrency=3)[2]
    write_trial(folder, kept)
    assert f"rm -r {folder / trials[0].id} {folder / trials[1].id}\n" in gather_error(
        stale_b, folder
    )


def test_the_error_lists_up_to_ten_missing_trials(study: StudyFolder) -> None:
    _, folder = study
    trials = make_trials(concurrency=10)
    message = gather_error(trials, folder)
    assert f"{folder}: 16 of 20 trials cannot be gathered:" in message
    assert message.count(": requests.parquet is missing") == 10
    assert "  … and 6 more\n" in message
    assert "rm -r" not in message
    assert message.endswith("Run the same snakemake command again. It measures only these trials.")


def damage_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = data[len(data) // 2 : -20]
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["requests.parquet", "telemetry.parquet"])
def test_the_error_names_a_damaged_file(study: StudyFolder, name: str) -> None:
    trials, folder = study
    damage_middle(folder / trials[1].id / name)
    message = gather_error(trials, folder)
    assert f"{folder}: 1 of 4 trials" in message
    assert f"  {trials[1].id}: {name} is damaged (" in message


def test_a_file_without_a_record_counts_as_damaged(study: StudyFolder) -> None:
    trials, folder = study
    table = parquet.arrow_table(columns.REQUESTS, [])
    parquet.write_table(table, folder / trials[0].id / "requests.parquet")
    assert f"{trials[0].id}: requests.parquet is damaged" in gather_error(trials, folder)


def test_the_error_names_the_missing_key_of_a_record(study: StudyFolder) -> None:
    trials, folder = study
    record = make_record(trials[0])
    del record["verdict"]
    write_trial(folder, trials[0], record)
    assert f"{trials[0].id}: its record is not complete ('verdict')" in gather_error(trials, folder)


def test_files_from_different_measurements_are_refused(study: StudyFolder) -> None:
    trials, folder = study
    write_requests(folder, trials[0], make_record(trials[0], environment={"node": "other"}))
    assert "telemetry.parquet and requests.parquet are from different" in gather_error(
        trials, folder
    )


def test_folders_of_other_trials_are_ignored(study: StudyFolder) -> None:
    trials, folder = study
    shutil.copytree(folder / trials[0].id, folder / "old" / "cell" / "trial-1")
    assert len(gather_trials(trials, folder)) == 4


def test_a_record_is_read_from_the_metadata_of_a_file(study: StudyFolder) -> None:
    trials, folder = study
    path = folder / trials[0].id / "requests.parquet"
    assert parquet.read_record(path) == json.loads(json.dumps(make_record(trials[0])))


@pytest.mark.parametrize("name", ["requests.parquet", "telemetry.parquet"])
def test_a_changed_bit_in_the_record_is_detected(study: StudyFolder, name: str) -> None:
    """Parquet has no checksum of its metadata."""
    trials, folder = study
    path = folder / trials[0].id / name
    data = bytearray(path.read_bytes())
    data[data.rindex(b'"verdict"') + 1] ^= 1
    path.write_bytes(data)
    pq.read_table(path, page_checksum_verification=True)
    assert f"{trials[0].id}: {name} is damaged" in gather_error(trials, folder)


def test_the_table_of_slo_classes_reads_no_changed_record(study: StudyFolder) -> None:
    trials, folder = study
    cells = gather_trials(trials, folder)
    path = folder / trials[0].id / "requests.parquet"
    data = bytearray(path.read_bytes())
    data[data.rindex(b'"verdict"') + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RecordError, match=r"is damaged .* Delete it and run"):
        gather_slo_table(trials, cells, folder, {"all": Slo()})


def test_a_changed_byte_in_the_rows_is_detected(study: StudyFolder) -> None:
    trials, folder = study
    path = folder / trials[0].id / "requests.parquet"
    chunk = pq.read_metadata(path).row_group(0).column(4)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 0x55
    path.write_bytes(data)
    assert f"{trials[0].id}: requests.parquet is damaged" in gather_error(trials, folder)
