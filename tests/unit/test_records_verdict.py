"""Verdicts from what the requests met."""

from servegrid.client.failures import KINDS
from servegrid.records.verdict import VERDICTS, verdict_of


def test_all_answered_is_ok() -> None:
    assert verdict_of([None, None], engine_alive=True) == ("ok", None)


def test_the_most_frequent_failure_decides_and_is_told() -> None:
    errors = [None, "stalled: no byte for 5 s", "http_status: 500", "http_status: 500"]
    assert verdict_of(errors, engine_alive=True) == (
        "http_error",
        "3 of 4 requests failed, most often: http_status: 500",
    )


def test_too_few_tokens_are_no_success() -> None:
    verdict, reason = verdict_of(["wrong_completion_tokens: 99, not 100"], engine_alive=True)
    assert (verdict, reason) == (
        "wrong_tokens",
        "1 of 1 requests failed, most often: wrong_completion_tokens: 99, not 100",
    )


def test_a_dead_engine_outweighs_what_the_requests_met() -> None:
    assert verdict_of(["reset: by peer"], engine_alive=False)[0] == "server_died"
    assert verdict_of([None], engine_alive=False) == ("server_died", "the engine is gone")


def test_every_verdict_that_can_be_given_is_explained() -> None:
    given = {verdict_of([f"{kind}: x"], engine_alive=True)[0] for kind in KINDS}
    assert given == set(VERDICTS) - {"ok", "server_died"}
