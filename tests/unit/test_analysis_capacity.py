"""The capacity plan agrees with calculations by hand and with the article's tables."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from servegrid.analysis.capacity import (
    Demand,
    HardwarePrices,
    load_prices,
    parse_demand,
    plan_capacity,
)
from servegrid.analysis.findings import compute_frontier, format_max_within_slo
from servegrid.analysis.published import published_summary
from servegrid.analysis.slo import Slo
from servegrid.analysis.tables import fill_nulls, save_table
from servegrid.cli.main import main
from servegrid.errors import ConfigError
from servegrid.records import columns
from servegrid.reference.published import load_published

ROOT = Path(__file__).parents[2]
FILE = "summary.parquet"
HARDWARE = HardwarePrices("USD", {"a100-40gb": 8500.0, "v100-16gb": 5000.0})


def summary(*rows: dict[str, Any]) -> pd.DataFrame:
    base = {
        "deployment": "d",
        "gpu": "a100-40gb",
        "gpu_count": 2,
        "engine": "vllm",
        "protocol": "closed_loop",
        "input_len": 31,
        "output_len": 100,
        "trials_served": 1,
        "trials_valid": 1,
    }
    frame = pd.DataFrame(
        [base | row for row in rows], columns=[column.name for column in columns.SUMMARY]
    )
    return fill_nulls(frame, columns.SUMMARY)


def cell(concurrency: int, seconds: float | None, **other: Any) -> dict[str, Any]:
    return {"concurrency": concurrency, "seconds_per_100_tokens": seconds, **other}


def only(frame: pd.DataFrame) -> dict[str, Any]:
    (row,) = frame.to_dict("records")
    return row


def test_a_deployment_that_meets_the_slo_for_one_user_needs_two_replicas_for_two_users() -> None:
    # 1 s alone, 2 s with two in flight; 100 tokens/s mean a limit of 1 s. Users think for 1 s. A
    # single user always meets the SLO. With two users, the other one thinks in half of the cases.
    rows = summary(cell(1, 1.0), cell(2, 2.0))
    demand = Demand(users=2, logged_in=1.0, think_time_s=1.0, tokens_per_s_per_user=100.0)
    row = only(plan_capacity(rows, demand, HARDWARE))
    assert (row["max_in_flight"], row["users_carried"]) == (1, 1)
    assert (row["users_per_replica"], row["replicas"], row["gpus"]) == (1, 2, 4)
    assert row["purchase"] == 4 * 8500
    # Each user gets 100 tokens every 2 s. A replica has at most 100 tokens/s.
    assert row["output_tokens_per_s"] == pytest.approx(100.0)
    assert row["in_flight_mean"] == pytest.approx(1.0)
    assert row["purchase_per_token_per_s"] == pytest.approx(34_000 / 200)
    assert not row["max_in_flight_is_lower_bound"]
    easier = Demand(
        users=2, logged_in=1.0, think_time_s=1.0, slo_attainment=0.5, tokens_per_s_per_user=100
    )
    assert only(plan_capacity(rows, easier, HARDWARE))["users_carried"] == 2


def test_costs_per_million_tokens_follow_from_energy_and_years_in_use() -> None:
    rows = summary(*(cell(n, 10.0, energy_j_per_output_token=7.2 / n) for n in (1, 2)))
    hardware = HardwarePrices(
        "EUR", {"a100-40gb": 8766.0}, electricity_per_kwh=0.5, years_in_use=10.0
    )
    demand = Demand(users=10, logged_in=0.1, think_time_s=10.0)
    row = only(plan_capacity(rows, demand, hardware))
    # One user, in flight half of the time. Below 1 in flight, the energy is that of 1.
    assert row["energy_j_per_output_token"] == pytest.approx(7.2)
    assert row["energy_cost_per_million_tokens"] == pytest.approx(2.0 * 0.5)
    # 100 tokens every 20 s are 18000 per hour; the price is 2 × 8766, for 10 years of 8766 hours.
    assert row["purchase_per_million_tokens_at_peak"] == pytest.approx(0.2 / 18_000 * 1e6)
    # A week has 0.3 of the load of its busiest time, and so 0.3 of the tokens.
    assert row["purchase_per_million_tokens"] == pytest.approx(0.2 / (0.3 * 18_000) * 1e6)


def test_users_per_replica_follow_from_the_slow_end_of_the_intervals() -> None:
    ends = {"seconds_per_100_tokens_low": 5.0, "seconds_per_100_tokens_high": 30.0}
    rows = summary(
        cell(1, 5.0, **ends | {"seconds_per_100_tokens_high": 6.0}), cell(8, 10.0, **ends)
    )
    row = only(plan_capacity(rows, Demand(), HARDWARE))
    # The limit is 20 s. All eight meet it; at the slow end, 6 + 24 / 7 (n - 1) is 20 at n = 5.08.
    assert row["users_carried_low"] < row["users_carried"] <= row["users_carried_high"]
    assert row["users_per_replica"] == int(0.9 * row["users_carried_low"])
    assert row["max_in_flight"] == 8
    assert row["max_in_flight_is_lower_bound"]


@pytest.mark.parametrize(("slo", "limit"), [("ttft_s", 4.0), ("e2el_s", 7.0)])
def test_limits_on_latencies_bound_the_plan_as_they_bound_the_frontier(
    slo: str, limit: float
) -> None:
    # Both latencies grow by 1 s per request in flight: ttft from 1 s, e2el from 4 s.
    rows = summary(
        *(cell(n, 5.0, ttft_s_p50=float(n), e2el_s_p50=3.0 + n) for n in (1, 2, 8)),
    )
    demand = replace(Demand(), **{slo: limit})
    row = only(plan_capacity(rows, demand, HARDWARE))
    assert row["max_in_flight"] == 4
    assert only(compute_frontier(rows, demand.slo))["max_within_slo"] == 4
    assert row["users_carried"] < only(plan_capacity(rows, Demand(), HARDWARE))["users_carried"]


def test_an_slo_on_a_latency_that_is_not_known_gives_no_plan() -> None:
    rows = summary(cell(1, 5.0), cell(2, 6.0))
    reason = "the SLO limits the time to first token, which is not known for every cell"
    assert only(plan_capacity(rows, Demand(ttft_s=1.0), HARDWARE))["reason"] == reason
    frontier = only(compute_frontier(rows, Slo(ttft_s=1.0)))
    assert format_max_within_slo(frontier) == f"unknown ({reason})"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([cell(1, 1.0, trials_valid=0)], "there is no valid cell"),
        ([cell(1, None, trials_served=0, trials_valid=0)], "there is no valid cell"),
        ([cell(1, 60.0)], "too few requests meet the SLO, even with one user"),
        (
            [cell(64, 30.0), cell(128, 40.0)],
            "too few requests meet the SLO, even with one user",
        ),
        (
            [cell(1, 1.0), cell(1, None, input_len=63, trials_valid=0)],
            "there is no valid cell with prompts of 63 tokens",
        ),
    ],
)
def test_a_deployment_without_a_plan_has_a_reason(rows: list[dict[str, Any]], reason: str) -> None:
    row = only(plan_capacity(summary(*rows), Demand(), HARDWARE))
    assert row["reason"].startswith(reason)
    assert pd.isna(row["replicas"])


def test_the_maximum_is_no_lower_bound_if_a_higher_concurrency_was_not_valid() -> None:
    tried = plan_capacity(summary(cell(1, 1.0), cell(2, None, trials_valid=0)), Demand(), HARDWARE)
    assert (only(tried)["max_in_flight"], only(tried)["max_in_flight_is_lower_bound"]) == (1, False)


def test_the_curve_ends_below_the_lowest_concurrency_that_was_not_served() -> None:
    rows = summary(
        *(cell(1, 1.0), cell(4, 2.0), cell(16, 4.0)),
        cell(8, None, trials_served=0, trials_valid=0),
    )
    row = only(plan_capacity(rows, Demand(), HARDWARE))
    assert (row["max_in_flight"], row["max_in_flight_is_lower_bound"]) == (4, False)


def test_a_cell_that_is_not_valid_is_interpolated() -> None:
    # Between 1 s for one and 19 s for seven, five take 13 s. The 22 s of the cell do not count.
    rows = summary(cell(1, 1.0), cell(5, 22.0, trials_valid=0), cell(7, 19.0))
    row = only(plan_capacity(rows, Demand(), HARDWARE))
    assert (row["max_in_flight"], row["max_in_flight_is_lower_bound"]) == (7, True)


def test_the_load_of_a_burst_is_its_concurrency_however_early_its_requests_end() -> None:
    # The last request takes 1 s of 8 at once and 2 s of 16 at once. Others end before, so fewer are
    # in flight on average. 12 at once take 1.5 s, the limit of 100 tokens at 66.7 tokens/s.
    rows = summary(
        *(
            cell(n, seconds, in_flight_mean=mean, protocol="burst")
            for n, seconds, mean in ((8, 1.0, 6.0), (16, 2.0, 11.0))
        )
    )
    row = only(plan_capacity(rows, Demand(users=1, tokens_per_s_per_user=66.6), HARDWARE))
    assert row["max_in_flight"] == 12
    # 12 × 100 tokens in 1.5 s, on two GPUs.
    assert row["purchase_per_token_per_s"] == pytest.approx(2 * 8500 / 800)
    # Of users who think, as many are in flight on average as were measured: 8.5 take 1.5 s.
    thinking = rows.assign(protocol="closed_loop")
    row = only(plan_capacity(thinking, Demand(users=1, tokens_per_s_per_user=66.6), HARDWARE))
    assert row["max_in_flight"] == 8


def test_a_deployment_without_a_price_has_no_costs_and_comes_last() -> None:
    rows = summary(cell(1, 1.0, gpu="h100"), cell(1, 1.0, deployment="e"))
    table = plan_capacity(rows, Demand(), HARDWARE)
    assert table["deployment"].tolist() == ["e", "d"]
    assert pd.isna(table["purchase"].iloc[1])


def test_emulated_times_are_divided_by_the_time_scale() -> None:
    rows = summary(cell(1, 0.05, engine="emulated", time_scale=0.005))
    row = only(plan_capacity(rows, Demand(tokens_per_s_per_user=11.0), HARDWARE))
    assert row["emulated"]
    assert row["reason"] == "too few requests meet the SLO, even with one user"
    assert (
        only(plan_capacity(rows, Demand(tokens_per_s_per_user=9.0), HARDWARE))["max_in_flight"] == 1
    )


def test_the_plan_for_1000_users_from_the_articles_figures() -> None:
    table = plan_capacity(
        published_summary(load_published("inria-2024")), Demand(input_len=119), HARDWARE
    ).set_index("deployment")
    mixtral = table.loc["mixtral-8x7b_awq-4bit_2xa100-40gb"]
    assert mixtral["users_carried"] == 437
    assert mixtral["max_in_flight"] == 118
    # By mean value analysis of the same system with 600 digits, the share of requests that meet the
    # SLO is 0.506 with 472 users and 0.487 with 473.
    assert mixtral["users_at_50pct_slo"] == 472
    # With prompts of one length, a replica gets up to 0.9 × 437 = 393 users: two GPUs are enough.
    assert (mixtral["replicas"], mixtral["purchase"]) == (1, 17_000)
    # 118 × 100 tokens in 11.6 + 9.9 × 54 / 64 = 19.953 s.
    assert mixtral["purchase_per_token_per_s"] == pytest.approx(17_000 * 19.953125 / 11_800)
    # Llama 3 has another tokenizer, so the same prompt has 97 tokens.
    llama = table.loc["llama-3-70b_awq-4bit_2xa100-40gb"]
    assert llama["prompt_tokens"] == "97"
    # 64 requests take 15.2 s; 128 were not served.
    assert (llama["max_in_flight"], llama["max_in_flight_is_lower_bound"]) == (64, False)
    assert table["purchase"].is_monotonic_increasing
    assert table["purchase"].iloc[0] == 8500


def test_a_prompt_mix_gives_the_mean_time_and_one_limit_per_length() -> None:
    # 1 s with short prompts and 3 s with long ones. 100 tokens/s mean a limit of 1 s, so requests
    # with long prompts are too slow. 80% of all requests must meet the limit: that is possible with
    # a tenth of long prompts, but not with a quarter.
    rows = summary(cell(1, 1.0), cell(1, 3.0, input_len=119))
    fast = {"think_time_s": 1000.0, "tokens_per_s_per_user": 100.0, "slo_attainment": 0.8}
    mixed = only(plan_capacity(rows, Demand(**fast, prompt_mix={31: 3, 119: 1}), HARDWARE))
    assert mixed["users_carried"] == 0
    mostly = only(plan_capacity(rows, Demand(**fast, prompt_mix={30: 9, 120: 1}), HARDWARE))
    assert mostly["users_carried"] > 0
    # One user thinks for 10 s and waits for 1.5 s, the mean of 1, 1, 1 and 3.
    one = Demand(users=1, think_time_s=10.0, prompt_mix={31: 3, 119: 1})
    assert only(plan_capacity(rows, one, HARDWARE))["output_tokens_per_s"] == pytest.approx(
        100 / 11.5
    )
    missing = Demand(prompt_mix={31: 1, 2193: 1})
    assert only(plan_capacity(rows, missing, HARDWARE))["reason"] == (
        "prompts of about 2193 tokens were not measured"
    )


def test_the_demand_comes_from_the_study_or_from_defaults() -> None:
    assert parse_demand({}) == Demand(1000, 0.1, 60.0, 0.3, 0.95, 5.0, None)
    study = {"slo": {"tokens_per_s_per_user": 8}, "capacity": {"users": 50, "input_len": 31}}
    assert parse_demand(study) == Demand(users=50, tokens_per_s_per_user=8, input_len=31)
    mix = [{"input_len": 31, "share": 3}, {"input_len": 119, "share": 1}]
    assert parse_demand({"capacity": {"prompt_mix": mix}}).prompt_mix == {31: 3, 119: 1}


def test_the_repository_has_the_prices_of_the_article() -> None:
    hardware = load_prices(ROOT / "config/hardware.yaml")
    assert hardware.currency == "USD"
    assert hardware.prices == {"v100-16gb": 5000.0, "a100-40gb": 8500.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("currency: USD\n", "`gpus` is missing"),
        ("currency: USD\ngpus: {a: {price: -1}}\n", "gpus.a.price: -1 is less than 0"),
        ("currency: USD\ngpus: {a: {price: .inf}}\n", "gpus.a.price: inf is not a number"),
        (
            "currency: USD\nyears_in_use: .nan\ngpus: {}\n",
            "years_in_use: nan is not a number",
        ),
        ("currency: USD\ngpus: {}\nyears: 4\n", "unknown key `years`"),
        ("currency: USD\ngpus: {a: {cost: 1, price: 1}}\n", "gpus.a: unknown key `cost`"),
        ("[]", "is not a mapping of keys"),
    ],
)
def test_a_wrong_file_of_prices_is_refused_with_file_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "hardware.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_prices(file)
    assert str(refused.value).startswith(str(file))
    assert message in str(refused.value)


def run(*arguments: str) -> int:
    return main(["capacity", "--hardware", str(ROOT / "config/hardware.yaml"), *arguments])


def test_the_command_plans_from_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--published", "inria-2024", "--input-len", "119", "--users", "2000") == 0
    printed = capsys.readouterr().out
    assert (
        "2000 registered users. At the busiest time, a share of 0.1 is logged in (200 users)."
        in printed
    )
    (line,) = [each for each in printed.splitlines() if each.startswith("| mixtral-8x7b_awq")]
    assert [part.strip() for part in line.split("|")][1:9] == [
        *("mixtral-8x7b_awq-4bit_2xa100-40gb", "119", "118", "437", "472", "1", "2", "17,000"),
    ]
    assert "About 5,000 USD do not suffice" in printed
    assert "20 requests in flight on average, at most 28 for 95%" in printed


def test_the_command_plans_for_many_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--published", "inria-2024", "--users", "50000") == 0
    # Binomial(50000, 1%), summed with 60 digits.
    expected = "500 requests in flight on average, at most 537 for 95% and at most 552 for 99%"
    assert expected in capsys.readouterr().out


def test_the_command_refuses_an_slo_attainment_of_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--published", "inria-2024", "--slo-attainment", "1")
    assert "give a number below 1" in capsys.readouterr().err


def test_the_command_accepts_a_prompt_mix(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--published", "inria-2024", "--prompt-mix", "31:3,119:1") == 0
    assert (
        "Prompts have several lengths: 0.75 of 31, 0.25 of 119 tokens." in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("mix", "message"),
    [("31", "'31' must be LENGTH:SHARE,…"), ("31:1,31:2", "'31:1,31:2' has a length twice")],
)
def test_the_command_refuses_a_prompt_mix_that_is_not_clear(
    mix: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("--published", "inria-2024", "--prompt-mix", mix)
    assert message in capsys.readouterr().err


def test_the_command_names_a_missing_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--tables", str(tmp_path)) == 2
    message = capsys.readouterr().err
    assert "summary.parquet: the table cannot be read (no such file). Run" in message
    assert main(["capacity", "--hardware", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "concurrency"}, "has no column `concurrency`. Another tool or another version"),
        ({"text": "concurrency"}, "has the type string in the column `concurrency`."),
    ],
)
def test_the_command_refuses_a_table_of_another_kind(
    change: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_table(summary(cell(1, 1.0)), columns.SUMMARY, tmp_path / FILE, tmp_path / "s.csv")
    assert run("--tables", str(tmp_path)) == 0
    table = pq.read_table(tmp_path / FILE)
    if "drop" in change:
        table = table.drop([change["drop"]])
    else:
        place = table.column_names.index(change["text"])
        table = table.set_column(place, change["text"], pa.array(["1"]))
    pq.write_table(table, tmp_path / FILE)
    capsys.readouterr()
    assert run("--tables", str(tmp_path)) == 2
    printed = capsys.readouterr().err
    assert f"{tmp_path / FILE}: {message}" in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--users", "2147483648"], "'2147483648' is not an integer above 0, at most 2,147,483,64"),
        (["--users", "9" * 5000], "is not an integer above 0"),
        (["--think-time", "1e308"], "'1e308' is not between 1e-12 and 1e+12"),
        (["--ttft", "1e-320"], "'1e-320' is not between 1e-12 and 1e+12"),
        (["--prompt-mix", "31:1e308,119:1e308"], "'1e308' is not between 1e-12 and 1e+12"),
    ],
)
def test_the_command_refuses_numbers_that_it_cannot_compute_with(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--published", "inria-2024", *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_empty_name_of_published_figures_does_not_mean_the_study(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--published", "") == 2
    assert "--published: there is no published data set ``" in capsys.readouterr().err
