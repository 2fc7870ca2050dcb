"""Published figures as a summary, and ratios of measured to published calculated by hand."""

from typing import Any

import pandas as pd
import pytest

from servegrid.analysis.published import (
    compare_with_published,
    describe_comparison,
    method_differences,
    published_summary,
)
from servegrid.analysis.tables import cast_columns
from servegrid.records import columns
from servegrid.reference.published import load_published
from servegrid.report.findings_report import (
    NO_PUBLISHED_DATA,
    NOT_COMPARABLE,
    published_table,
    render_published_comparison,
)

INRIA = load_published("inria-2024")
PUBLISHED = published_summary(INRIA)


def measured(rows: int = 3, **other: Any) -> pd.DataFrame:
    """Mistral's first cells as if they took 2 s each."""
    return PUBLISHED.head(rows).assign(seconds_per_100_tokens=2.0, **other)


def test_speeds_follow_from_the_published_seconds() -> None:
    assert len(PUBLISHED) == 392
    assert (PUBLISHED["trials_served"] == 0).sum() == 27  # the article's dashes
    first = PUBLISHED.iloc[0]
    assert first["seconds_per_100_tokens"] == 1.8
    assert first["output_tokens_per_s_per_user"] == pytest.approx(55.56, abs=0.01)


def test_ratios_have_the_range_that_rounding_allows() -> None:
    pairs = compare_with_published(measured(), INRIA)
    assert pairs["published_s"].tolist() == [1.8, 1.8, 1.9]
    assert pairs["ratio"].tolist() == pytest.approx([1.1111, 1.1111, 1.0526], abs=1e-4)
    # 2.0 / 1.85 and 2.0 / 1.75.
    assert pairs["ratio_low"].iloc[0] == pytest.approx(1.0811, abs=1e-4)
    assert pairs["ratio_high"].iloc[0] == pytest.approx(1.1429, abs=1e-4)
    (sentence,) = describe_comparison(pairs, {})
    assert sentence == (
        "mistral-7b_fp16_2xv100-16gb: 3 cells in both. The median ratio of measured to published "
        "time is 1.11. 3 cells differ by more than rounding and intervals can explain."
    )


def test_an_interval_widens_the_range() -> None:
    ends = {"seconds_per_100_tokens_low": 1.7, "seconds_per_100_tokens_high": 2.4}
    pairs = compare_with_published(measured(1, **ends), INRIA)
    assert pairs["ratio_low"].iloc[0] == pytest.approx(1.7 / 1.85)
    assert pairs["ratio_high"].iloc[0] == pytest.approx(2.4 / 1.75)
    assert "0 cells differ" in describe_comparison(pairs, {})[0]


@pytest.mark.parametrize(
    "other",
    [
        *({"trials_valid": 0}, {"gpu": "h100"}, {"input_len": 30}, {"protocol": "closed_loop"}),
        {"replicas": 2},
    ],
)
def test_only_equal_and_valid_cells_are_compared(other: dict[str, Any]) -> None:
    assert compare_with_published(measured(**other), INRIA).empty


def test_emulated_figures_are_compared_on_request_and_at_unscaled_time() -> None:
    emulated = measured(1, engine="emulated", time_scale=0.5)
    assert compare_with_published(emulated, INRIA).empty
    pairs = compare_with_published(emulated, INRIA, emulated=True)
    assert pairs["ratio"].tolist() == pytest.approx([4.0 / 1.8])
    assert "(emulated)" in describe_comparison(pairs, {})[0]


def test_the_report_lists_differences_in_method_or_says_that_nothing_is_comparable() -> None:
    names = [column.name for column in columns.CELLS]
    rows = [
        {"engine": "vllm", "engine_version": "0.32.0", "concurrency": 1, "trial": n}
        for n in (1, 2, 3)
    ]
    cells = cast_columns(pd.DataFrame(rows, columns=names), columns.CELLS)
    differences = method_differences(cells, ["distinct", "distinct"], INRIA)
    pairs = compare_with_published(measured(1), INRIA)
    sentences, table = describe_comparison(pairs, {}), published_table(pairs, {})
    text = render_published_comparison("A citation", sentences, table, differences, [])
    assert "| prompts | distinct | the article does not say" in text
    assert "3 trials per cell" in text
    assert "| software | vllm 0.32.0 | vLLM; the article" in text
    assert "Published: A citation." in text
    assert "| 1.11 [1.08, 1.14] |" in text
    none = published_table(compare_with_published(measured(gpu="h100"), INRIA), {})
    assert NOT_COMPARABLE in render_published_comparison("A citation", [], none, differences, [])
    unnamed = published_table(compare_with_published(measured(), None), {})
    assert NO_PUBLISHED_DATA in render_published_comparison(None, [], unnamed, [], [])
