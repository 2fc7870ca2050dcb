"""Bionic's table and conclusion, calculated by hand from its figures."""

import pandas as pd
import pytest

from servegrid.analysis.rule_of_thumb import active_users, check_conclusion, size_systems
from servegrid.report.capacity_report import render_rule_of_thumb


def test_the_rule_gives_a_mean_and_quantiles() -> None:
    # Binomial(1000, 1%), from a table.
    rule = active_users()
    assert (rule.mean, rule.p95, rule.p99) == (pytest.approx(10.0), 15, 18)


@pytest.mark.parametrize(
    ("users", "logged_in", "p95", "p99"),
    [(50_000, 0.1, 537, 552), (50_000, 0.25, 1308, 1332), (1_000_000, 0.1, 10_164, 10_232)],
)
def test_the_quantiles_are_right_for_many_users(
    users: int, logged_in: float, p95: int, p99: int
) -> None:
    # Binomial distributions, summed with 60 digits.
    rule = active_users(users, logged_in)
    assert (rule.mean, rule.p95, rule.p99) == (pytest.approx(users * logged_in / 10), p95, p99)


def test_the_price_per_token_per_second() -> None:
    table = size_systems().set_index("hardware")["usd_per_token_per_s"]
    for hardware, expected in {
        "AMD 2700X": 1250.0,
        "RTX 4090": 36.23,
        "A100": 14.0,
        "2 × RTX 4090": 197.37,
        "2 × A10G": 364.08,
        "Mac Studio M2 Ultra 192 GB": 406.61,
    }.items():
        assert table[hardware] == pytest.approx(expected, abs=0.01)
    assert pd.isna(table["AMD Epyc"])


def test_5000_dollars_suffice_only_for_small_models() -> None:
    answers = check_conclusion()
    # 10 × 5 = 50 tokens/s: one RTX 4090 has 138; two of them have 38, so two systems are needed.
    assert answers[7] == (
        True,
        "7 billion parameters: 50 tokens/s need hardware for at least 5,000 USD (RTX 4090, "
        "138 tokens/s each). About 5,000 USD suffice.",
    )
    assert answers[70] == (
        False,
        "70 billion parameters: 50 tokens/s need hardware for at least 15,000 USD "
        "(2 systems of 2 × RTX 4090, 38 tokens/s each). About 5,000 USD do not suffice.",
    )


def test_several_slow_systems_are_needed() -> None:
    needed = size_systems().set_index("hardware")["needed"]
    assert needed["AMD 2700X"] == 42  # 50 / 1.2 = 41.7
    assert needed["Mac Studio M2 Ultra 192 GB"] == 4


def test_the_printed_table_has_its_assumptions_and_no_sum_without_a_price() -> None:
    printed = render_rule_of_thumb()
    (epyc,) = [line for line in printed.splitlines() if "AMD Epyc" in line]
    assert [part.strip() for part in epyc.split("|")][3:7] == ["3.7", "–", "–", "14 ×"]
    assert "Two systems have twice the tokens/s." in printed
