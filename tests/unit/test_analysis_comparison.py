"""The comparison of two studies: tests agree with tables, and errors have the stated rates."""

import itertools
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
    compare_cell,
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
        "bring_up": 1,
        "allocation": "a",
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
    generator: random.Random,
    slower: str | None = None,
    bring_ups: int = 3,
    between: float = 0.02,
    within: float = 0.02,
) -> pd.DataFrame:
    """Four deployments with twelve cells each. The deployment `slower` is 10% slower.

    `between` and `within` are the standard deviations of the logarithms between bring-ups, and of
    the trials within one.
    """
    rows = []
    for place, bring_up in itertools.product(range(4), range(1, bring_ups + 1)):
        shift = generator.gauss(0, between) + math.log(0.9 if f"d{place}" == slower else 1.0)
        rows += [
            trial(
                (100.0 + concurrency) * math.exp(shift + generator.gauss(0, within)),
                deployment=f"d{place}",
                concurrency=concurrency,
                input_len=length,
                requests=concurrency,
                bring_up=bring_up,
                allocation=f"d{place}.{bring_up}",
            )
            for length in (31, 119, 296)
            for concurrency in (1, 2, 4, 8)
        ]
    return study(*rows)


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


def two_bring_ups(speed: float, **other: Any) -> pd.DataFrame:
    """A cell in two bring-ups whose speeds differ by 2%."""
    return study(
        trial(speed, allocation="a", **other),
        trial(speed * math.exp(0.02), allocation="b", bring_up=2, **other),
    )


def test_a_cell_with_two_bring_ups_each_by_hand() -> None:
    (cell,) = compare(two_bring_ups(100.0), two_bring_ups(80.0)).cells
    assert cell.ratio == pytest.approx(0.8)
    # Both variances are 0.0002: standard error sqrt(2 × 0.0001), 2 degrees of freedom.
    error = math.sqrt(0.0002)
    assert cell.low == pytest.approx(0.8 * math.exp(-4.303 * error), rel=1e-4)
    t = (math.log(1.25) - math.log(1.02)) / error
    # With two degrees of freedom, p is 1 - t / sqrt(2 + t²).
    assert cell.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)
    assert cell.verdict == "slower"
    assert cell.stdev == pytest.approx(math.sqrt(0.0002))


@pytest.mark.parametrize(
    "load",
    [
        {"protocol": "poisson", "concurrency": None, "request_rate": 2.0},
        {"protocol": "closed_loop", "think_time_s": 60.0},
    ],
    ids=["open loop", "users who think"],
)
def test_the_speed_is_that_of_a_request_where_users_decide_on_the_throughput(
    load: dict[str, Any],
) -> None:
    # 2 requests/s of 100 tokens are 200 tokens/s, whether a response takes 4 s or 5 s.
    first, second = (
        study(trial(200.0, seconds_per_100_tokens=seconds, **load)) for seconds in (4.0, 5.0)
    )
    (ratio,) = compare(first, second).deployments
    assert ratio.ratio == pytest.approx(0.8)


def test_trials_of_a_sweep_that_were_not_tried_are_of_no_cell() -> None:
    untried = trial(1.0, protocol="poisson", concurrency=None, verdict="unsupported", valid=None)
    both = study(trial(100.0), untried | {"output_tokens_per_s": None, "rate_fraction": 0.5})
    found = compare(both, both)
    assert [cell.ratio for cell in found.cells] == [1.0] and not found.left_out


def test_bring_ups_that_measured_different_cells_are_pairs() -> None:
    # Two studies that were resumed: their bring-ups have no cell in common. So there are two
    # changes, log 0.8 and log 0.8 + 0.02, and Student's t has one degree of freedom.
    first = study(trial(100.0), trial(200.0, concurrency=16, allocation="b"))
    second = study(
        trial(80.0, allocation="c"),
        trial(160.0 * math.exp(0.02), concurrency=16, allocation="d"),
    )
    (ratio,) = compare(first, second).deployments
    assert ratio.ratio == pytest.approx(0.8 * math.exp(0.01))
    # The two changes vary by 0.02 / √2, their mean by 0.02 / √2 / √2.
    assert ratio.low == pytest.approx(0.8 * math.exp(0.01 - 12.706 * 0.01), rel=1e-5)
    assert ratio.high == pytest.approx(0.8 * math.exp(0.01 + 12.706 * 0.01), rel=1e-5)


def test_a_bring_up_counts_by_its_cells() -> None:
    # In the first study, bring-up a measured all four cells, b only the last one.
    levels = (1, 2, 4, 8)
    fast, slow = 100 * math.exp(0.01), 100 * math.exp(-0.01)
    first = [trial(fast, concurrency=level) for level in levels]
    second = [
        trial(speed, concurrency=level, allocation=allocation)
        for level in levels
        for allocation, speed in (("c", fast), ("d", slow))
    ]
    found = compare(study(*first, trial(slow, allocation="b")), study(*second))
    (ratio,) = found.deployments
    # The first study has the logarithm 0.01 in three cells and 0 in the last, the second 0 in all.
    assert ratio.ratio == pytest.approx(math.exp(-0.0075))
    # Both pairs of bring-ups differ by 0.02: variance 0.0002, two degrees of freedom. The weights
    # are 3.5 / 4 and 0.5 / 4 in the first study, 1 / 2 each in the second.
    error = math.sqrt(0.0002 * (0.875**2 + 0.125**2 + 2 * 0.5**2))
    assert ratio.high == pytest.approx(math.exp(-0.0075 + 4.3027 * error), rel=1e-5)


def test_the_trials_of_one_bring_up_are_one_sample() -> None:
    first, second = (
        study(*(trial(speed, trial=number, allocation="a") for number in range(1, 9)))
        for speed in (100.0, 50.0)
    )
    found = compare(first, second)
    for ratio in (*found.cells, *found.deployments):
        assert (ratio.ratio, ratio.count) == (pytest.approx(0.5), 1)
        assert (ratio.low, ratio.high, ratio.p, ratio.verdict) == (None, None, None, "not tested")
    text = render_comparison_markdown(["a", "b"], found)
    assert "Not tested: a study with fewer than 2 bring-ups cannot show" in text
    assert "set `bring_ups: 3`" in text
    assert "| 2.0% (assumed) |" in text


def test_bring_ups_that_measured_different_cells_are_compared() -> None:
    # The first study measured each cell in another bring-up. Both are twice as fast in the second.
    first = study(
        trial(100.0, allocation="a", concurrency=1, requests=1),
        trial(300.0, allocation="b", concurrency=8),
    )
    second = study(
        *(trial(200.0, allocation=each, concurrency=1, requests=1) for each in "cd"),
        *(trial(600.0, allocation=each, concurrency=8) for each in "cd"),
    )
    (ratio,) = compare(first, second).deployments
    assert (ratio.ratio, ratio.count) == (pytest.approx(2.0), 2)
    assert ratio.stdev == pytest.approx(0, abs=1e-9)


def test_only_the_slower_deployment_gets_a_verdict() -> None:
    generator = random.Random(2)
    for _ in range(10):
        found = compare(noisy(generator), noisy(generator, "d2"))
        verdicts = [each.verdict for each in found.deployments]
        assert verdicts.count("slower") <= 1
        assert [each.name for each in find_regressions(found, 0.05)] in (["d2"], [])
        assert find_regressions(found, 0.2) == []


def test_the_detectable_slowdown_agrees_with_a_simulation() -> None:
    least = detectable_slowdown(0.02, 3)
    assert least is not None
    assert detectable_slowdown(0.02, 1) is None
    generator = random.Random(3)
    hits = 0
    for _ in range(2000):
        first, second = (
            {str(n): [by * math.exp(generator.gauss(0, 0.02))] for n in range(3)}
            for by in (1.0, 1 - least)
        )
        found = compare_cell("cell", first, second)
        hits += found.p is not None and found.p < 0.05 and found.ratio < 1
    assert hits / 2000 == pytest.approx(0.8, abs=0.027)  # three standard deviations
    power = power_analysis(compare(noisy(generator), noisy(generator)))["d0"]
    assert power[2] is not None and power[3] is not None and power[5] is not None
    assert power[2] > power[3] > power[5] > 0.02


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
    first = saved(noisy(generator, between=0.005), tmp_path / "a")
    second = saved(noisy(generator, "d1", between=0.005), tmp_path / "b")
    assert main(["compare", first, second]) == 0
    printed = capsys.readouterr().out
    (line,) = [each for each in printed.splitlines() if each.startswith("| d1 |")][:1]
    assert line.split(" | ")[1] == "3"
    assert line.endswith("| slower |")
    assert main(["compare", first, second, "--fail-on", "slower:20%"]) == 0
    file = tmp_path / "page.html"
    assert main(["compare", first, second, "--fail-on", "slower:5%", "--page", str(file)]) == 1
    assert "Slower by more than 5%: d1" in capsys.readouterr().out
    assert "<td>slower</td>" in file.read_text()


def test_a_limit_that_cannot_be_tested_is_not_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (
        saved(study(trial(speed)), tmp_path / name) for name, speed in (("a", 1.0), ("b", 0.5))
    )
    assert main(["compare", first, second]) == 0
    assert main(["compare", first, second, "--fail-on", "slower:5%"]) == 2
    assert "--fail-on: d0 cannot be tested" in capsys.readouterr().err


def test_comparisons_of_emulated_figures_have_a_note() -> None:
    emulated = study(trial(1.0, engine="emulated", time_scale=0.05))
    mark = "emulated, times × 0.05: these results do not come from hardware."
    assert compare(emulated, emulated).notes == [f"Both studies: {mark}"]
    mixed = compare(study(trial(1.0)), emulated, allow_mixed=True)
    assert mixed.notes == [f"The second study: {mark}"]
    assert f"**The second study: {mark}**" in render_comparison_markdown(["a", "b"], mixed)
    page = render_comparison_page(["a", "b"], mixed)
    assert f'<p class="mark">The second study: {mark}</p>' in page
    assert compare(study(trial(1.0)), study(trial(1.0))).notes == []


@pytest.mark.parametrize("speed", [0.0, -1.0])
def test_a_trial_without_a_speed_is_not_compared(speed: float) -> None:
    # Another client writes 0 for what it did not measure; it has no logarithm.
    with pytest.raises(ComparisonError, match="no trial of the second study is valid"):
        compare(study(trial(1.0)), study(trial(speed)))


def test_a_study_without_cells_is_named() -> None:
    with pytest.raises(ComparisonError, match=r"the second study has no cells\."):
        compare(study(trial(1.0)), study(trial(1.0)).iloc[:0])


def test_the_command_names_a_study_that_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(study(trial(1.0)), tmp_path / "a")
    assert main(["compare", folder, str(tmp_path / "none")]) == 2
    assert "none: does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / "empty"), folder]) == 2
    assert "has no tables/cells.parquet" in capsys.readouterr().err
    # Whether it exists cannot be told, as in a folder of another user; root may enter that one.
    long = str(tmp_path / ("n" * 300))
    assert main(["compare", folder, long]) == 2
    assert capsys.readouterr().err == (
        f"servegrid: {long}: cannot be used (File name too long). Correct the path or the "
        "permissions.\n"
    )
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
            {
                str(number): [math.exp(generator.gauss(mean, deviation))]
                for number in range(generator.choice([2, 3]))
            }
            for mean, deviation in zip((0.0, change), scatter, strict=True)
        )
        ratio = compare_cell("cell", first, second)
        assert ratio.p is not None and ratio.low is not None and ratio.high is not None
        assert ratio.low <= ratio.ratio <= ratio.high
        excluded = ratio.low > 1 + min_effect or ratio.high < 1 / (1 + min_effect)
        assert (ratio.p < 0.05) == excluded
        if ratio.p < 0.05:
            assert not ratio.low <= 1 <= ratio.high
        significant += excluded
    assert 300 < significant < 2700
