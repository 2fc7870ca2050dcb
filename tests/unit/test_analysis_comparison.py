"""Two studies compared: tests against tables of Student's t, and errors at the stated rates."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from servegrid.analysis.comparison import (
    Comparison,
    Ratio,
    apply_fdr,
    compare,
    compare_trials,
    detectable_slowdown,
    find_regressions,
    power_analysis,
    two_sided_p,
)
from servegrid.analysis.tables import cast_columns, write_cells
from servegrid.cli.main import main
from servegrid.errors import ComparisonError
from servegrid.records import columns
from servegrid.report.comparison_report import (
    render_comparison_markdown,
    render_comparison_page,
)


def trial(speed: float, **other: Any) -> dict[str, Any]:
    return {
        "deployment": "d0",
        "model": "m",
        "quantization": "q",
        "gpu": "a100-40gb",
        "gpu_count": 1,
        "engine": "vllm",
        "protocol": "burst",
        "concurrency": 8,
        "input_len": 31,
        "output_len": 100,
        "trial": 1,
        "verdict": "ok",
        "valid": True,
        "requests": 8,
        "output_tokens_per_s": speed,
        **other,
    }


def study(*rows: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=[column.name for column in columns.CELLS])
    return cast_columns(frame, columns.CELLS)


def noisy(
    chances: random.Random, slower: str | None = None, trials: int = 3, scatter: float = 0.03
) -> pd.DataFrame:
    """Four deployments of twelve cells; one may be slower by a tenth."""
    return study(
        *(
            trial(
                (100.0 + concurrency)
                * (0.9 if f"d{place}" == slower else 1.0)
                * math.exp(chances.gauss(0, scatter)),
                deployment=f"d{place}",
                concurrency=concurrency,
                input_len=length,
                requests=concurrency,
                trial=number,
            )
            for place in range(4)
            for length in (31, 119, 296)
            for concurrency in (1, 2, 4, 8)
            for number in range(1, trials + 1)
        )
    )


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    # As in any table of it; of one degree it is 1 - 2 atan(t) / pi.
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (2.086, 20, 0.05), (2.845, 20, 0.01), (1.0, 1, 0.5)],
)
def test_students_t(t: float, degrees: float, p: float) -> None:
    assert two_sided_p(t, degrees) == pytest.approx(p, abs=5e-5)
    assert two_sided_p(-t, degrees) == two_sided_p(t, degrees)
    assert two_sided_p(0.0, degrees) == pytest.approx(1.0)


def test_the_false_discovery_rate_is_benjaminis_and_hochbergs() -> None:
    # Their own example (1995, section 3.2): of 15 p-values the four smallest are discoveries.
    values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    values += [0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    ratios = [Ratio(str(p), 0.5, 0.4, 0.6, p, 3, 0.1) for p in reversed(values)]
    found = [each.p for each in apply_fdr(ratios) if each.verdict == "slower"]
    assert sorted(found) == values[:4]


def test_a_cell_of_two_trials_each_by_hand() -> None:
    first = study(trial(100.0), trial(100.0 * math.exp(0.02), trial=2))
    second = study(trial(80.0), trial(80.0 * math.exp(0.02), trial=2))
    (cell,) = compare(first, second).cells
    assert cell.ratio == pytest.approx(0.8)
    # Variances 0.0002 each: standard error sqrt(2 × 0.0001), 2 degrees of freedom.
    error = math.sqrt(0.0002)
    assert cell.low == pytest.approx(0.8 * math.exp(-4.303 * error), rel=1e-4)
    t = (math.log(1.25) - math.log(1.02)) / error
    # Of two degrees of freedom the chance is 1 - t / sqrt(2 + t²).
    assert cell.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)
    assert cell.verdict == "slower"


def test_one_trial_each_gives_a_ratio_and_no_verdict_of_a_cell() -> None:
    (cell,) = compare(study(trial(100.0)), study(trial(50.0))).cells
    assert (cell.ratio, cell.p, cell.verdict) == (pytest.approx(0.5), None, "no evidence")


@pytest.mark.parametrize("trials", [1, 3])
def test_alike_studies_differ_no_more_often_than_stated(trials: int) -> None:
    chances = random.Random(1)
    wrong = sum(
        any(
            each.verdict != "no evidence"
            for each in compare(
                noisy(chances, None, trials), noisy(chances, None, trials)
            ).deployments
        )
        for _ in range(40)
    )
    # At 5% and less; more than five of forty would come once in thirty times at exactly 5%.
    assert wrong <= 5


@pytest.mark.parametrize("trials", [1, 3])
def test_a_deployment_that_is_a_tenth_slower_is_found_there_and_only_there(trials: int) -> None:
    chances = random.Random(2)
    for _ in range(10):
        found = compare(noisy(chances, None, trials), noisy(chances, "d2", trials))
        assert [each.verdict == "slower" for each in found.deployments] == [
            False,
            False,
            True,
            False,
        ]
        assert [each.name for each in find_regressions(found, 0.05)] == ["d2"]
        assert find_regressions(found, 0.2) == []


def test_the_power_is_what_simulation_says() -> None:
    # Twelve ratios that scatter by 0.03 × sqrt(2): so small a slow-down is found in 4 of 5 cases.
    least = detectable_slowdown(0.03 * math.sqrt(2), 12)
    assert least is not None
    chances = random.Random(3)
    hits = 0
    for _ in range(200):
        first, second = (
            study(
                *(
                    trial(100 * by * math.exp(chances.gauss(0, 0.03)), concurrency=n, requests=n)
                    for n in range(1, 13)
                )
            )
            for by in (1.0, 1 - least)
        )
        hits += compare(first, second).deployments[0].verdict == "slower"
    assert hits / 200 == pytest.approx(0.8, abs=0.09)  # three standard deviations
    shrunk = power_analysis(compare(noisy(chances, trials=1), noisy(chances, trials=1)))["d0"]
    assert shrunk[1] is not None and shrunk[3] is not None and shrunk[5] is not None
    assert shrunk[1] > shrunk[3] > shrunk[5] > 0.02


def test_what_cannot_be_compared_is_left_out_with_its_reason() -> None:
    first = study(
        trial(1.0),
        trial(1.0, concurrency=1),
        trial(1.0, concurrency=2),
        trial(1.0, concurrency=4, valid=False),
    )
    second = study(
        trial(1.0),
        trial(1.0, input_len=63),
        trial(1.0, concurrency=2, requests=4),
        trial(1.0, concurrency=4),
    )
    found = compare(first, second)
    assert len(found.cells) == 1
    assert [each.partition(" tokens: ")[2] for each in found.left_out] == [
        "only in the first",
        "only in the second",
        "requests is 8 in the first, 4 in the second",
        "no trial of the first study is valid",
    ]


def test_other_prompts_are_not_compared_where_they_are_known() -> None:
    first = study(trial(1.0, prompts="distinct"), trial(1.0, concurrency=4, prompts="distinct"))
    second = study(trial(1.0), trial(1.0, concurrency=4, prompts="identical"))
    found = compare(first, second)
    assert len(found.cells) == 1
    (told,) = found.left_out
    assert told.endswith("prompts is distinct in the first, identical in the second")
    assert len(compare(first, second.drop(columns="prompts")).cells) == 2


def test_deployments_of_other_names_are_matched_by_what_they_are() -> None:
    found = compare(study(trial(10.0)), study(trial(11.0, deployment="other")))
    assert found.cells[0].ratio == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"engine": "emulated", "time_scale": 0.005}, "emulated at 0.005 × time"),
        ({"protocol": "closed_loop"}, "only in the first"),
        ({"output_len": 50}, "31 \\+ 50 tokens: only in the second"),
    ],
)
def test_studies_that_are_not_alike_are_refused(other: dict[str, Any], told: str) -> None:
    with pytest.raises(ComparisonError, match=told):
        compare(study(trial(1.0)), study(trial(1.0, **other)))


def test_studies_of_two_kinds_are_compared_if_asked_for() -> None:
    emulated = study(trial(2.0, engine="emulated", time_scale=1.0))
    assert isinstance(compare(study(trial(1.0)), emulated, allow_mixed=True), Comparison)


def saved(cells: pd.DataFrame, folder: Path) -> str:
    (folder / "tables").mkdir(parents=True)
    write_cells(cells, folder / "tables/cells.parquet", folder / "tables/cells.csv")
    return str(folder)


def test_the_command_fails_on_what_it_is_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chances = random.Random(4)
    first = saved(noisy(chances), tmp_path / "a")
    second = saved(noisy(chances, "d1"), tmp_path / "b")
    assert main(["compare", first, second]) == 0
    printed = capsys.readouterr().out
    (line,) = [each for each in printed.splitlines() if each.startswith("| d1 |")][:1]
    assert line.split(" | ")[1] == "12"
    assert line.endswith("| slower |")
    assert main(["compare", first, second, "--fail-on", "slower:20%"]) == 0
    file = tmp_path / "page.html"
    assert main(["compare", first, second, "--fail-on", "slower:5%", "--page", str(file)]) == 1
    assert "Slower by more than 0.05: d1" in capsys.readouterr().out
    assert "<td>slower</td>" in file.read_text()


def test_emulated_figures_are_marked_wherever_they_are_compared() -> None:
    emulated = study(trial(1.0, engine="emulated", time_scale=0.05))
    mark = "emulated at 0.05 × time: these figures do not come from hardware."
    assert compare(emulated, emulated).notes == [f"Both studies: {mark}"]
    mixed = compare(study(trial(1.0)), emulated, allow_mixed=True)
    assert mixed.notes == [f"The second study: {mark}"]
    assert f"**The second study: {mark}**" in render_comparison_markdown(["a", "b"], mixed)
    page = render_comparison_page(["a", "b"], mixed)
    assert f'<p class="mark">The second study: {mark}</p>' in page
    assert compare(study(trial(1.0)), study(trial(1.0))).notes == []


def test_the_command_says_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(study(trial(1.0)), tmp_path / "a")
    assert main(["compare", folder, str(tmp_path / "none")]) == 2
    assert "none: does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / "empty"), folder]) == 2
    assert "has no tables/cells.parquet" in capsys.readouterr().err
    (tmp_path / "bundle.tar.gz").write_bytes(b"no archive")
    assert main(["compare", str(tmp_path / "bundle.tar.gz"), folder]) == 2


def test_a_p_value_and_its_interval_never_contradict_each_other() -> None:
    """The p value has a margin of INDIFFERENT that the interval does not have: p < 0.05 puts the
    whole interval on one side of 1. With other degrees of freedom for each, 262 of 3032 did not."""
    generator = np.random.default_rng(0)
    tested = 0
    for _ in range(3000):
        first = np.exp(generator.normal(0, 0.02, generator.integers(2, 4)))
        second = np.exp(generator.normal(-0.06, generator.choice([0.002, 0.05]), 2))
        ratio = compare_trials("cell", first.tolist(), second.tolist())
        assert ratio.p is not None and ratio.low is not None and ratio.high is not None
        assert ratio.low <= ratio.ratio <= ratio.high
        if ratio.p < 0.05:
            tested += 1
            assert not ratio.low <= 1 <= ratio.high
    assert tested > 300
