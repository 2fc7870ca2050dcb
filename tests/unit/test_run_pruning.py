"""Which workloads are not tried, because a lighter one could not be served."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from servegrid.analysis import tables
from servegrid.records import parquet
from servegrid.records.verdict import NOT_RUN, OK, OOM, Verdict
from servegrid.reference.published import load_published
from servegrid.run.pruning import (
    Outcome,
    append_outcome,
    dominated_by,
    find_dominating,
    find_outcomes,
    read_outcomes,
)
from servegrid.run.unmeasured import refuse_trial, write_unmeasured
from servegrid.study.config import load_study, parse_study
from servegrid.study.grid import Trial, Workload
from servegrid.study.source import Distribution, Source

ROOT = Path(__file__).parents[2]
REHEARSAL = load_study(ROOT / "config/rehearsal.yaml")
MISTRAL = REHEARSAL.deployments[0]


def burst(concurrency: int, input_len: int, **changes: Any) -> Workload:
    return replace(Workload("burst", concurrency, input_len, 100, concurrency), **changes)


def outcome(concurrency: int, input_len: int, verdict: str, **changes: Any) -> Outcome:
    workload = burst(concurrency, input_len, **changes)
    return Outcome(f"{workload.cell}/trial-1", workload, verdict)


def dominated(concurrency: int, input_len: int, *outcomes: Outcome, **changes: Any) -> str | None:
    found = find_dominating(burst(concurrency, input_len, **changes), outcomes)
    return None if found is None else found.trial


@pytest.mark.parametrize(
    ("concurrency", "input_len", "is_dominated"),
    [
        (8, 480, True),  # its repeat
        (16, 480, True),
        (8, 822, True),
        (128, 2193, True),
        (4, 2193, False),  # fewer users
        (128, 296, False),  # shorter prompts
        (4, 296, False),
    ],
)
def test_at_least_as_many_users_and_as_long_prompts(
    concurrency: int, input_len: int, is_dominated: bool
) -> None:
    expected = "burst-c8-i480-o100/trial-1" if is_dominated else None
    assert dominated(concurrency, input_len, outcome(8, 480, OOM)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"output_len": 50},
        {"protocol": "closed_loop"},
        {"timeout_s": 1200.0},
        {"prompts": "identical"},
    ],
)
def test_other_settings_must_be_the_same(changes: dict[str, Any]) -> None:
    assert dominated(16, 480, outcome(8, 480, OOM)) is not None
    assert dominated(16, 480, outcome(8, 480, OOM), **changes) is None


def test_open_loops_are_compared_by_their_rate() -> None:
    rate = Workload("poisson", None, 31, 100, 2000, request_rate=4.0)
    failed = Outcome("r4", rate, "timeout")
    assert find_dominating(replace(rate, request_rate=5.0), [failed]) is failed
    assert find_dominating(replace(rate, request_rate=3.0), [failed]) is None


def test_a_served_workload_shows_that_the_load_was_not_the_cause() -> None:
    failed, served = outcome(8, 480, "http_error"), outcome(16, 822, OK)
    assert dominated(32, 822, failed) is not None
    assert dominated(32, 822, failed, served) is None
    # Fewer users than those of the failed one show nothing.
    assert dominated(32, 822, failed, outcome(4, 822, OK)) is not None
    # Its own trial before the failed one shows it, too.
    assert dominated(8, 480, outcome(8, 480, "queued"), failed) is None


def test_the_verdict_names_what_dominates() -> None:
    assert dominated_by(outcome(8, 480, OOM)) == Verdict(
        "not_run",
        "dominated by burst-c8-i480-o100/trial-1: oom",
        {"reason": "dominated", "by": "burst-c8-i480-o100/trial-1", "by_verdict": "oom"},
    )


def test_the_article_loses_no_figure_from_light_to_heavy() -> None:
    """In the published tables, every load above a dash has a dash as well."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in load_published("inria-2024").rows:
        key = tuple(row[name] for name in ("model", "quantization", "gpu", "gpu_count"))
        groups.setdefault(key, []).append(row)
    assert len(groups) == 7
    tried = dashes = 0
    for rows in groups.values():
        known: list[Outcome] = []
        for row in sorted(rows, key=lambda each: each["concurrency"] * (each["input_len"] + 100)):
            is_dash = math.isnan(row["seconds_per_100_tokens"])
            is_pruned = dominated(row["concurrency"], row["input_len"], *known) is not None
            assert is_dash or not is_pruned, row
            dashes += is_dash
            tried += is_dash and not is_pruned
            if not is_pruned:
                verdict = "http_error" if is_dash else OK
                known.append(outcome(row["concurrency"], row["input_len"], verdict))
    assert dashes == 27
    assert tried < dashes


def test_only_the_load_prunes() -> None:
    trial = REHEARSAL.trials[0]
    assert Outcome.of(trial, "wrong_tokens", {"failed_share": 1.0}) is None
    assert Outcome.of(trial, "http_error", {"failed_share": 0.1}) is None
    assert Outcome.of(trial, NOT_RUN, {"reason": "dominated"}) is None
    assert Outcome.of(trial, "preempted", {}) == Outcome(
        "burst-c1-i31-o100/trial-1", trial.workload, "preempted"
    )


def write(folder: Path, trial: Trial, verdict: Verdict) -> Path:
    requests = folder / trial.id / "requests.parquet"
    where = {"allocation": "a", "started": "2026-11-23T01:02:03+00:00"}
    engine = {"engine": "emulated", "time_scale": 0.005}
    samples = requests.with_name("telemetry.parquet")
    # Allocations of all engines but the emulated one calibrate the load client.
    calibration = {"arrival_error_s_p99": 1e-5, "cpu_s_per_1000_events": 0.01}
    written = write_unmeasured(trial, verdict, requests, samples, engine, where, calibration)
    assert written == verdict.name
    return requests


def test_records_of_earlier_allocations_count(tmp_path: Path) -> None:
    own = [each for each in REHEARSAL.trials if each.deployment == MISTRAL][:5]
    verdicts = [Verdict(OOM), Verdict(NOT_RUN), Verdict("timeout", "t", {"failed_share": 0.01})]
    for trial, verdict in zip(own, verdicts, strict=False):
        write(tmp_path, trial, verdict)
    write(tmp_path, own[3], Verdict("server_died")).write_bytes(b"damaged")
    other = replace(own[4], deployment=replace(MISTRAL, max_num_seqs=8))
    write(tmp_path, other, Verdict(OOM))  # another specification under the same name
    assert list(find_outcomes(tmp_path, MISTRAL)) == [
        Outcome(f"{own[0].cell}/trial-1", own[0].workload, OOM)
    ]
    assert list(find_outcomes(tmp_path / "none", MISTRAL)) == []


def test_a_journal_returns_what_was_added(tmp_path: Path) -> None:
    journal = tmp_path / "outcomes.jsonl"
    assert read_outcomes(journal) == []
    added = [outcome(8, 480, OOM), outcome(1, 31, OK)]
    for each in added:
        append_outcome(journal, each)
    assert read_outcomes(journal) == added


def test_cells_that_were_not_tried_are_rows_of_the_table(tmp_path: Path) -> None:
    """A study whose longest prompt does not fit, and one cell of which is dominated."""
    config = {
        "study": "small",
        "workload": {"concurrency": [1, 2], "input_len": [31, 40]},
        "deployments": [
            {
                "model": "m",
                "checkpoint": "org/m",
                "quantization": "fp16",
                "engine": "emulated",
                "gpu": "v100-16gb",
                "max_model_len": 135,
                "engine_args": {"time_scale": 0.005},
            }
        ],
    }
    study = parse_study(config)
    assert [trial.cell for trial in study.unsupported] == ["burst-c1-i40-o100", "burst-c2-i40-o100"]
    for trial in study.trials:
        if trial.unsupported:
            requests = tmp_path / trial.id / "requests.parquet"
            assert refuse_trial(trial, requests, requests.with_name("telemetry.parquet")) == (
                "unsupported"
            )
        else:
            write(tmp_path, trial, dominated_by(outcome(1, 31, OOM)))
    cells, _ = tables.gather_study(study, tmp_path)
    rows = {
        (int(row["concurrency"]), int(row["input_len"])): row for row in cells.to_dict("records")
    }
    assert cells["verdict"].tolist() == ["not_run", "not_run", "unsupported", "unsupported"]
    assert rows[1, 40]["verdict_detail"] == (
        "input_len 40 plus output_len 100 is more than max_model_len 135"
    )
    assert rows[2, 31]["verdict_evidence"] == (
        '{"by": "burst-c1-i31-o100/trial-1", "by_verdict": "oom", "reason": "dominated"}'
    )
    assert set(cells["time_scale"]) == {0.005}
    assert cells["allocation"].isna().tolist() == [False, False, True, True]
    assert cells["valid"].isna().all()
    assert cells["seconds_per_100_tokens"].isna().all()
    assert set(cells["requests"]) == {0}
    assert cells["client_headroom"].isna().all()
    tables.write_cells(cells, tmp_path / "cells.parquet", tmp_path / "cells.csv")
    record = parquet.read_record(tmp_path / study.trials[-1].id / "requests.parquet")
    assert record["environment"] == {"allocation": None, "started": None}


def test_a_journal_keeps_workloads_with_a_source_and_a_profile(tmp_path: Path) -> None:
    source = Source("random", input_lens=Distribution("lognormal", 0.5, 900))
    changing: dict[str, Any] = {
        "protocol": "profile",
        "request_rate": 2.0,
        "rate_profile": (0.0, 1.0),
    }
    kept = [
        outcome(4, 240, OOM, source=source),
        Outcome("profile", replace(burst(4, 240), concurrency=None, **changing), OOM),
    ]
    for each in kept:
        append_outcome(tmp_path / "journal", each)
    assert read_outcomes(tmp_path / "journal") == kept
    assert dominated(8, 480, *read_outcomes(tmp_path / "journal"), source=source)
