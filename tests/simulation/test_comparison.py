"""`compare` under the ways in which bring-ups of the same deployment differ, with known truth."""

from __future__ import annotations

import math
import random

import pytest

from servegrid.analysis.comparison import Ratio, apply_fdr, compare_deployment

DEPLOYMENTS, CELLS, TRIALS, WITHIN = 7, 12, 3, 0.02
STUDIES = 400


def simulate(
    generator: random.Random,
    between: float | tuple[float, float],
    bring_ups: int,
    change: float = 0.0,
) -> list[Ratio]:
    """The deployments' ratios of two studies. All deployments of the second change by `change`."""
    deviations = between if isinstance(between, tuple) else (between, between)

    def study(shift: float, between: float) -> list[dict[str, list[float]]]:
        offsets = [shift + generator.gauss(0, between) for _ in range(bring_ups)]
        return [
            {
                str(number): [math.exp(offset + generator.gauss(0, WITHIN)) for _ in range(TRIALS)]
                for number, offset in enumerate(offsets)
            }
            for _ in range(CELLS)
        ]

    return apply_fdr(
        compare_deployment(
            str(each),
            list(zip(study(0.0, deviations[0]), study(change, deviations[1]), strict=True)),
        )
        for each in range(DEPLOYMENTS)
    )


@pytest.mark.slow
@pytest.mark.parametrize("between", [0.0, 0.01, 0.02, (0.005, 0.02)], ids=str)
def test_equal_studies_get_a_false_verdict_in_at_most_5_percent(
    between: float | tuple[float, float],
) -> None:
    generator = random.Random(1)
    wrong = covered = total = 0
    for _ in range(STUDIES):
        ratios = simulate(generator, between, bring_ups=3)
        wrong += any(each.verdict in ("faster", "slower") for each in ratios)
        for each in ratios:
            assert each.low is not None and each.high is not None
            covered += each.low <= 1 <= each.high
            total += 1
    print(f"{between}: false verdicts {wrong / STUDIES:.1%}, coverage {covered / total:.1%}")
    assert wrong / STUDIES <= 0.05
    assert 0.90 <= covered / total <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (([0, 11], [11, 12]), ([0, 11], [11, 12])),
        (([0, 6], [6, 12]), ([0, 6], [6, 12])),
        (([0, 12], [11, 12], [11, 12]), ([0, 12], [0, 12], [0, 12])),
    ],
    ids=["both resumed near the end", "both resumed halfway", "one with two more for one cell"],
)
def test_the_interval_of_resumed_studies_covers_the_truth(
    first: tuple[list[int], ...], second: tuple[list[int], ...]
) -> None:
    # Each pair says which of the cells an allocation measured. Both studies are equal.
    generator = random.Random(4)

    def study(allocations: tuple[list[int], ...]) -> list[dict[str, list[float]]]:
        cells: list[dict[str, list[float]]] = [{} for _ in range(CELLS)]
        for number, (start, end) in enumerate(allocations):
            offset = generator.gauss(0, 0.02)
            for cell in cells[start:end]:
                cell[str(number)] = [math.exp(offset + generator.gauss(0, 0.005))]
        return cells

    covered = 0
    for _ in range(2000):
        ratio = compare_deployment("", list(zip(study(first), study(second), strict=True)))
        assert ratio.low is not None and ratio.high is not None
        covered += ratio.low <= 1 <= ratio.high
    print(f"{first}, {second}: coverage {covered / 2000:.1%}")
    assert covered / 2000 >= 0.935


@pytest.mark.slow
def test_a_slow_down_of_10_percent_is_found_in_90_percent() -> None:
    generator = random.Random(2)
    found = total = 0
    for _ in range(STUDIES):
        ratios = simulate(generator, 0.02, bring_ups=3, change=math.log(0.9))
        found += sum(each.verdict == "slower" for each in ratios)
        total += len(ratios)
    print(f"a slowdown of 10%: found in {found / total:.1%}")
    assert found / total >= 0.90


def test_one_bring_up_per_study_gives_no_verdict() -> None:
    for ratio in simulate(random.Random(3), 0.02, bring_ups=1, change=math.log(0.5)):
        assert (ratio.verdict, ratio.p, ratio.low) == ("not tested", None, None)
