"""Endpoints that stop early (`output_len_exact: false`): what is served, what figures mean, marks.

Expected values are calculated by hand from what a scripted server sends.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.deployments import EXTERNAL_ENTRY
from helpers.scripted_server import Answer, Request, completion, scripted_server
from servegrid.analysis.capacity import Demand, HardwarePrices, plan_capacity
from servegrid.analysis.comparison import compare
from servegrid.analysis.engine_comparison import compare_engines
from servegrid.analysis.metrics import cell_row
from servegrid.analysis.published import compare_with_published, published_summary
from servegrid.analysis.summary import summarise
from servegrid.analysis.tables import cast_columns
from servegrid.analysis.titles import deployment_titles, figure_notes
from servegrid.analysis.validity import Evidence, Validity, check_validity
from servegrid.cli.main import main
from servegrid.client import measure
from servegrid.engines import Site
from servegrid.engines.external import start_engine
from servegrid.errors import ComparisonError, EngineError
from servegrid.records import columns, parquet
from servegrid.reference.published import load_published
from servegrid.report.capacity_report import render_capacity_report
from servegrid.report.page.payload import build_payload
from servegrid.study.config import parse_study
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Study, Trial, Workload

ENTRY = EXTERNAL_ENTRY | {"endpoint": EXTERNAL_ENTRY["endpoint"] | {"url": "http://node:30000/v1"}}
MANAGED = {key: ENTRY[key] for key in ("model", "quantization", "gpu", "max_model_len")}
BURST = Workload("burst", 4, 9, 5, 4, warmup_waves=0, timeout_s=20, idle_timeout_s=10)


def study(entry: dict[str, Any] | None = None, **endpoint: Any) -> Study:
    deployment = entry or {**ENTRY, "endpoint": ENTRY["endpoint"] | endpoint}
    workload = {"concurrency": 4, "input_len": 31, "output_len": 4}
    return parse_study({"study": "s", "workload": workload, "deployments": [deployment]})


@pytest.mark.parametrize(
    ("entry", "digest", "deployment_digest"),
    [
        # From the version before the key existed.
        (ENTRY, "5bb71d16240cb9ac", "8e952d1b7aa735ee"),
        (
            {**ENTRY, "endpoint": ENTRY["endpoint"] | {"verify_tls": False}},
            "934f5d96df422729",
            "05a6e14cc039ea14",
        ),
        (
            {**MANAGED, "engine": "vllm", "checkpoint": "org/m"},
            "e2c2b53a29de7b4a",
            "49b36e9bbefffe03",
        ),
    ],
)
def test_studies_without_the_key_keep_their_identity(
    entry: dict[str, Any], digest: str, deployment_digest: str
) -> None:
    (trial,) = study(entry).trials
    assert (trial.digest, trial.deployment.digest) == (digest, deployment_digest)


def test_true_is_the_default_and_false_is_another_deployment() -> None:
    default, exact, early = (
        study(**keys).trials[0]
        for keys in ({}, {"output_len_exact": True}, {"output_len_exact": False})
    )
    assert exact.spec == default.spec
    assert early.spec["deployment"]["endpoint"]["output_len_exact"] is False
    assert (early.digest, early.allocation) != (default.digest, default.allocation)
    again = Trial.from_spec(json.loads(early.spec_json))
    assert again == early and not again.deployment.output_len_exact


def stopping_at(*tokens: int, itl_s: float = 0.0) -> Callable[[Request], Answer]:
    """The first request of the load gets the first number of tokens, and so on; the probe all."""

    def respond(request: Request) -> Answer:
        name = request.headers["X-Request-Id"].rpartition("/")[2]
        count = tokens[int(name)] if name.isdigit() else None
        return completion(request, count, itl_s=itl_s)

    return respond


def test_fewer_tokens_are_served_and_more_or_none_fail() -> None:
    with scripted_server(stopping_at(5, 2, 6, 0)) as server:
        early = measure(Endpoint(server.url, "m", output_len_exact=False), BURST, None, "s")
        exact = measure(Endpoint(server.url, "m"), BURST, None, "t")
    kind = "wrong_completion_tokens"
    more, none = f"{kind}: 6 generated, 5 requested", f"{kind}: 0 generated, 5 requested"
    assert early.errors == [None, None, more, none]
    assert exact.errors == [None, f"{kind}: 2 generated, 5 requested", more, none]
    rows = early.requests.to_pylist()
    assert [row["completion_tokens"] for row in rows] == [5, 2, 6, 0]
    assert [row["requested_tokens"] for row in rows] == [5] * 4
    assert [sum(row["chunk_tokens"]) for row in rows[:2]] == [5, 2]
    assert (early.facts["stopped_early"], exact.facts["stopped_early"]) == (1, 0)
    # The server is still asked for all tokens: it may be able to.
    assert all(request.body["ignore_eos"] for request in server.requests)
    assert all(request.body["min_tokens"] == 5 for request in server.requests)


@pytest.mark.parametrize("reason", ["abort", "error", "cancelled", "timeout"])
def test_a_response_that_the_server_broke_off_is_not_served(reason: str) -> None:
    """SGLang ends an aborted request like a complete one, with another reason."""

    def respond(request: Request) -> Answer:
        answer = stopping_at(2, 2, 2, 2)(request)
        name = request.headers["X-Request-Id"]
        if not name.endswith("/1"):
            return answer
        pieces = [
            (pause, piece.replace(b'"stop"', b'"%b"' % reason.encode()))
            for pause, piece in answer.pieces
        ]
        return Answer(pieces, answer.status, answer.media_type)

    with scripted_server(respond) as server:
        found = measure(Endpoint(server.url, "m", output_len_exact=False), BURST, None, "s")
    error = f"wrong_completion_tokens: 2 generated, 5 requested (finish_reason {reason})"
    assert found.errors == [None, error, None, None]


def test_a_response_without_usage_still_fails() -> None:
    def respond(request: Request) -> Answer:
        answer = stopping_at(2, 2, 2, 2)(request)
        kept = [(pause, piece) for pause, piece in answer.pieces if b"usage" not in piece]
        return Answer(kept, answer.status, answer.media_type)

    with scripted_server(respond) as server:
        found = measure(Endpoint(server.url, "m", output_len_exact=False), BURST, None, "s")
    assert {error.partition(":")[0] for error in found.errors if error} == {"usage_missing"}


def test_the_bring_up_takes_a_short_response_only_where_the_study_says_so(
    word_tokenizer: Path,
) -> None:
    def start(**keys: Any) -> None:
        endpoint = {"url": server.url, "model": "m", "engine": "tgi", **keys}
        entry = ENTRY | {"tokenizer": str(word_tokenizer), "endpoint": endpoint}
        with start_engine(study(entry).deployments[0], Site(word_tokenizer)) as engine:
            assert engine.endpoint.output_len_exact is False

    with scripted_server(lambda request: completion(request, 1)) as server:
        start(output_len_exact=False)
        with pytest.raises(EngineError, match=r"1 generated, 4 requested.*output_len_exact: false"):
            start()
    with (
        scripted_server(lambda request: completion(request, 9)) as server,
        pytest.raises(
            EngineError, match=r"9 generated, 4 requested.*at least one token and no more"
        ),
    ):
        start(output_len_exact=False)


def test_servegrid_load_takes_short_responses_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cell.parquet"
    words = ["--model", "m", "--concurrency", "2", "--requests", "2", "--protocol", "burst"]
    words += ["--input-len", "9", "--output-len", "5", "--output", str(out), "--warmup-waves", "0"]
    with scripted_server(stopping_at(5, 3)) as server:
        command = ["load", "--url", server.url, *words]
        assert main(command) == 1
        assert main([*command, "--allow-early-stop"]) == 0
    assert "stopped early  1 responses, with fewer tokens" in capsys.readouterr().out
    assert pq.read_table(out)["completion_tokens"].to_pylist() == [5, 3]
    assert parquet.read_record(out)["endpoint"]["output_len_exact"] is False


MS = 1_000_000


def request(sent: int, stamps: list[int], tokens: list[int], done: int) -> dict[str, Any]:
    """A served request of 31 prompt tokens and 4 requested tokens. All times are in ms."""
    return {
        "wave": 0,
        "user": sent,
        "scheduled_ns": 0,
        "sent_ns": sent * MS,
        "first_token_ns": stamps[0] * MS,
        "token_ns": [stamp * MS for stamp in stamps],
        "chunk_tokens": tokens,
        "done_ns": done * MS,
        "prompt_tokens": 31,
        "completion_tokens": sum(tokens),
        "requested_tokens": 4,
    }


SHORT = [
    request(0, [100, 300], [1, 1], 300),  # 2 tokens: ttft 0.1, e2el 0.3, tpot 0.2
    request(0, [200, 800], [1, 2], 1000),  # 3 tokens: ttft 0.2, e2el 0.8, tpot 0.6 / 2
    request(0, [400], [1], 400),  # 1 token: ttft and e2el 0.4, no tpot
]


def record(early: bool) -> dict[str, Any]:
    trial = study(output_len_exact=not early).trials[0]
    return {
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "verdict": "ok",
        "verdict_detail": None,
        "engine": {"engine": "sglang", "version": "0.5"},
        "client": {
            "window_ns": [0, 1000 * MS],
            "token_chunks": 5,
            "processes": 1,
            "cpu_s_busiest": 0.1,
            "prompt_form": "ids",
        },
        "calibration": None,
        "environment": {"allocation": "d.1234", "started": "2026-11-23T01:02:03+00:00"},
        "metrics_before": None,
        "metrics_after": None,
    }


def tables(rows: list[dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
    return (
        parquet.arrow_table(columns.REQUESTS, rows),
        parquet.arrow_table(columns.TELEMETRY, []),
    )


def test_times_per_token_and_rates_come_from_the_tokens_that_came() -> None:
    row = cell_row(record(early=True), *tables(SHORT))
    assert row["output_len_exact"] is False
    assert (row["output_len"], row["completion_tokens_mean"]) == (4, 2.0)
    # The wave took 1 s, for 2 tokens per response. With exact lengths it would be 1 s for 4.
    assert row["seconds_per_100_tokens"] == pytest.approx(50.0)
    assert row["output_tokens_per_s"] == pytest.approx(6.0)
    assert row["output_tokens_per_s_per_user"] == pytest.approx(1.5)
    assert row["tpot_s_mean"] == pytest.approx(0.25)
    assert row["itl_s_mean"] == pytest.approx((0.2 + 0.3 + 0.3) / 3)
    assert row["e2el_s_mean"] == pytest.approx(0.5)
    # 2 tokens in 0.3 s are more than 5 tokens/s; 3 in 0.8 s and 1 in 0.4 s are less.
    assert row["goodput_requests_per_s"] == pytest.approx(1.0)
    assert row["slo_attainment"] == pytest.approx(1 / 3)
    exact = cell_row(record(early=False), *tables(SHORT))
    assert exact["output_len_exact"] is True
    assert exact["seconds_per_100_tokens"] == pytest.approx(25.0)


def validity(early: bool, rows: list[dict[str, Any]], **changed: Any) -> Validity:
    return check_validity(Evidence(record(early) | changed, *tables(rows)))


def test_a_cell_of_short_responses_is_valid_only_where_the_study_says_so() -> None:
    assert validity(True, SHORT).valid
    assert validity(False, SHORT).invalid_evidence == [
        "3 of 3 responses have a wrong number of tokens, by the server's count"
    ]
    more = [*SHORT[:2], request(0, [400, 500], [1, 4], 500)]
    assert validity(True, more).invalid_evidence == [
        "1 of 3 responses have a wrong number of tokens, by the server's count"
    ]
    lost = [*SHORT[:2], SHORT[2] | {"completion_tokens": 2}]
    assert validity(True, lost).invalid_evidence == [
        "1 of 3 responses have a wrong number of tokens, by the count of the chunks"
    ]


def test_the_error_of_the_client_is_held_against_the_time_per_token_that_came() -> None:
    """2 of 100 tokens in 0.1 s: 100 ms per token, and not 1 ms."""
    rows = [request(0, [1000, 1100], [1, 1], 1100) | {"requested_tokens": 100}] * 4
    check = {"requests": 1, "lost": 0, "cpu_s_per_1000_events": 0.01}
    check |= {"arrival_error_s_p99": 0.0, "itl_error_s_p99": 0.004}
    long = record(True)
    long["spec"]["workload"]["output_len"] = 100
    assert check_validity(Evidence(long | {"calibration": check}, *tables(rows))).valid


def cell(speed: float, early: bool, **other: Any) -> dict[str, Any]:
    base = {
        "deployment": "d",
        "model": "m",
        "quantization": "q",
        "gpu": "a100-40gb",
        "gpu_count": 1,
        "engine": "tgi",
        "engine_version": "3",
        "protocol": "burst",
        "concurrency": 1,
        "input_len": 31,
        "output_len": 100,
        "output_len_exact": not early,
        "completion_tokens_mean": 57.25 if early else 100.0,
        "seconds_per_100_tokens": 100 / speed,
        "trial": 1,
        "bring_up": 1,
        "allocation": "a",
        "verdict": "ok",
        "valid": True,
        "requests": 1,
        "output_tokens_per_s": speed,
    }
    return base | other


def cells(*rows: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=[column.name for column in columns.CELLS])
    return cast_columns(frame, columns.CELLS)


MARK = "outputs may stop early"
NOTE = (
    "d: outputs may stop early. Its responses had 57.2 of 100 output tokens on average. Its times "
    "per token and rates come from the tokens that came. Do not compare them with those of exact "
    "lengths."
)


def test_titles_and_notes_mark_the_deployment() -> None:
    early, exact = cell(10.0, True), cell(10.0, False, deployment="e")
    both = cells(early, exact)
    assert deployment_titles(both) == {
        "d": f"m · q · 1 × A100 40 GB · tgi 3, {MARK}",
        "e": "m · q · 1 × A100 40 GB · tgi 3",
    }
    assert figure_notes(both) == [NOTE]
    assert figure_notes(both.drop(columns="output_len_exact")) == []  # an older table


def test_compare_leaves_them_out_unless_asked() -> None:
    shared = cell(5.0, False, concurrency=2)
    first = cells(cell(10.0, False), shared)
    second = cells(cell(20.0, True), shared)
    found = compare(first, second)
    assert [each.name for each in found.cells] == ["d, burst, concurrency 2, 31 + 100 tokens"]
    name = "d, burst, concurrency 1, 31 + 100 tokens"
    assert found.left_out == [
        f"{name}, {MARK} in the second study, but not in the other. To compare them anyway, add "
        "--allow-mixed"
    ]
    mixed = compare(first, second, allow_mixed=True)
    assert {each.name: each.ratio for each in mixed.cells}[name] == pytest.approx(2.0)
    assert mixed.left_out == []
    assert mixed.notes == ["The second study: " + NOTE]
    with pytest.raises(ComparisonError, match=r"(?s)no cell that can be compared.*--allow-mixed"):
        compare(cells(cell(10.0, False)), second[:1])


def test_compare_takes_two_studies_that_both_stop_early_and_says_so() -> None:
    found = compare(cells(cell(10.0, True)), cells(cell(20.0, True)))
    assert [(each.name, each.ratio) for each in found.cells] == [
        (f"d, burst, concurrency 1, 31 + 100 tokens, {MARK}", pytest.approx(2.0))
    ]
    assert found.notes == ["Both studies: " + NOTE]


def test_compare_never_mixes_them_within_a_study_of_the_same_model() -> None:
    """Studies without a common name of a deployment are matched by model and hardware."""
    first = cells(cell(10.0, False, deployment="a"), cell(99.0, True, deployment="b"))
    second = cells(cell(20.0, False, deployment="c"))
    (ratio,) = compare(first, second).cells
    assert ratio.ratio == pytest.approx(2.0)


def test_other_engines_and_published_figures_are_not_compared_with_them() -> None:
    for early, count in ((True, 0), (False, 1)):
        rows = cells(cell(10.0, early), cell(20.0, False, deployment="v", engine="vllm"))
        assert len(compare_engines(summarise(rows), rows)) == count
    published = load_published("inria-2024")
    measured = published_summary(published)
    for exact in (True, False):
        found = compare_with_published(measured.assign(output_len_exact=exact), published)
        assert bool(len(found)) is exact


def test_the_plan_and_the_page_say_that_outputs_may_stop_early() -> None:
    hardware, demand = HardwarePrices("USD", {"a100-40gb": 8500.0}), Demand(users=10)
    both = cells(cell(10.0, True), cell(10.0, False, deployment="e"))
    plan = plan_capacity(summarise(both), demand, hardware)
    assert dict(zip(plan["deployment"], plan["output_len_exact"], strict=True)) == {
        "d": False,
        "e": True,
    }
    report = render_capacity_report(plan, demand, hardware)
    assert f"| d ({MARK}) |" in report and "| e |" in report
    assert "The plan assumes that every response has the requested number" in report
    exact = render_capacity_report(plan[plan["deployment"] == "e"], demand, hardware)
    assert "stop early" not in exact
    payload = build_payload("s", summarise(both), both, pd.DataFrame(), demand, hardware)
    assert payload["notes"] == [NOTE]
    assert [each["output_len_exact"] for each in payload["deployments"]] == [False, True]
