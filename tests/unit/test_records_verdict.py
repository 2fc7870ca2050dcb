"""The verdict of a trial follows from its requests, its engine and the server's own metrics."""

from __future__ import annotations

from typing import Any

import pytest

from servegrid.client.failures import FAILURE_KINDS
from servegrid.records.verdict import (
    SERVED,
    VERDICTS,
    Verdict,
    decide_verdict,
    memory_figures,
    shows_overload,
    was_served,
)

TORCH = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total "
    "capacity of 15.77 GiB of which 1.25 GiB is free. Process 7 has 14.52 GiB memory in use."
)
"""As torch 2.11 writes it."""


def test_a_trial_without_failures_is_ok() -> None:
    assert decide_verdict([None, None], engine_alive=True) == Verdict("ok", None, {})


def test_the_most_frequent_failure_decides() -> None:
    errors = [None, "stalled: no byte for 5 s", "http_status: 500", "http_status: 500"]
    assert decide_verdict(errors, engine_alive=True) == Verdict(
        "http_error",
        "3 of 4 requests failed, most often: http_status: 500",
        {"failed_share": 0.75},
    )


def test_too_few_tokens_are_a_failure() -> None:
    found = decide_verdict(["wrong_completion_tokens: 99, not 100"], engine_alive=True)
    assert (found.name, found.detail) == (
        "wrong_tokens",
        "1 of 1 requests failed, most often: wrong_completion_tokens: 99, not 100",
    )


def test_a_dead_engine_outweighs_request_failures() -> None:
    assert decide_verdict(["reset: by peer"], engine_alive=False).name == "server_died"
    dead = decide_verdict([None], engine_alive=False, death="GET /health: refused after 0.0 s")
    assert (dead.name, dead.detail) == (
        "server_died",
        "the engine process has ended; GET /health: refused after 0.0 s",
    )


@pytest.mark.parametrize("alive", [True, False])
def test_a_request_that_names_the_memory_makes_it_oom(alive: bool) -> None:
    errors = ["reset: by peer", "reset: by peer", f"http_status: 500: {TORCH}"]
    found = decide_verdict(errors, engine_alive=alive)
    assert found.name == "oom"
    assert found.evidence == {
        "failed_share": 1.0,
        "tried_gib": 2.5,
        "total_gib": 15.77,
        "free_gib": 1.25,
    }


def test_the_engine_s_own_last_message_makes_it_oom() -> None:
    found = decide_verdict(["http_status: 500: EngineDeadError"], False, death=TORCH)
    assert (found.name, found.evidence["tried_gib"]) == ("oom", 2.5)
    assert "1 of 1 requests failed, most often: http_status: 500: EngineDeadError" in str(
        found.detail
    )
    assert "CUDA out of memory" in str(found.detail)


@pytest.mark.parametrize(
    ("strain", "name", "text"),
    [
        ({}, "ok", None),
        # A sample with waiting requests alone is the moment of their arrival.
        ({"preemptions": 0, "waiting_share": 0.05, "waiting_max": 3}, "ok", None),
        (
            {"preemptions": 0, "waiting_share": 0.3333, "waiting_max": 24},
            "queued",
            "requests spent 33% of their time in the server's queue; up to 24 waited",
        ),
        (
            {"preemptions": 7, "waiting_share": 0.3333, "kv_cache_usage_max": 1.0},
            "preempted",
            "the server preempted requests 7 times",
        ),
    ],
)
def test_a_workload_that_was_served_with_effort(
    strain: dict[str, float], name: str, text: str | None
) -> None:
    found = decide_verdict([None, None], True, strain)
    assert (found.name, found.detail) == (name, text)
    assert found.evidence == ({} if name == "ok" else {k: v for k, v in strain.items() if v})
    assert was_served(found.name)


def test_a_failure_outweighs_waiting_and_keeps_its_figures() -> None:
    found = decide_verdict([None, "timeout: 600 s"], True, {"waiting_share": 0.5})
    assert (found.name, found.evidence) == ("timeout", {"failed_share": 0.5, "waiting_share": 0.5})
    assert not was_served(found.name)


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        (  # vLLM 0.32
            "To serve at least one request with the model's max seq len (4096), (0.50 GiB KV cache "
            "is needed, which is larger than the available KV cache memory (0.13 GiB). Based on",
            {"max_model_len": 4096, "kv_needed_gib": 0.5, "kv_available_gib": 0.13},
        ),
        (  # vLLM 0.10
            "The model's max seq len (8192) is larger than the maximum number of tokens that can "
            "be stored in KV cache (2048).",
            {"max_model_len": 8192, "kv_capacity_tokens": 2048},
        ),
        ("Killed", {}),
    ],
)
def test_the_figures_in_a_memory_error(text: str, figures: dict[str, float]) -> None:
    assert memory_figures(text) == figures


@pytest.mark.parametrize(
    ("verdict", "evidence", "shows"),
    [
        ("oom", {}, True),
        ("server_died", {}, True),
        ("oom_at_start", {}, True),
        ("unsupported", {}, True),
        ("timeout", {"failed_share": 0.5}, True),
        ("http_error", {"failed_share": 1.0}, True),
        ("http_error", {"failed_share": 0.4999}, False),  # perhaps one lost connection
        ("timeout", {}, False),
        ("wrong_tokens", {"failed_share": 1.0}, False),
        ("not_run", {"reason": "dominated"}, False),
        ("ok", {}, False),
        ("queued", {}, False),
        ("preempted", {}, False),
    ],
)
def test_only_what_depends_on_the_load_shows_overload(
    verdict: str, evidence: dict[str, Any], shows: bool
) -> None:
    assert shows_overload(verdict, evidence) is shows


def test_every_verdict_has_a_meaning() -> None:
    given = {decide_verdict([f"{kind}: x"], engine_alive=True).name for kind in FAILURE_KINDS}
    assert given == {"http_error", "timeout", "wrong_tokens"}
    others = {"oom", "oom_at_start", "server_died", "unsupported", "not_run"}
    assert set(VERDICTS) == given | others | SERVED
