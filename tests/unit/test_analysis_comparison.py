"""The comparison of two studies: tests agree with tables, and errors have the stated rates."""

import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from servegrid.analysis.comparison import (
    MIN_EFFECT,
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
    generator: random.Random, slower: str | None = None, trials: int = 3, scatter: float = 0.03
) -> pd.DataFrame:
    """Four deployments with twelve cells each. The deployment `slower` is 10% slower."""
    return study(
        *(
            trial(
                (100.0 + concurrency)
                * (0.9 if f"d{place}" == slower else 1.0)
                * math.exp(generator.gauss(0, scatter)),
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
    # From a table; with one degree of freedom, p is 1 - 2 atan(t) / pi.
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (2.086, 20, 0.05), (2.845, 20, 0.01), (1.0, 1, 0.5)],
)
def test_p_values_agree_with_a_table(t: float, degrees: float, p: float) -> None:
    assert two_sided_p(t, degrees) == pytest.approx(p, abs=5e-5)
    assert two_sided_p(-t, degrees) == two_sided_p(t, degrees)
    assert two_sided_p(0.0, degrees) == pytest.approx(1.0)


def test_verdicts_control_the_false_discovery_rate() -> None:
    # The example of Benjamini and Hochberg (1995, section 3.2): 4 of 15 are discoveries.
    values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    values += [0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    ratios = [Ratio(str(p), 0.5, 0.4, 0.6, p, 3, 0.1) for p in reversed(values)]
    found = [each.p for each in apply_fdr(ratios) if each.verdict == "slower"]
    assert sorted(found) == values[:4]


def test_a_cell_with_two_trials_each_by_hand() -> None:
    first = study(trial(100.0), trial(100.0 * math.exp(0.02), trial=2))
    second = study(trial(80.0), trial(80.0 * math.exp(0.02), trial=2))
    (cell,) = compare(first, second).cells
    assert cell.ratio == pytest.approx(0.8)
    # Both variances are 0.0002: standard error sqrt(2 × 0.0001), 2 degrees of freedom.
    error = math.sqrt(0.0002)
    assert cell.low == pytest.approx(0.8 * math.exp(-4.303 * error), rel=1e-4)
    t = (math.log(1.25) - math.log(1.02)) / error
    # With two degrees of freedom, p is 1 - t / sqrt(2 + t²).
    assert cell.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)
    assert cell.verdict == "slower"


def test_a_cell_with_one_trial_each_has_a_ratio_but_no_verdict() -> None:
    (cell,) = compare(study(trial(100.0)), study(trial(50.0))).cells
    assert (cell.ratio, cell.p, cell.verdict) == (pytest.approx(0.5), None, "no evidence")


@pytest.mark.parametrize("trials", [1, 3])
def test_equal_studies_rarely_have_a_verdict(trials: int) -> None:
    generator = random.Random(1)
    wrong = sum(
        any(
            each.verdict != "no evidence"
            for each in compare(
                noisy(generator, None, trials), noisy(generator, None, trials)
            ).deployments
        )
        for _ in range(40)
    )
    # The rate is at most 5%. At exactly 5%, more than five of forty have a probability of 3%.
    assert wrong <= 5


@pytest.mark.parametrize("trials", [1, 3])
def test_only_the_slower_deployment_gets_a_verdict(trials: int) -> None:
    generator = random.Random(2)
    for _ in range(10):
        found = compare(noisy(generator, None, trials), noisy(generator, "d2", trials))
        assert [each.verdict == "slower" for each in found.deployments] == [
            False,
            False,
            True,
            False,
        ]
        assert [each.name for each in find_regressions(found, 0.05)] == ["d2"]
        assert find_regressions(found, 0.2) == []


def test_the_detectable_slowdown_agrees_with_a_simulation() -> None:
    # Twelve ratios with standard deviation 0.03 × sqrt(2).
    least = detectable_slowdown(0.03 * math.sqrt(2), 12)
    assert least is not None
    generator = random.Random(3)
    hits = 0
    for _ in range(200):
        first, second = (
            study(
                *(
                    trial(100 * by * math.exp(generator.gauss(0, 0.03)), concurrency=n, requests=n)
                    for n in range(1, 13)
                )
            )
            for by in (1.0, 1 - least)
        )
        hits += compare(first, second).deployments[0].verdict == "slower"
    assert hits / 200 == pytest.approx(0.8, abs=0.09)  # three standard deviations
    shrunk = power_analysis(compare(noisy(generator, trials=1), noisy(generator, trials=1)))["d0"]
    assert shrunk[1] is not None and shrunk[3] is not None and shrunk[5] is not None
    assert shrunk[1] > shrunk[3] > shrunk[5] > 0.02


def test_cells_that_cannot_be_compared_are_left_out_with_a_reason() -> None:
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
        "only in the first study",
        "only in the second study",
        "requests is 8 in the first study, 4 in the second",
        "no trial of the first study is valid",
    ]


def test_cells_with_different_prompts_are_not_compared_if_both_are_known() -> None:
    first = study(trial(1.0, prompts="distinct"), trial(1.0, concurrency=4, prompts="distinct"))
    second = study(trial(1.0), trial(1.0, concurrency=4, prompts="identical"))
    found = compare(first, second)
    assert len(found.cells) == 1
    (line,) = found.left_out
    assert line.endswith("prompts is distinct in the first study, identical in the second")
    assert len(compare(first, second.drop(columns="prompts")).cells) == 2


def test_deployments_without_a_common_name_are_matched_by_model_and_hardware() -> None:
    found = compare(study(trial(10.0)), study(trial(11.0, deployment="other")))
    assert found.cells[0].ratio == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"engine": "emulated", "time_scale": 0.005}, "emulated, times × 0.005"),
        ({"protocol": "closed_loop"}, "only in the first"),
        ({"output_len": 50}, "31 \\+ 50 tokens: only in the second"),
    ],
)
def test_studies_of_different_kinds_or_workloads_are_refused(
    other: dict[str, Any], message: str
) -> None:
    with pytest.raises(ComparisonError, match=message):
        compare(study(trial(1.0)), study(trial(1.0, **other)))


def test_studies_of_different_kinds_are_compared_with_allow_mixed() -> None:
    emulated = study(trial(2.0, engine="emulated", time_scale=1.0))
    assert isinstance(compare(study(trial(1.0)), emulated, allow_mixed=True), Comparison)


def saved(cells: pd.DataFrame, folder: Path) -> str:
    (folder / "tables").mkdir(parents=True)
    write_cells(cells, folder / "tables/cells.parquet", folder / "tables/cells.csv")
    return str(folder)


def test_the_command_fails_on_a_slowdown_above_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = random.Random(4)
    first = saved(noisy(generator), tmp_path / "a")
    second = saved(noisy(generator, "d1"), tmp_path / "b")
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


def test_comparisons_of_emulated_figures_have_a_note() -> None:
    emulated = study(trial(1.0, engine="emulated", time_scale=0.05))
    mark = "emulated, times × 0.05: these figures do not come from hardware."
    assert compare(emulated, emulated).notes == [f"Both studies: {mark}"]
    mixed = compare(study(trial(1.0)), emulated, allow_mixed=True)
    assert mixed.notes == [f"The second study: {mark}"]
    assert f"**The second study: {mark}**" in render_comparison_markdown(["a", "b"], mixed)
    page = render_comparison_page(["a", "b"], mixed)
    assert f'<p class="mark">The second study: {mark}</p>' in page
    assert compare(study(trial(1.0)), study(trial(1.0))).notes == []


def test_the_command_names_a_study_that_it_cannot_read(
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


@pytest.mark.parametrize("min_effect", [0.0, MIN_EFFECT])
def test_a_p_value_and_its_interval_never_contradict_each_other(
    min_effect: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p < 0.05 if and only if the interval excludes all ratios that count as no change.

    Before, the interval had rounded degrees of freedom, and could contain 1 with p < 0.05.
    """
    monkeypatch.setattr("servegrid.analysis.comparison.MIN_EFFECT", min_effect)
    generator = random.Random(5)
    significant = 0
    for _ in range(3000):
        scatter = generator.choice([0.002, 0.01, 0.05]), generator.choice([0.002, 0.01, 0.05])
        change = generator.choice([0.0, 0.02, -0.06, 0.2])
        first, second = (
            [math.exp(generator.gauss(mean, deviation)) for _ in range(generator.choice([2, 3]))]
            for mean, deviation in zip((0.0, change), scatter, strict=True)
        )
        ratio = compare_trials("cell", first, second)
        assert ratio.p is not None and ratio.low is not None and ratio.high is not None
        assert ratio.low <= ratio.ratio <= ratio.high
        excluded = ratio.low > 1 + min_effect or ratio.high < 1 / (1 + min_effect)
        assert (ratio.p < 0.05) == excluded
        if ratio.p < 0.05:
            assert not ratio.low <= 1 <= ratio.high
        significant += excluded
    assert 300 < significant < 2700
