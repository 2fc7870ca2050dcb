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

from servegrid.analysis.prediction import Floats, Indices, Points
from servegrid.analysis.predictor import Predictor
from servegrid.analysis.residuals import Z_95
from servegrid.analysis.slo import Slo

Flags = npt.NDArray[np.bool_]

NEAR = 0.05
"""A cell within this fraction of a limit is measured again, until the answer is sure."""
SURE = 0.95
"""An answer is sure if the interval with this coverage does not contain the limit."""


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

    def take(self, positions: Indices) -> Loads:
        return Loads(self.intensity[positions], self.input_len[positions])

    @property
    def lighter(self) -> Flags:
        """Whether load i asks for no more than load j, in both respects: an array [i, j]."""
        flags: Flags = (self.intensity[:, None] <= self.intensity) & (
            self.input_len[:, None] <= self.input_len
        )
        return flags

    def lighter_than(self, position: int) -> Flags:
        """Which loads ask for no more than the one at `position`."""
        flags: Flags = (self.intensity <= self.intensity[position]) & (
            self.input_len <= self.input_len[position]
        )
        return flags

    def heavier_than(self, position: int) -> Flags:
        """Which loads ask for at least as much as the one at `position`."""
        flags: Flags = (self.intensity >= self.intensity[position]) & (
            self.input_len >= self.input_len[position]
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
    meets, misses = np.zeros(len(loads), dtype=bool), np.zeros(len(loads), dtype=bool)
    for position, answer in answers.items():
        if answer:
            meets |= loads.lighter_than(position)
        else:
            misses |= loads.heavier_than(position)
    meets &= ~misses
    for position, answer in answers.items():
        meets[position], misses[position] = answer, not answer
    return Decided(meets, misses)


def next_cell(
    loads: Loads,
    answers: Mapping[int, bool],
    chances: Floats | None = None,
    available: Flags | None = None,
) -> int | None:
    """The position of the cell to measure next; None if all are decided.

    Only cells that are `available` can be measured now (None: all).

    `chances` are the probabilities that the cells meet the SLO. The heaviest cells that probably
    meet it and the lightest that probably miss it would prove the frontier that is expected. The
    least certain of them is next, because it moves the frontier most. Without `chances`, it is a
    staircase: the heaviest load of the shortest prompts that are not decided.
    """
    unknown = decide(loads, answers).unknown
    if available is not None:
        unknown &= available
    if not unknown.any():
        return None
    found = np.flatnonzero(unknown)
    if chances is None:
        return int(max(found, key=lambda i: (-loads.input_len[i], loads.intensity[i])))
    # Only among the cells that are left: the array has the square of their number.
    above = loads.take(found).lighter & ~np.eye(len(found), dtype=bool)
    likely = chances[found]
    meets, misses = likely > 0.5, likely <= 0.5
    heaviest = meets & ~(above & meets).any(axis=1)
    lightest = misses & ~(above & misses[:, None]).any(axis=0)
    certainty = np.abs(likely - 0.5)
    return int(found[np.argmin(np.where(heaviest | lightest, certainty, math.inf))])


def meeting_chances(predictor: Predictor, points: Points, limit_s: Floats | float) -> Floats:
    """The probabilities that the bursts take at most `limit_s` seconds."""
    expected = predictor.predict(points)
    sd = np.log(expected.high / expected.seconds) / Z_95
    deviations = np.log(limit_s / expected.seconds) / sd / math.sqrt(2)
    return np.array([(1 + math.erf(each)) / 2 for each in deviations])


def response_limit(points: Points, slo: Slo) -> Floats:
    """The longest time of a response that meets the SLO, in s, without its limit on ttft."""
    limit = points.output_len / slo.tokens_per_s_per_user
    return limit if slo.e2el_s is None else np.minimum(limit, slo.e2el_s)


@dataclass(frozen=True)
class Answer:
    """Whether a cell meets the SLO, and whether that is sure. If not, it is measured again."""

    meets: bool
    sure: bool


def judge(headrooms: Sequence[float]) -> Answer:
    """The answer of a cell's trials. The headroom of a trial is limit / latency; 0 if not served.

    One trial is enough if it differs from the limit by more than NEAR. Otherwise the 95% interval
    over the trials (Student's t on their logarithms, as in `intervals`) must not contain the limit.
    Raises ValueError without a trial.
    """
    if not headrooms:
        raise ValueError("a cell without a trial has no answer")
    middle = float(np.median(headrooms))
    meets = middle >= 1
    if abs(middle - 1) > NEAR:
        return Answer(meets, True)
    if len(headrooms) < 2 or min(headrooms) <= 0 or math.isinf(max(headrooms)):
        return Answer(meets, False)
    logs = np.log(headrooms)
    error = float(logs.std(ddof=1)) / math.sqrt(len(logs))
    mean = float(logs.mean())
    if (mean >= 0) != meets:
        return Answer(meets, False)
    inside = 1.0 if error == 0 else student_within(abs(mean) / error, len(logs) - 1)
    return Answer(meets, inside > SURE)


def is_share_sure(shares: Sequence[tuple[float, float]], limit: float) -> bool:
    """Whether all trials together decide if a share of requests is below or above `limit`.

    `shares` has the share in each trial and its number of requests. Chance alone changes a share:
    the score test at 5% must reject `limit`, as if requests were independent of each other.
    """
    requests = math.fsum(count for _, count in shares)
    share = math.fsum(share * count for share, count in shares) / requests
    return abs(share - limit) > Z_95 * math.sqrt(limit * (1 - limit) / requests)


def student_within(t: float, degrees: int) -> float:
    """The probability that Student's t with `degrees` of freedom lies within ± `t`.

    M. Abramowitz, I. Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4. An
    engine's environment need not have scipy.
    """
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees % 2:
        term, total = cosine, cosine if degrees > 1 else 0.0
        for k in range(2, degrees - 1, 2):
            term *= cosine**2 * k / (k + 1)
            total += term
        return 2 / math.pi * (angle + sine * total)
    term = total = 1.0
    for k in range(1, degrees - 2, 2):
        term *= cosine**2 * k / (k + 1)
        total += term
    return sine * total


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


def expected_cells(loads: Loads, chances: Floats, is_predicted: bool = True) -> list[int]:
    """The positions of the cells that the search takes if each ends as is most probable.

    `chances` are those of `next_cell`. If not `is_predicted`, the search itself does not know them.
    """
    known = (lambda _: chances) if is_predicted else None
    return list(search(loads, lambda position: bool(chances[position] > 0.5), known))


def largest_loads(loads: Loads, decided: Decided) -> dict[int, float | None]:
    """The largest intensity that meets the SLO, by prompt length; None if none does."""
    return {
        int(length): max(loads.intensity[decided.meets & (loads.input_len == length)], default=None)
        for length in np.unique(loads.input_len)
    }
