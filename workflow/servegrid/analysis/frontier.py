"""Searches the largest load that meets the SLO, per prompt length, in few cells. Pure.

A load that asks for at least as many requests, with prompts at least as long, is never served
better. So each measured cell decides others, and a few cells along the frontier decide all of them.
The predictor says where the frontier probably is. It only changes which cells are measured, never
what is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from servegrid.analysis.intervals import interval
from servegrid.analysis.prediction import Floats, Points
from servegrid.analysis.predictor import Predictor
from servegrid.analysis.residuals import Z_95

Flags = npt.NDArray[np.bool_]

NEAR = 0.05
"""A cell within this fraction of a limit is measured again, until the answer is sure."""


@dataclass(frozen=True)
class Loads:
    """The cells of a search: intensity and prompt length in tokens, arrays of one length.

    The intensity is the concurrency, or the request rate of an open loop.
    """

    intensity: Floats
    input_len: Floats

    @classmethod
    def of(cls, intensity: Sequence[float] | Floats, input_len: Sequence[int] | Floats) -> Loads:
        """Loads from sequences of one length."""
        return cls(np.asarray(intensity, dtype=float), np.asarray(input_len, dtype=float))

    def __len__(self) -> int:
        return len(self.intensity)

    @property
    def lighter(self) -> Flags:
        """Whether load i asks for no more than load j, in both respects: an array [i, j]."""
        flags: Flags = (self.intensity[:, None] <= self.intensity) & (
            self.input_len[:, None] <= self.input_len
        )
        return flags


@dataclass(frozen=True)
class Decided:
    """The cells that are known to meet the SLO, and those known to miss it: arrays of flags."""

    meets: Flags
    misses: Flags

    @property
    def unknown(self) -> Flags:
        flags: Flags = ~(self.meets | self.misses)
        return flags


def decide(loads: Loads, answers: Mapping[int, bool]) -> Decided:
    """What the answers of measured cells say about all cells.

    `answers` says of positions whether the cell there meets the SLO. A cell's own answer counts
    more than what follows from others. If others contradict each other, it counts as missing it.
    """
    lighter = loads.lighter
    meets, misses = np.zeros(len(loads), dtype=bool), np.zeros(len(loads), dtype=bool)
    for position, answer in answers.items():
        if answer:
            meets |= lighter[:, position]
        else:
            misses |= lighter[position]
    meets &= ~misses
    for position, answer in answers.items():
        meets[position], misses[position] = answer, not answer
    return Decided(meets, misses)


def next_cell(
    loads: Loads, answers: Mapping[int, bool], chances: Floats | None = None
) -> int | None:
    """The position of the cell to measure next; None if all are decided.

    `chances` are the probabilities that the cells meet the SLO. The heaviest cells that probably
    meet it and the lightest that probably miss it would prove the frontier that is expected. The
    least certain of them is next, because it moves the frontier most. Without `chances`, it is a
    staircase: the heaviest load of the shortest prompts that are not decided.
    """
    unknown = decide(loads, answers).unknown
    if not unknown.any():
        return None
    if chances is None:
        found = np.flatnonzero(unknown)
        return int(max(found, key=lambda i: (-loads.input_len[i], loads.intensity[i])))
    above = loads.lighter & ~np.eye(len(loads), dtype=bool)
    meets, misses = unknown & (chances > 0.5), unknown & (chances <= 0.5)
    heaviest = meets & ~(above & meets).any(axis=1)
    lightest = misses & ~(above & misses[:, None]).any(axis=0)
    certainty = np.abs(chances - 0.5)
    return int(np.argmin(np.where(heaviest | lightest, certainty, math.inf)))


def meeting_chances(predictor: Predictor, points: Points, limit_s: Floats | float) -> Floats:
    """The probabilities that the bursts take at most `limit_s` seconds."""
    expected = predictor.predict(points)
    sd = np.log(expected.high / expected.seconds) / Z_95
    chances: Floats = ndtr(np.log(limit_s / expected.seconds) / sd)
    return chances


@dataclass(frozen=True)
class Answer:
    """Whether a cell meets the SLO, and whether that is sure. If not, it is measured again."""

    meets: bool
    sure: bool


def judge(headrooms: Sequence[float]) -> Answer:
    """The answer of a cell's trials. The headroom of a trial is limit / latency; 0 if not served.

    One trial is enough if it differs from the limit by more than NEAR. Otherwise the 95% interval
    over the trials must not contain the limit. Raises ValueError without a trial.
    """
    if not headrooms:
        raise ValueError("a cell without a trial has no answer")
    middle = float(np.median(headrooms))
    meets = middle >= 1
    if abs(middle - 1) > NEAR:
        return Answer(meets, True)
    ends = interval(headrooms)
    return Answer(meets, ends is not None and (ends[0] > 1 or ends[1] < 1))


def search(
    loads: Loads,
    measure: Callable[[int], bool],
    chances: Callable[[Sequence[int]], Floats] | None = None,
) -> dict[int, bool]:
    """The answers of all cells that the search takes, in its order.

    `measure` says whether the cell at a position meets the SLO. `chances` gets the positions that
    are measured already.
    """
    answers: dict[int, bool] = {}
    while True:
        likely = None if chances is None else chances(list(answers))
        position = next_cell(loads, answers, likely)
        if position is None:
            return answers
        answers[position] = measure(position)


def largest_loads(loads: Loads, decided: Decided) -> dict[int, float | None]:
    """The largest intensity that meets the SLO, by prompt length; None if none does."""
    return {
        int(length): max(loads.intensity[decided.meets & (loads.input_len == length)], default=None)
        for length in np.unique(loads.input_len)
    }
