"""The search for the largest load that meets the SLO, by hand and on random frontiers."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from servegrid.analysis.frontier import (
    Loads,
    decide,
    judge,
    largest_loads,
    meeting_chances,
    next_cell,
    search,
)
from servegrid.analysis.prediction import Points
from servegrid.analysis.predictor import load_calibration, make_predictor
from servegrid.analysis.published_tables import published_tables

GRID = list(itertools.product([1, 2, 4], [31, 119, 480]))
LOADS = Loads.of([n for n, _ in GRID], [p for _, p in GRID])


def at(intensity: int, input_len: int) -> int:
    return GRID.index((intensity, input_len))


def cells(flags: np.ndarray) -> set[tuple[int, int]]:
    return {cell for cell, flag in zip(GRID, flags, strict=True) if flag}


def test_a_cell_that_meets_the_slo_decides_the_lighter_ones_and_the_reverse() -> None:
    decided = decide(LOADS, {at(2, 119): True, at(2, 480): False})
    assert cells(decided.meets) == {(1, 31), (2, 31), (1, 119), (2, 119)}
    assert cells(decided.misses) == {(2, 480), (4, 480)}
    assert cells(decided.unknown) == {(4, 31), (4, 119), (1, 480)}


def test_contradicting_answers_count_for_themselves_and_are_missed_between() -> None:
    """A lighter cell misses and a heavier one meets, as noise or an older grid can leave it."""
    decided = decide(LOADS, {at(1, 31): False, at(4, 480): True})
    assert cells(decided.meets) == {(4, 480)}
    assert len(cells(decided.misses)) == 8


def test_the_least_certain_cell_of_the_expected_proof_is_next() -> None:
    """(2, 31) and (1, 119) are the heaviest that should meet; (4, 31), (2, 119) and (1, 480) the
    lightest that should miss. (1, 31) and (4, 119) prove less, though they are no more certain."""
    chances = np.full(9, 0.01)
    for cell, chance in {
        (1, 31): 0.51,
        (2, 31): 0.9,
        (1, 119): 0.8,
        (4, 31): 0.3,
        (2, 119): 0.4,
        (1, 480): 0.2,
        (4, 119): 0.49,
    }.items():
        chances[at(*cell)] = chance
    assert next_cell(LOADS, {}, chances) == at(2, 119)
    assert next_cell(LOADS, {at(2, 119): False}, chances) == at(4, 31)


def test_without_a_prediction_the_search_is_a_staircase() -> None:
    """Down while a load misses, on to longer prompts when it meets."""
    meets = {(1, 31), (2, 31), (1, 119), (2, 119)}
    answers = search(LOADS, lambda position: GRID[position] in meets)
    assert [GRID[position] for position in answers] == [
        (4, 31),
        (2, 31),
        (2, 119),
        (2, 480),
        (1, 480),
    ]
    found = largest_loads(LOADS, decide(LOADS, answers))
    assert found == {31: 2, 119: 2, 480: None}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_predicted_the_frontier_is_exact(seed: int) -> None:
    """A wrong prediction costs cells, and no more than all of them."""
    rng = random.Random(seed)
    levels = sorted((rng.randint(0, 6) for _ in range(5)), reverse=True)
    grid = [cell for cell in itertools.product(range(6), range(5)) if rng.random() < 0.9]
    loads = Loads.of([n for n, _ in grid], [p for _, p in grid])
    truth = [n < levels[p] for n, p in grid]
    noise = np.random.default_rng(seed)
    answers = search(loads, truth.__getitem__, lambda _: noise.random(len(grid)))
    assert decide(loads, answers).meets.tolist() == truth
    assert all(truth[position] == answer for position, answer in answers.items())


@pytest.mark.parametrize(
    ("headrooms", "meets", "sure"),
    [
        ([1.06], True, True),
        ([0.94], False, True),
        ([0.0], False, True),  # not served
        ([1.02], True, False),  # within 5%: once more
        ([0.97, 0.98], False, False),  # t is 12.7 with two trials: 0.975 × exp(±0.065)
        ([0.97, 0.98, 0.975], False, True),  # t is 4.30 with three: 0.975 × exp(±0.013)
        ([1.01, 0.99, 1.0], True, False),  # open: the interval contains the limit
        ([1.02, 1.3, 1.25], True, True),  # the median is what counts
        ([1.02, 0.0, 0.99], False, False),  # one of three was not served
        ([1.02, math.inf, 0.99], True, False),  # of an open loop: no request missed in one trial
    ],
)
def test_a_cell_near_the_limit_is_measured_until_it_is_sure(
    headrooms: list[float], meets: bool, sure: bool
) -> None:
    answer = judge(headrooms)
    assert (answer.meets, answer.sure) == (meets, sure)


def test_a_cell_without_a_trial_has_no_answer() -> None:
    with pytest.raises(ValueError, match="without a trial"):
        judge([])


def test_the_chance_is_half_at_the_expected_time_and_follows_the_interval() -> None:
    """The 95% interval: 2.5% of the probability lies above its end."""
    table = published_tables()[0]
    predictor = make_predictor(table.traits, "vllm", load_calibration())
    points = Points.of(16, 119)
    expected = predictor.predict(points)
    for limit, chance in (
        (expected.seconds, 0.5),
        (expected.high, 0.975),
        (expected.low, 0.025),
    ):
        assert meeting_chances(predictor, points, limit) == pytest.approx([chance], abs=1e-4)
