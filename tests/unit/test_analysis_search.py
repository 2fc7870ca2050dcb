"""The search of a deployment over its trials: what is needed, what is next, what is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from helpers.deployments import EMULATED_ENTRY
from servegrid.analysis.prediction import Points
from servegrid.analysis.predictor import Predictor
from servegrid.analysis.search import (
    Figures,
    FrontierEntry,
    Search,
    make_predict,
    trial_figures,
)
from servegrid.analysis.slo import Slo
from servegrid.errors import ConfigError
from servegrid.reference.checkpoint import find_model
from servegrid.study.config import parse_study
from servegrid.study.grid import Study, Trial

WORKLOAD = {"concurrency": [1, 2, 4], "input_len": [31, 119], "output_len": 100, "grid": "frontier"}


def make_study(**workload: Any) -> Study:
    return parse_study(
        {
            "study": "s",
            "workload": WORKLOAD | workload,
            "deployments": [{**EMULATED_ENTRY, "name": "d"}],
        }
    )


STUDY = make_study()


def trial(concurrency: int, input_len: int, number: int = 1) -> Trial:
    return STUDY.trial("d", f"burst-c{concurrency}-i{input_len}-o100", number)


def searched(measured: dict[tuple[int, ...], float]) -> Search:
    """A search after trials with these headrooms, by concurrency, prompt length, trial."""
    figures = {trial(*key).id: Figures(headroom, None) for key, headroom in measured.items()}
    return Search(STUDY.trials, Slo(), figures)


EVERYTHING = {each.id for each in STUDY.trials}


def row(**figures: Any) -> dict[str, Any]:
    """A burst of 2 s per 100 tokens: 50 tokens/s, 10 times what the default SLO asks for."""
    return {
        "verdict": "ok",
        "request_rate": None,
        "time_scale": None,
        "seconds_per_100_tokens": 2.0,
        "ttft_s_p50": 0.5,
        "e2el_s_p50": 4.0,
        "slo_attainment": None,
        "requests_in_window": 1990,
        "failed_requests": 10,
        "output_len": 200,
    } | figures


def test_a_search_has_three_trials_no_drift_check_and_the_specifications_of_the_grid() -> None:
    full = make_study(grid="full", trials=3, drift_checks=False)
    assert STUDY.searched == {"d"} and not full.searched
    assert [each.digest for each in STUDY.trials] == [each.digest for each in full.trials]
    assert len(STUDY.trials) == 18 and not STUDY.drift_checks
    assert len(make_study(trials=1).trials) == 6
    assert len(make_study(drift_checks=True).drift_checks) == 3
    with pytest.raises(ConfigError, match="'edge' is not one of `full`, `frontier`"):
        make_study(grid="edge")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"order": "light_to_heavy"}, "chooses the order of the cells itself. Remove `order`"),
        ({"prune": True}, "chooses the order of the cells itself. Remove `prune`"),
        ({"protocol": "poisson", "request_rate": "sweep"}, "searches among given rates"),
        (
            {
                "protocol": "profile",
                "request_rate": 2,
                "rate_profile": [0, 1],
                "duration_s": 60,
            },
            "no largest load to search with the protocol `profile`",
        ),
    ],
)
def test_a_search_refuses_keys_that_it_replaces(keys: dict[str, Any], message: str) -> None:
    workload: dict[str, Any] = {**WORKLOAD}
    if "request_rate" in keys:
        del workload["concurrency"]
    study = {"study": "s", "workload": workload | keys, "deployments": [EMULATED_ENTRY]}
    with pytest.raises(ConfigError, match=message):
        parse_study(study)


@pytest.mark.parametrize(
    ("changes", "slo", "headroom"),
    [
        ({}, Slo(), 10.0),
        ({"verdict": "timeout"}, Slo(), 0.0),
        ({"seconds_per_100_tokens": None}, Slo(), 0.0),
        ({"time_scale": 0.1}, Slo(), 1.0),  # 20 s of real time: exactly 5 tokens/s
        ({}, Slo(ttft_s=0.25), 0.5),
        ({}, Slo(e2el_s=6.0), 1.5),
        ({"tpot_s_p50": 0.04}, Slo(tpot_s=0.02), 0.5),
        ({"itl_max_s_p50": 0.8}, Slo(itl_s=0.4), 0.5),
        ({"ttft_s_p50": float("nan")}, Slo(ttft_s=1.0), 0.0),
    ],
)
def test_the_headroom_is_the_least_of_all_limits(
    changes: dict[str, Any], slo: Slo, headroom: float
) -> None:
    assert trial_figures(row(**changes), slo).headroom == pytest.approx(headroom)


def test_the_time_of_a_response_is_that_of_its_output_length() -> None:
    assert trial_figures(row(), Slo()).seconds == pytest.approx(4.0)
    assert trial_figures(row(time_scale=0.5), Slo()).seconds == pytest.approx(8.0)


@pytest.mark.parametrize(("valid", "breaks"), [(False, True), (True, False), (pd.NA, False)])
@pytest.mark.parametrize("rate", [None, 2.0])
def test_a_trial_that_is_not_valid_has_figures_and_is_marked(
    valid: Any, breaks: bool, rate: float | None
) -> None:
    figures = trial_figures(row(valid=valid, request_rate=rate, slo_attainment=1.0), Slo())
    assert figures.headroom > 1 and figures.breaks_rules is breaks


@pytest.mark.parametrize(
    ("attainment", "headroom"),
    [(1.0, float("inf")), (0.99, 5.0), (0.95, 1.0), (0.90, 0.5), (None, 0.05)],
)
def test_an_open_loop_is_judged_by_its_goodput(attainment: float | None, headroom: float) -> None:
    """5% of the requests may miss the SLO. Without a stationary part, all count as missed."""
    figures = trial_figures(row(request_rate=2.0, slo_attainment=attainment), Slo())
    assert figures.headroom == pytest.approx(headroom) and figures.seconds is None


@pytest.mark.parametrize(
    ("shares", "count", "meets", "sure"),
    [
        # The share of 2000 requests differs from 95% by up to 1.96 √(0.95 × 0.05 / 2000) = 0.96%.
        ([0.942], 2000, False, False),
        ([0.938], 2000, False, True),
        ([0.958], 2000, True, False),
        ([0.962], 2000, True, True),
        ([0.942, 0.943, 0.944], 2000, False, True),  # of 6000: by up to 0.55%
        # All of 72 are too few, 1.96 √(0.95 × 0.05 / 72) = 5.03%; of 74 it is 4.97%.
        ([1.0], 72, True, False),
        ([1.0], 74, True, True),
        ([None], 0, False, True),  # no stationary part
    ],
)
def test_the_requests_of_an_open_loop_must_be_enough_for_an_answer(
    shares: list[float | None], count: int, meets: bool, sure: bool
) -> None:
    keys = {"protocol": "poisson", "request_rate": [2.0], "input_len": 31, "grid": "frontier"}
    deployment = {**EMULATED_ENTRY, "name": "d"}
    trials = parse_study({"study": "s", "workload": keys, "deployments": [deployment]}).trials
    measured = {
        each.id: trial_figures(
            row(
                request_rate=2.0,
                slo_attainment=share,
                requests_in_window=count - 10 if count else None,
            ),
            Slo(),
        )
        for each, share in zip(trials, shares, strict=False)
    }
    search = Search(trials, Slo(), measured)
    answer = search.status(search.grids[0]).answers[0]
    assert (answer.meets, answer.sure) == (meets, sure)


def test_users_who_think_are_predicted_by_the_requests_that_they_have_in_flight() -> None:
    """With 4 in flight, 4 / T(4) requests/s are complete. Then 4 / T(4) × Z users think: 60 - 4."""
    entry = {**EMULATED_ENTRY, "engine": "vllm", "engine_args": {}, "name": "d"}

    def search(**keys: Any) -> tuple[Search, Predictor]:
        workload = {"input_len": 31, "output_len": 100, "grid": "frontier", **keys}
        trials = parse_study({"study": "s", "workload": workload, "deployments": [entry]}).trials
        predict = make_predict(trials[0], find_model(trials[0].deployment, Path("/none")), 1)
        assert predict is not None
        return Search(trials, Slo(40.0), {}, predict), predict([])

    four, predictor = search(concurrency=4)
    (took,) = predictor.predict(Points.of(4, 31)).seconds
    keys = {"protocol": "closed_loop", "requests_per_user": 5, "think_time_s": 14 * float(took)}
    thinking, _ = search(concurrency=60, **keys)
    expected, found = (each._chances(each.grids[0]) for each in (four, thinking))
    assert expected is not None and found is not None and 0.01 < expected[0] < 0.99
    assert found == pytest.approx(expected, rel=1e-2)


def test_a_cell_that_others_decide_is_not_needed() -> None:
    state = searched({(2, 31): 2.0, (4, 31): 0.5, (1, 119): 0.5})
    assert state.is_complete and state.next_trial(EVERYTHING) is None
    assert not any(state.needs(each) for each in STUDY.trials)
    assert state.frontier() == [
        FrontierEntry("burst", 100, 31, 2.0, 4.0, is_open=False, is_complete=True),
        FrontierEntry("burst", 100, 119, None, 1.0, is_open=False, is_complete=True),
    ]


def test_a_cell_near_the_limit_is_measured_again_before_others() -> None:
    """3% from the limit: (2, 31) says nothing about its neighbours yet."""
    state = searched({(2, 31): 1.03})
    assert state.next_trial(EVERYTHING) == trial(2, 31, 2)
    assert state.needs(trial(2, 31, 2)) and state.needs(trial(1, 31))
    # 1.03 and 1.031: t is 12.7, and 0.0005 × 12.7 is less than 3%.
    state = searched({(2, 31): 1.03, (2, 31, 2): 1.031})
    assert not state.needs(trial(2, 31, 3)) and not state.needs(trial(1, 31))
    # 1.03 and 0.99 do not decide it; the third trial is the last, so it is open.
    state = searched({(2, 31): 1.03, (2, 31, 2): 0.99})
    assert state.next_trial(EVERYTHING) == trial(2, 31, 3)
    state = searched({(2, 31): 1.03, (2, 31, 2): 0.99, (2, 31, 3): 1.01, (4, 31): 0.5})
    assert not state.needs(trial(1, 31))
    entry = state.frontier()[0]
    assert (entry.largest, entry.smallest_missing, entry.is_open) == (2.0, 4.0, True)


def test_a_cell_near_the_limit_that_others_decide_is_not_measured_again() -> None:
    state = searched({(2, 31): 1.03, (4, 31): 2.0})
    assert not state.needs(trial(2, 31, 2))


def test_only_trials_that_wait_are_chosen() -> None:
    """Without a prediction: the heaviest load of the shortest prompts first."""
    assert searched({}).next_trial(EVERYTHING) == trial(4, 31)
    assert searched({}).next_trial({trial(1, 31).id, trial(2, 119).id}) == trial(1, 31)
    assert searched({}).next_trial(set()) is None
    assert not searched({}).is_complete


def test_each_protocol_and_output_length_is_a_search_of_its_own() -> None:
    study = make_study(output_len=[100, 200], trials=1)
    first, second = Search(study.trials, Slo(), {}).grids
    assert [len(grid.cells) for grid in (first, second)] == [6, 6]
    short = study.trial("d", "burst-c4-i31-o100", 1)
    state = Search(study.trials, Slo(), {short.id: Figures(2.0, None)})
    assert not state.needs(study.trial("d", "burst-c1-i31-o100", 1))
    assert state.needs(study.trial("d", "burst-c1-i31-o200", 1))
