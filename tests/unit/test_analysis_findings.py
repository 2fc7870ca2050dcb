"""The frontier, the knee and the findings, calculated by hand from the article's tables."""

import pandas as pd
import pytest

from servegrid.analysis.findings import Slo, compute_frontier, describe_findings, knee, parse_slo
from servegrid.analysis.published import published_summary
from servegrid.analysis.queueing import Curve
from servegrid.reference.published import load_published

PUBLISHED = published_summary(load_published("inria-2024"))
MIXTRAL = "mixtral-8x7b_awq-4bit_2xa100-40gb"


@pytest.mark.parametrize(
    ("deployment", "most"),
    [
        # From the tables: the last row in which a request takes at most 20 s.
        ("mistral-7b_fp16_2xv100-16gb", [128, 128, 128, 128, 64, 64, 32]),
        ("codestral-22b_gptq-8bit_2xv100-16gb", [64, 64, 64, 32, 32, 16, 8]),
        (MIXTRAL, [128, 128, 64, 64, 32, 32, 16]),
        ("mixtral-8x22b_awq-4bit_4xa100-40gb", [32, 32, 16, 8, 8, 8, 2]),
        ("llama-3-70b_awq-4bit_2xa100-40gb", [64, 64, 64, 32, 32, 32, 8]),
    ],
)
def test_the_highest_concurrency_with_5_tokens_per_second(deployment: str, most: list[int]) -> None:
    reach = compute_frontier(PUBLISHED, Slo())
    own = reach[reach["deployment"] == deployment].sort_values("input_len")
    assert own["max_within_slo"].tolist() == most


def test_the_maximum_is_a_lower_bound_at_the_highest_measured_concurrency() -> None:
    reach = compute_frontier(PUBLISHED, Slo()).set_index(["deployment", "input_len"])
    row = reach.loc[("codestral-22b_awq-4bit_1xa100-40gb", 31)]
    assert (row["max_within_slo"], row["max_within_slo_is_lower_bound"]) == (128, True)
    row = reach.loc[(MIXTRAL, 2193)]
    assert (row["max_served"], row["max_served_is_lower_bound"]) == (16, False)
    assert not row["max_within_slo_is_lower_bound"]


def test_latency_limits_count_and_the_first_failure_ends_the_range() -> None:
    cells = PUBLISHED[PUBLISHED["input_len"] == 31].copy()
    cells["ttft_s_p50"] = cells["concurrency"].map(lambda n: 9.0 if n == 4 else 1.0).astype(float)
    reach = compute_frontier(cells, Slo(ttft_s=2.0)).set_index("deployment")
    assert reach.loc[MIXTRAL, "max_within_slo"] == 2
    # 100 tokens in 3.1 s are 32 tokens/s, less than 40.
    assert pd.isna(compute_frontier(cells, Slo(40.0)).set_index("deployment").loc[MIXTRAL].iloc[6])


def test_a_cell_that_is_not_valid_is_served_but_does_not_meet_the_slo() -> None:
    cells = PUBLISHED[(PUBLISHED["input_len"] == 31) & (PUBLISHED["deployment"] == MIXTRAL)].copy()
    cells.loc[cells["concurrency"] == 8, "trials_valid"] = 0
    (row,) = compute_frontier(cells, Slo()).to_dict("records")
    assert (row["max_served"], row["max_within_slo"]) == (128, 4)


def test_from_the_knee_on_doubling_the_concurrency_almost_doubles_the_time() -> None:
    assert knee({1: 1.0, 2: 1.1, 4: 2.1, 8: 4.2}) == 2
    assert knee({1: 1.0, 2: 2.0, 4: 2.2}) is None
    assert knee({1: 1.0}) is None
    # Mixtral 8x7B, 119 tokens: 11.6 / 7.6 = 1.53, 21.5 / 11.6 = 1.85.
    reach = compute_frontier(PUBLISHED, Slo()).set_index(["deployment", "input_len"])
    assert reach.loc[(MIXTRAL, 119), "knee"] == 64
    # Mistral 7B, 2193 tokens: 9.2 / 5.9 = 1.56, then 2.07, 1.89 and 2.003.
    assert reach.loc[("mistral-7b_fp16_2xv100-16gb", 2193), "knee"] == 16


def test_the_articles_claims_follow_from_its_tables() -> None:
    own = PUBLISHED[PUBLISHED["deployment"] == MIXTRAL].set_index(["concurrency", "input_len"])
    # "Up to 700 tokens/second for 128 simultaneous requests with a nearly zero context".
    assert own.loc[(128, 31), "output_tokens_per_s"] == pytest.approx(691.9, abs=0.1)
    # "Just under 20 tokens per second for 20 simultaneous users": 4.3 to 6.0 s from 16 to 32 at 31
    # tokens are 4.725 s at 20, 21.2 tokens/s; at 63 tokens 4.6 to 6.4 are 5.05 s, 19.8.
    seconds = own["seconds_per_100_tokens"].unstack()
    speeds = {
        length: 100 / Curve((16, 32), (seconds.loc[16, length], seconds.loc[32, length])).at(20)
        for length in (31, 63, 119)
    }
    assert speeds[31] == pytest.approx(21.16, abs=0.01)
    assert speeds[63] == pytest.approx(19.80, abs=0.01)
    assert speeds[119] == pytest.approx(17.94, abs=0.01)


def test_findings_are_sentences_about_the_figures() -> None:
    own = PUBLISHED[PUBLISHED["deployment"] == MIXTRAL]
    (text,) = describe_findings(own, compute_frontier(own, Slo()), Slo(), {MIXTRAL: "Mixtral"})
    # 18.5 / 3.1 = 5.97; 10.0 / 6.0 = 1.67 and 18.5 / 10.0 = 1.85; 4.1 / 3.1 and 15.5 / 4.3.
    assert text == (
        "Mixtral, burst: Highest concurrency that meets the SLO (5 tokens/s): at least 128 with "
        "prompts of 31 tokens, 16 with prompts of 2193 tokens. With prompts of 31 tokens, the time "
        "grows by a factor of 6 from concurrency 1 to 128. The growth is linear from "
        "concurrency 64 on. "
        "Prompts of 2193 tokens take 1.3 × the time of prompts of 31 tokens at concurrency 1, and "
        "3.6 × at concurrency 16."
    )


def test_the_slo_comes_from_the_study() -> None:
    assert parse_slo({}) == Slo(5.0, None, None)
    text = str(parse_slo({"slo": {"tokens_per_s_per_user": 8, "ttft_s": 2, "e2el_s": 30}}))
    assert text == "8 tokens/s, the first token within 2 s, the last token within 30 s"
