"""The verdict of a trial follows from its requests and its engine."""

from servegrid.client.failures import FAILURE_KINDS
from servegrid.records.verdict import VERDICTS, decide_verdict


def test_a_trial_without_failures_is_ok() -> None:
    assert decide_verdict([None, None], engine_alive=True) == ("ok", None)


def test_the_most_frequent_failure_decides() -> None:
    errors = [None, "stalled: no byte for 5 s", "http_status: 500", "http_status: 500"]
    assert decide_verdict(errors, engine_alive=True) == (
        "http_error",
        "3 of 4 requests failed, most often: http_status: 500",
    )


def test_too_few_tokens_are_a_failure() -> None:
    verdict, reason = decide_verdict(["wrong_completion_tokens: 99, not 100"], engine_alive=True)
    assert (verdict, reason) == (
        "wrong_tokens",
        "1 of 1 requests failed, most often: wrong_completion_tokens: 99, not 100",
    )


def test_a_dead_engine_outweighs_request_failures() -> None:
    assert decide_verdict(["reset: by peer"], engine_alive=False)[0] == "server_died"
    assert decide_verdict([None], engine_alive=False) == (
        "server_died",
        "the engine process has ended",
    )


def test_every_verdict_has_a_meaning() -> None:
    given = {decide_verdict([f"{kind}: x"], engine_alive=True)[0] for kind in FAILURE_KINDS}
    assert given == set(VERDICTS) - {"ok", "server_died", "not_run"}
