"""Reasoning models and speculative decoding, from a scripted stream to the row of a cell."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from statistics import mean
from typing import Any

import pytest

from helpers.demo_model import DemoModel
from helpers.deployments import SMALL_VLLM
from helpers.faulty_server import FaultScript, start_faulty_server
from helpers.scripted_server import EVENT_STREAM, Answer, Request, scripted_server
from servegrid.analysis.metrics import cell_row
from servegrid.analysis.validity import Evidence, check_validity
from servegrid.client import Measurement, measure
from servegrid.records import columns, parquet
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Trial, Workload
from servegrid.telemetry.server import counter_reader

pytestmark = pytest.mark.crowded
BURST = Workload("burst", 2, 9, 10, 2, warmup_waves=0, timeout_s=60, idle_timeout_s=20)


def cell(measured: Measurement, workload: Workload = BURST) -> tuple[dict[str, Any], list[str]]:
    """The row of the table of cells, and the rules that the cell breaks."""
    trial = Trial(replace(SMALL_VLLM, api="chat"), workload, 1)
    record = {
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "verdict": "ok",
        "verdict_detail": None,
        "client": measured.facts,
        "engine": {"engine": "vllm"},
        "environment": {"allocation": "a", "started": "t"},
        "calibration": None,
        "metrics_before": measured.counters_before,
        "metrics_after": measured.counters_after,
    }
    telemetry = parquet.arrow_table(columns.TELEMETRY, [])
    broken = check_validity(Evidence(record, measured.requests, telemetry)).invalid_rules
    return cell_row(record, measured.requests, telemetry), broken or []


@pytest.mark.parametrize("usage", ["continuous", "final"])
def test_speculative_decoding_by_chunks_of_several_tokens(usage: str) -> None:
    """Four steps, 40 ms apart, with 1, 3, 2 and 4 tokens: of 9 drafted tokens, 6 are accepted."""
    script = FaultScript(
        ttft_s=0.05,
        itl_s=0.04,
        chunk_tokens=(1, 3, 2, 4),
        usage=usage,  # type: ignore[arg-type]
        counters=(
            ("vllm:spec_decode_num_drafts_total", 3.0),
            ("vllm:spec_decode_num_draft_tokens_total", 9.0),
            ("vllm:spec_decode_num_accepted_tokens_total", 6.0),
        ),
    )
    with start_faulty_server(script) as server:
        counters = counter_reader(server.endpoint)
        measured = measure(server.endpoint, BURST, None, "s", counters)
    row, broken = cell(measured)
    assert "tokens" not in broken and "buffered" not in broken
    stamps = [each["token_ns"] for each in measured.requests.to_pylist()]
    assert [len(each) for each in stamps] == [4, 4]
    gaps = [(after - before) / 1e9 for each in stamps for before, after in pairwise(each)]
    assert row["itl_per_chunk_s_mean"] == pytest.approx(mean(gaps)) == pytest.approx(0.04, rel=0.5)
    # Nine tokens after the first, in chunks of 3, 2 and 4.
    assert row["tpot_s_mean"] == pytest.approx(sum(gaps) / 2 / 9)
    if usage == "continuous":
        assert row["itl_s_mean"] == pytest.approx(sum(gaps) / 2 / 9)
        longest = [max(a / 3, b / 2, c / 4) for a, b, c in (gaps[:3], gaps[3:])]
        assert row["itl_max_s_p50"] == pytest.approx(mean(longest))
    else:
        assert (row["itl_s_mean"], row["itl_max_s_p50"]) == (None, None)
    assert row["spec_decode_acceptance_rate"] == pytest.approx(6 / 9)
    assert row["spec_decode_acceptance_length"] == pytest.approx(3.0)


def thinking(request: Request) -> Answer:
    """A reasoning model: four tokens of a reasoning, the marker at its end, five of the answer.

    As vLLM streams it: the marker has no chunk, so the next one has two tokens. Tokens come 20 ms
    apart, the first one after 50 ms.
    """
    if "messages" not in request.body:
        return Answer(status=404)
    if request.headers["X-Request-Id"].endswith("probe"):
        deltas = [({"content": "a"}, 1, 0)]
    else:
        deltas = [({"reasoning": f" r{number}"}, number, number) for number in range(1, 5)]
        deltas += [({"content": f" a{number}"}, number, 4) for number in range(6, 11)]
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta}], "usage": usage(tokens, reasoning)}
        for delta, tokens, reasoning in deltas
    ]
    chunks[-1]["choices"][0]["finish_reason"] = "length"
    chunks.append({"choices": [], "usage": usage(*deltas[-1][1:])})
    events = [f"data: {json.dumps(each)}\n\n".encode() for each in chunks]
    pauses = [0.05, *[0.02] * (len(events) - 2), 0.0]
    return Answer(
        [*zip(pauses, events, strict=True), (0.0, b"data: [DONE]\n\n")], 200, EVENT_STREAM
    )


def usage(tokens: int, reasoning: int) -> dict[str, Any]:
    details = {"reasoning_tokens": reasoning}
    return {"prompt_tokens": 20, "completion_tokens": tokens, "completion_tokens_details": details}


def test_the_answer_of_a_reasoning_model_starts_later_than_its_first_token(
    demo_model: DemoModel,
) -> None:
    with scripted_server(thinking) as server:
        endpoint = Endpoint(server.url, "m", api="chat", started_here=True)
        measured = measure(endpoint, BURST, demo_model.folder, "s")
    row, broken = cell(measured)
    assert "tokens" not in broken and "buffered" not in broken
    rows = measured.requests.to_pylist()
    for number, name in ((0, "ttft"), (4, "ttfo")):  # the first chunk, and the first of the answer
        waits = [(each["token_ns"][number] - each["sent_ns"]) / 1e9 for each in rows]
        assert row[f"{name}_s_mean"] == pytest.approx(mean(waits))
    assert row["ttfo_s_mean"] > row["ttft_s_mean"] + 0.06
    assert (row["reasoning_tokens_mean"], row["responses_without_answer"]) == (4.0, 0)
    assert row["completion_tokens_mean"] == 10
    assert [each["chunk_tokens"] for each in rows] == [[1, 1, 1, 1, 2, 1, 1, 1, 1]] * 2
