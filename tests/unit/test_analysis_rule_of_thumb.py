"""Bionic's table and conclusion, by hand from its own figures."""

import pandas as pd
import pytest

from servegrid.analysis.rule_of_thumb import conclusion, in_flight, systems
from servegrid.report.capacity_report import render_rule_of_thumb


def test_the_rule_is_a_mean_that_chance_exceeds() -> None:
    # Binomial(1000, 1%), as in any table of it.
    rule = in_flight()
    assert (rule.mean, rule.p95, rule.p99) == (pytest.approx(10.0), 15, 18)


@pytest.mark.parametrize(
    ("users", "logged_in", "p95", "p99"),
    [(50_000, 0.1, 537, 552), (50_000, 0.25, 1308, 1332), (1_000_000, 0.1, 10_164, 10_232)],
)
def test_the_rule_holds_for_many_users(users: int, logged_in: float, p95: int, p99: int) -> None:
    # Binomial distributions summed in decimals of 60 digits.
    rule = in_flight(users, logged_in)
    assert (rule.mean, rule.p95, rule.p99) == (pytest.approx(users * logged_in / 10), p95, p99)


def test_the_price_of_a_token_per_second() -> None:
    table = systems().set_index("hardware")["usd_per_token_per_s"]
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


def test_5000_dollars_suffice_for_the_small_models_only() -> None:
    told = conclusion()
    # 10 × 5 = 50 tokens/s: one RTX 4090 gives 138; of two of them, 38, it takes two systems.
    assert told[7] == (
        True,
        "7 billion parameters: 50 tokens/s cost at least 5,000 USD (RTX 4090, 138 tokens/s each), "
        "so that about 5,000 USD suffice.",
    )
    assert told[70] == (
        False,
        "70 billion parameters: 50 tokens/s cost at least 15,000 USD (2 × 2 × RTX 4090, "
        "38 tokens/s each), so that about 5,000 USD do not suffice.",
    )


def test_a_system_too_slow_is_needed_several_times() -> None:
    needed = systems().set_index("hardware")["needed"]
    assert needed["AMD 2700X"] == 42  # 50 / 1.2 = 41.7
    assert needed["Mac Studio M2 Ultra 192 GB"] == 4


def test_what_is_printed_says_what_was_taken_for_it_and_gives_no_sum_without_a_price() -> None:
    printed = render_rule_of_thumb()
    (epyc,) = [line for line in printed.splitlines() if "AMD Epyc" in line]
    assert [part.strip() for part in epyc.split("|")][3:7] == ["3.7", "–", "–", "14 ×"]
    assert "Two systems have twice the tokens/s." in printed
