"""The capacity plan for the users of a trace or a file agrees with calculations by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from servegrid.analysis.capacity import Demand, HardwarePrices, plan_capacity, with_recorded
from servegrid.analysis.latency_curves import cover_lengths
from servegrid.analysis.tables import fill_nulls, save_table
from servegrid.cli.main import main
from servegrid.records import columns
from servegrid.report.capacity_basis import describe_basis
from servegrid.report.capacity_report import render_capacity_report
from servegrid.study.recorded_users import RecordedUsers

ROOT = Path(__file__).parents[2]
HARDWARE = HardwarePrices("USD", {"a100-40gb": 8500.0}, years_in_use=4.0)
MM1 = {"slo_attainment": 0.75, "tokens_per_s_per_user": 100.0, "think_time_s": 10.0}
"""A request meets the SLO if it is alone, and three quarters must."""


def summary(*rows: dict[str, Any]) -> pd.DataFrame:
    base = {
        "deployment": "d",
        "gpu": "a100-40gb",
        "gpu_count": 1,
        "engine": "vllm",
        "protocol": "closed_loop",
        "concurrency": 1,
        "input_len": 100,
        "output_len": 100,
        "seconds_per_100_tokens": 1.0,
        "trials_served": 1,
        "trials_valid": 1,
    }
    names = [column.name for column in columns.SUMMARY]
    return fill_nulls(pd.DataFrame([base | row for row in rows], columns=names), columns.SUMMARY)


def trace(**other: Any) -> RecordedUsers:
    """44 requests of 100 + 100 tokens within 100 s: 0.44 requests/s."""
    facts: dict[str, Any] = {
        "kind": "trace",
        "sha256": "1f2e3d4c" + 56 * "0",
        "requests": 44,
        "input_len": 100.0,
        "input_lens": ((100, 44),),
        "output_len": 100.0,
        "span_s": 100.0,
        "window_s": 100.0,
        "window_requests": 44,
    }
    return RecordedUsers(**{**facts, **other})


def plan(recorded: RecordedUsers, rows: Any = None, **demand: Any) -> dict[str, Any]:
    rows = summary({}) if rows is None else rows
    wanted = with_recorded(Demand(**(MM1 | demand)), recorded)
    (row,) = plan_capacity(rows, wanted, HARDWARE).to_dict("records")
    return {name: None if pd.isna(value) else value for name, value in row.items()}


def test_a_request_rate_needs_replicas_and_users_follow_from_it() -> None:
    row = plan(trace())
    # M/M/1: 1 - rate of the requests find nobody. A replica gets 0.9 of 0.25 requests/s.
    assert row["requests_per_s_carried"] == pytest.approx(0.25)
    assert row["requests_per_s_per_replica"] == pytest.approx(0.225)
    assert (row["replicas"], row["purchase"]) == (2, 17_000)
    # Each of the two has 0.22 requests/s: 0.22 / 0.78 in flight, for 1 / 0.78 s each.
    assert row["in_flight_mean"] == pytest.approx(2 * 0.22 / 0.78)
    assert row["response_s_mean"] == pytest.approx(1 / 0.78)
    assert row["output_tokens_per_s"] == pytest.approx(44)
    # Little: 0.44 × (10 + 1 / 0.78) = 4.96 users. At 0.25 requests/s, 0.25 × (10 + 4 / 3) = 2.83.
    assert (row["users_logged_in"], row["users_carried"]) == (5, 2)
    assert (row["requests_not_covered"], row["prompt_tokens_mean"]) == (0, 100)


def test_the_intervals_of_the_times_give_a_lower_rate() -> None:
    ends = {"seconds_per_100_tokens_low": 0.5, "seconds_per_100_tokens_high": 1.0}
    row = plan(trace(), summary({"seconds_per_100_tokens": 0.8, **ends}))
    # With 0.8 s, 1 - 0.8 × rate must be 0.75; with 1 s, as above.
    assert row["requests_per_s_carried"] == pytest.approx(0.3125)
    assert row["requests_per_s_carried_low"] == pytest.approx(0.25)
    assert row["requests_per_s_per_replica"] == pytest.approx(0.225)
    assert row["users_carried_low"] == 2
    assert row["users_carried_high"] == 5  # 0.5 requests/s × 10 s, and 1/3 in flight


def test_the_think_time_is_recorded_or_follows_from_the_time_between_requests() -> None:
    # 0.44 × 15 s are 6.6 users, whatever the response time; the think time is 15 - 1 / 0.78 s.
    assert plan(trace(cycle_s=15.0))["users_logged_in"] == 7
    # 0.44 × (20 + 1 / 0.78) = 9.36.
    assert plan(trace(cycle_s=15.0, think_time_s=20.0))["users_logged_in"] == 10
    # Half of the requests are the last ones: 0.44 × (0.5 × 20 + 1 / 0.78) = 4.96, and
    # 0.44 × (0.5 × 15 + 0.5 / 0.78) = 3.58.
    assert plan(trace(cycle_s=15.0, think_time_s=20.0, followed=0.5))["users_logged_in"] == 5
    assert plan(trace(cycle_s=15.0, followed=0.5))["users_logged_in"] == 4
    # Faster than the modelled response: at least the requests in flight are users.
    assert plan(trace(cycle_s=0.1))["users_logged_in"] == 1
    # The number of replicas does not depend on it.
    assert plan(trace(cycle_s=0.1))["replicas"] == plan(trace(), think_time_s=500)["replicas"] == 2


def test_the_load_factor_of_a_day_counts_for_the_costs() -> None:
    day = {"requests": 9504, "span_s": 86_400.0}  # 0.11 requests/s, a quarter of the busiest
    known = plan(trace(**day), load_factor=0.9)
    assert known["purchase_per_million_tokens"] == pytest.approx(
        4 * known["purchase_per_million_tokens_at_peak"]
    )
    assumed = plan(trace(), load_factor=0.5)
    assert assumed["purchase_per_million_tokens"] == pytest.approx(
        2 * assumed["purchase_per_million_tokens_at_peak"]
    )


def test_bursts_need_more_replicas_which_share_them() -> None:
    # Two requests can be in flight. With a dispersion of 2, one replica has groups of two: M/M/1,
    # 0.9 × 2 × 0.25 = 0.45 requests/s. For the 0.44 of the trace, one is enough.
    two = summary({"concurrency": 2, "seconds_per_100_tokens": 1.0})
    one = plan(trace(dispersion=2.0), two)
    assert (one["replicas"], one["requests_per_s_per_replica"]) == (1, pytest.approx(0.45))
    assert one["in_flight_mean"] == pytest.approx(2 * 0.22 / 0.78)
    # Of a group of 3, not even three quarters can meet the SLO. Two replicas have groups of two.
    more = plan(trace(dispersion=3.0), two)
    assert (more["replicas"], more["requests_per_s_per_replica"]) == (2, pytest.approx(0.45))
    assert plan(trace(dispersion=0.5), two)["replicas"] == plan(trace(), two)["replicas"] == 1


def test_a_server_that_breaks_down_under_load_has_a_plan() -> None:
    # Up to 4 in flight take 1 s; 5 take 1000 s. At 0.005 requests/s almost all find none, but with
    # 5 in flight they stay there for long: half of the requests do so at 5 / 1000 × (1 - 3e-11).
    cells = [{"concurrency": n, "seconds_per_100_tokens": 1.0} for n in (1, 4)]
    rows = summary(*cells, {"concurrency": 5, "seconds_per_100_tokens": 1000.0})
    row = plan(trace(window_requests=4), rows, tokens_per_s_per_user=50.0)
    assert row["replicas"] == 9  # 0.04 / (0.9 × 0.005)
    assert row["users_at_50pct_slo"] == 1_000_000
    # All requests that are not too long must meet the SLO, but for 1.2 in a million. More than a
    # million replicas could do that.
    slack = {"slo_attainment": 0.96 - 1.2e-6}
    alone = plan(trace(input_lens=((100, 96), (101, 4)), dispersion=2.0), **slack)
    assert alone["reason"] == "too few requests meet the SLO, even with one user"


def test_lengths_between_measured_ones_keep_their_mean() -> None:
    # 250 is a quarter of the way from 200 to 400. 50 counts as 100, and 500 as 400.
    found = cover_lengths([(50, 1), (100, 2), (250, 4), (500, 1)], [400, 100, 200])
    assert found.shares == pytest.approx({100: 3 / 8, 200: 3 / 8, 400: 2 / 8})
    assert found.mean == pytest.approx((3 * 100 + 4 * 250 + 400) / 8)
    assert found.requests_missing == pytest.approx(1 / 8)
    # 100 of 50 + 200 + 1000 + 500 tokens.
    assert found.tokens_missing == pytest.approx(100 / 1750)


def test_lengths_between_measured_ones_take_interpolated_times() -> None:
    rows = summary({}, {"input_len": 300, "seconds_per_100_tokens": 3.0})
    slow = {"tokens_per_s_per_user": 1.0, "slo_attainment": 0.5}
    # Prompts of 200 tokens take 2 s: 1 - 2 × rate of them find nobody.
    row = plan(trace(input_lens=((200, 44),)), rows, **slow)
    assert row["requests_per_s_carried"] == pytest.approx(0.25)
    assert row["prompt_tokens"] == "100 to 300"
    assert row["prompt_tokens_mean"] == pytest.approx(200)
    # Two lengths: a replica gets 0.85 of it.
    assert row["requests_per_s_per_replica"] == pytest.approx(0.85 * 0.25)


def test_requests_that_are_longer_than_measured_miss_the_slo() -> None:
    # 4% are longer, so 0.96 (1 - rate) must be 0.75.
    row = plan(trace(input_lens=((100, 96), (110, 4))))
    assert row["requests_per_s_carried"] == pytest.approx(1 - 0.75 / 0.96)
    assert row["requests_not_covered"] == pytest.approx(0.04)
    assert row["prompt_tokens_not_covered"] == pytest.approx(40 / 10_040)


@pytest.mark.parametrize(
    ("lengths", "demand", "reason"),
    [
        (
            ((100, 90), (110, 10)),
            {},
            "10.0% of the requests have longer prompts than the 100 tokens that were measured, "
            "and the limit is 5%: measure longer prompts",
        ),
        (
            ((100, 97), (110, 3)),
            {"slo_attainment": 0.98},
            "3.0% of the requests have longer prompts than the 100 tokens that were measured, "
            "and the limit is 2%: measure longer prompts",
        ),
        (
            # 2 × 900 of 9,800 + 2,000 tokens.
            ((100, 98), (1000, 2)),
            {},
            "15.3% of the prompt tokens are beyond the 100 tokens that were measured, "
            "and the limit is 5%: measure longer prompts",
        ),
    ],
)
def test_without_the_lengths_there_is_no_plan(
    lengths: tuple[tuple[int, int], ...], demand: dict[str, Any], reason: str
) -> None:
    row = plan(trace(input_lens=lengths), **demand)
    assert row["reason"] == reason
    assert row["replicas"] is None
    assert row["requests_not_covered"] == pytest.approx(lengths[1][1] / 100)


def test_a_length_without_a_valid_cell_is_not_measured() -> None:
    failed = {"input_len": 400, "trials_served": 0, "trials_valid": 0}
    row = plan(trace(input_lens=((100, 40), (400, 4))), summary({}, failed))
    assert row["reason"].startswith("9.1% of the requests have longer prompts than the 100 tokens")
    none = plan(trace(), summary({"trials_valid": 0}))
    assert none["reason"] == "there is no valid cell"


def test_longer_outputs_take_longer_in_proportion() -> None:
    slow = {"tokens_per_s_per_user": 80.0}
    longer = plan(trace(output_len=125.0), **slow)
    # A request takes 1.25 s, at 100 tokens/s as measured: 1 - 1.25 × rate must be 0.75.
    assert longer["requests_per_s_carried"] == pytest.approx(0.2)
    assert longer["output_tokens_per_s"] == pytest.approx(0.44 * 125)
    # Shorter ones count as a whole request, but have their own tokens.
    shorter = plan(trace(output_len=80.0), **slow)
    assert shorter["requests_per_s_carried"] == pytest.approx(0.25)
    assert shorter["output_tokens_per_s"] == pytest.approx(0.44 * 80)
    for mean in (151.0, 66.0):
        reason = f"outputs of about {mean:.0f} tokens, the mean of the trace, were not measured"
        assert plan(trace(output_len=mean))["reason"] == reason


def test_the_limit_on_the_whole_latency_is_for_the_recorded_output_length() -> None:
    rows = summary({"e2el_s_p50": 1.0})
    kept = {"tokens_per_s_per_user": 1.0}
    assert plan(trace(output_len=125.0), rows, e2el_s=1.3, **kept)["max_in_flight"] == 1
    assert plan(trace(output_len=125.0), rows, e2el_s=1.2, **kept)["max_in_flight"] == 0


def test_a_file_has_lengths_for_the_assumed_users() -> None:
    file = {"kind": "file", "span_s": 0.0, "window_s": 0.0, "window_requests": 0}
    users = trace(**file, output_len=125.0)
    # Of 10 users one is logged in: 10 s to think, and 1.25 s for 125 tokens.
    one = plan(users, users=10)
    assert (one["users_logged_in"], one["requests_per_s_carried"]) == (1, None)
    assert one["output_tokens_per_s"] == pytest.approx(125 / 11.25)
    unknown = plan(trace(**file, output_len=None), users=10)
    assert unknown["output_tokens_per_s"] == pytest.approx(100 / 11)
    # 4% of the requests are longer than measured, so all others must meet the SLO: one user alone.
    longer = plan(trace(**file, input_lens=((100, 96), (101, 4))), users=10, slo_attainment=0.96)
    assert longer["users_carried"] == 1
    assert longer["requests_not_covered"] == pytest.approx(0.04)


def test_measured_recorded_assumed_and_modelled_are_told_apart() -> None:
    day = {"requests": 9504, "span_s": 86_400.0, "left_out": 3, "dispersion": 1.2}
    users = trace(**day, cycle_s=40.0, think_time_s=30.0, sessions=12, window_output_len=90.0)
    demand = with_recorded(Demand(), users)
    basis = describe_basis(demand, HARDWARE)
    assert list(basis) == ["Measured", "From the trace 1f2e3d4c", "Assumed", "Modelled"]
    recorded, assumed = (" ".join(basis[title]) for title in list(basis)[1:3])
    for text in (
        "9504 requests within 24 hours; 3 rows left out.",
        "Outputs: 100 tokens on average.",
        "0.44 requests/s (44 requests)",
        "a load factor of 0.25",
        "12 sessions",
        "30 s.",
    ):
        assert text in recorded
    for text in ("registered", "between a response", "mean load of a week", "prompt lengths"):
        assert text not in assumed
    short = describe_basis(with_recorded(Demand(), trace()), HARDWARE)
    assert "On average, 60 s pass" in " ".join(short["Assumed"])
    assert "The mean load of a week is 0.3" in " ".join(short["Assumed"])
    assert "like a Poisson process: the trace is too short" in " ".join(short["Assumed"])
    assert "per 10 s, within 100 s: 1.2" in recorded and "Poisson process" not in assumed
    plain = describe_basis(Demand(), HARDWARE)
    assert list(plain) == ["Measured", "Assumed", "Modelled"]
    assert "1000 registered users" in plain["Assumed"][0]


def test_the_report_has_the_lists_and_what_is_not_covered() -> None:
    users = trace(input_lens=((100, 96), (110, 4)))
    demand = with_recorded(Demand(**MM1), users)
    report = render_capacity_report(plan_capacity(summary({}), demand, HARDWARE), demand, HARDWARE)
    titles = ("\nMeasured:\n", "\nFrom the trace 1f2e3d4c:\n", "\nAssumed:\n", "\nModelled:\n")
    places = [report.index(title) for title in titles]
    assert places == sorted(places)
    lines = [line for line in report.splitlines() if line.startswith("| d ")]
    assert [part.strip() for part in lines[1].split("|")][1:9] == [
        *("d", "0.219", "0.197", "1.17", "5", "100", "4%", "0.398%"),
    ]
    assert "rule of thumb" not in report  # it counts users


def write_tables(folder: Path) -> Path:
    save_table(summary({}), columns.SUMMARY, folder / "summary.parquet", folder / "summary.csv")
    return folder


def run(folder: Path, *arguments: str) -> int:
    hardware = str(ROOT / "config/hardware.yaml")
    return main(["capacity", "--hardware", hardware, "--tables", str(folder), *arguments])


def test_the_command_plans_for_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.csv"
    rows = [f"{number / 5:g},100,100\n" for number in range(51)]  # 51 requests in 10 s
    path.write_text("Timestamp,Request tokens,Response tokens\n" + "".join(rows), encoding="utf-8")
    folder = write_tables(tmp_path)
    assert run(folder, "--trace", str(path), "--tokens-per-s-per-user", "100") == 0
    printed = capsys.readouterr().out
    assert "5.1 requests/s (51 requests)" in printed
    # 5.1 / (0.9 × 0.05) = 113.3.
    (line, _) = [each for each in printed.splitlines() if each.startswith("| d ")]
    assert [part.strip() for part in line.split("|")][6:8] == ["114", "114"]
    assert run(folder, "--trace", str(path), "--users", "7") == 2
    assert "--users, --logged-in: the trace has a request rate" in capsys.readouterr().err
    assert run(folder, "--trace", str(tmp_path / "none.csv")) == 2
    refused = capsys.readouterr().err
    assert "none.csv: cannot be read (No such file or directory). Correct `--trace`" in refused
