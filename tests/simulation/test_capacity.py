"""The capacity plan against simulations in which the number of users is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from servegrid.analysis.capacity import Demand, HardwarePrices, plan_capacity
from servegrid.analysis.tables import fill_nulls
from servegrid.records import columns
from simulation.server import Server, closed_loop
from simulation.stepped_engine import Engine, burst, closed_loop_seconds, slo_attainment

LEVELS = (1, 2, 4, 8, 16, 32, 64, 128)
LIMIT_S, THINK_S = 20.0, 60.0
PRICES = HardwarePrices("USD", {})


def summary(rows: list[dict[str, Any]]) -> pd.DataFrame:
    base = {
        "deployment": "d",
        "gpu": "a100-40gb",
        "gpu_count": 1,
        "engine": "vllm",
        "output_len": 100,
        "trials_served": 1,
        "trials_valid": 1,
    }
    names = [column.name for column in columns.SUMMARY]
    frame = pd.DataFrame([base | row for row in rows], columns=names)
    return fill_nulls(frame, columns.SUMMARY)


def users_carried(cells: pd.DataFrame, **demand: Any) -> int:
    plan = plan_capacity(cells, Demand(think_time_s=THINK_S, **demand), PRICES)
    (row,) = plan.to_dict("records")
    return int(row["users_carried"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "mix",
    [{31: 9, 2193: 1}, {31: 1, 2193: 9}, dict.fromkeys((31, 63, 119, 296, 480, 822, 2193), 1)],
    ids=["nine in ten short", "nine in ten long", "seven lengths"],
)
def test_users_with_mixed_prompts_are_within_15_percent(mix: dict[int, int]) -> None:
    engine = Engine()
    cells = summary(
        [
            {
                "protocol": "closed_loop",
                "concurrency": n,
                "input_len": length,
                "seconds_per_100_tokens": closed_loop_seconds(engine, length, n),
            }
            for length in mix
            for n in LEVELS
        ]
    )
    planned = users_carried(cells, prompt_mix=mix)
    lengths, weights = np.array(list(mix)), np.array(list(mix.values()), float)

    def attainment(users: int) -> float:
        rng = np.random.default_rng(users)
        shares = weights / weights.sum()
        return slo_attainment(engine, lengths, shares, users, THINK_S, LIMIT_S, 3000, rng)

    # The number of users that the engine carries lies between these two.
    few, many = attainment(int(planned / 1.15)), attainment(int(planned / 0.85))
    print(f"{mix}: planned {planned} users; {few:.3f} with 1 / 1.15 of them, {many:.3f} / 0.85")
    assert few >= 0.95 > many


@pytest.mark.slow
def test_bursts_of_long_prompts_give_a_plan_with_at_most_20_percent_fewer_users() -> None:
    engine, length = Engine(), 2193
    cells: dict[str, list[dict[str, Any]]] = {"burst": [], "closed_loop": []}
    for n in LEVELS:
        seconds, in_flight = burst(engine, length, n)
        of_users = closed_loop_seconds(engine, length, n)
        for protocol, took, mean in (
            ("burst", seconds, in_flight),
            ("closed_loop", of_users, float(n)),
        ):
            measured = {"seconds_per_100_tokens": took, "in_flight_mean": mean}
            cells[protocol].append(
                {"protocol": protocol, "concurrency": n, "input_len": length, **measured}
            )
    bursts, users = (users_carried(summary(rows)) for rows in cells.values())
    print(f"from bursts {bursts}, from closed loops {users}")
    assert 0.8 * users <= bursts <= users


@pytest.mark.slow
def test_cells_of_users_who_think_give_the_same_plan_as_bursts() -> None:
    server = Server(base_s=5.0, slope_s=0.15, max_num_seqs=1000)
    bursts = [
        {"protocol": "burst", "concurrency": n, "seconds_per_100_tokens": server.seconds(n)}
        for n in LEVELS
    ]
    thinking = []
    for users in (2, 20, 100, 200, 300, 400, 600):
        rng = np.random.default_rng(users)
        requests = 8 * users + 500
        table = closed_loop(server, users, requests, THINK_S, rng)
        sent, done = (table[name].to_numpy() / 1e9 for name in ("sent_ns", "done_ns"))
        # After the start, and before the first user sends no more.
        start, end = 3 * THINK_S, np.sort(done)[requests - users - 1]
        ended = (done > start) & (done <= end)
        in_flight = (np.clip(done, start, end) - np.clip(sent, start, end)).sum() / (end - start)
        thinking.append(
            {
                "protocol": "closed_loop",
                "concurrency": users,
                "in_flight_mean": float(in_flight),
                "seconds_per_100_tokens": float((done - sent)[ended].mean()),
            }
        )
    expected, found = (
        users_carried(summary([row | {"input_len": 31} for row in rows]))
        for rows in (bursts, thinking)
    )
    print(f"from bursts {expected}, from users who think {found}")
    assert found == pytest.approx(expected, rel=0.05)
