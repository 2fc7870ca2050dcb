"""Published figures in the shape of measured ones, and ratios of the two by hand."""

from typing import Any

import pandas as pd
import pytest

from servegrid.analysis.published import beside, differences, statements, summary_of
from servegrid.report.findings_report import NOT_COMPARABLE, beside_page, beside_table

PUBLISHED = summary_of("inria-2024")


def measured(rows: int = 3, **other: Any) -> pd.DataFrame:
    """Mistral's first cells as if they took 2 s each."""
    return PUBLISHED.head(rows).assign(seconds_per_100_tokens=2.0, **other)


def test_speeds_follow_from_the_published_seconds() -> None:
    assert len(PUBLISHED) == 392
    assert (PUBLISHED["trials_served"] == 0).sum() == 27  # the article's dashes
    first = PUBLISHED.iloc[0]
    assert first["seconds_per_100_tokens"] == 1.8
    assert first["output_tokens_per_s_per_user"] == pytest.approx(55.56, abs=0.01)


def test_ratios_and_what_rounding_leaves_of_them() -> None:
    pairs = beside(measured(), PUBLISHED)
    assert pairs["published_s"].tolist() == [1.8, 1.8, 1.9]
    assert pairs["ratio"].tolist() == pytest.approx([1.1111, 1.1111, 1.0526], abs=1e-4)
    # 2.0 / 1.85 and 2.0 / 1.75.
    assert pairs["ratio_low"].iloc[0] == pytest.approx(1.0811, abs=1e-4)
    assert pairs["ratio_high"].iloc[0] == pytest.approx(1.1429, abs=1e-4)
    (told,) = statements(pairs, {})
    assert told == (
        "mistral-7b_fp16_2xv100-16gb: 3 cells in both; the median takes 1.11 × the published time; "
        "3 differ by more than rounding and intervals explain."
    )


def test_an_interval_widens_the_range() -> None:
    ends = {"seconds_per_100_tokens_low": 1.7, "seconds_per_100_tokens_high": 2.4}
    pairs = beside(measured(1, **ends), PUBLISHED)
    assert pairs["ratio_low"].iloc[0] == pytest.approx(1.7 / 1.85)
    assert pairs["ratio_high"].iloc[0] == pytest.approx(2.4 / 1.75)
    assert "0 differ" in statements(pairs, {})[0]


@pytest.mark.parametrize(
    "other",
    [{"trials_valid": 0}, {"gpu": "h100"}, {"input_len": 30}, {"protocol": "closed_loop"}],
)
def test_only_what_is_alike_and_may_be_believed_is_compared(other: dict[str, Any]) -> None:
    assert beside(measured(**other), PUBLISHED).empty


def test_emulated_figures_are_compared_only_if_asked_for_and_at_the_time_they_stand_for() -> None:
    emulated = measured(1, engine="emulated", time_scale=0.5)
    assert beside(emulated, PUBLISHED).empty
    pairs = beside(emulated, PUBLISHED, emulated=True)
    assert pairs["ratio"].tolist() == pytest.approx([4.0 / 1.8])
    assert "(emulated)" in statements(pairs, {})[0]


def test_the_page_says_what_differs_or_that_nothing_can_be_compared() -> None:
    cells = pd.DataFrame({"engine": ["vllm"], "engine_version": ["0.32.0"], "trial": [3]})
    apart = differences(cells, ["distinct", "distinct"])
    pairs = beside(measured(1), PUBLISHED)
    text = beside_page(statements(pairs, {}), beside_table(pairs, {}), apart, [])
    assert "Prompts: distinct here;" in text
    assert "vllm 0.32.0 here;" in text
    assert "| 1.11 [1.08, 1.14] |" in text
    none = beside(measured(gpu="h100"), PUBLISHED)
    assert NOT_COMPARABLE in beside_page([], beside_table(none, {}), apart, [])
