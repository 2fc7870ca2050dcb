"""Power of GPUs from their counters and samples, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from servegrid.analysis.energy import Power, power_of, state_of
from servegrid.records import columns, parquet

SECOND = 1_000_000_000


def power(*rows: tuple[float, str, float | None, float | None]) -> Power:
    """From time in s, device, W and J."""
    samples: list[dict[str, Any]] = [
        {"time_ns": int(time * SECOND), "device": device, "power_w": watts, "energy_j": joules}
        for time, device, watts, joules in rows
    ]
    return power_of(parquet.arrow_table(columns.TELEMETRY, samples))


def test_counters_and_samples_of_all_gpus_are_added() -> None:
    both = power(
        (0, "GPU-a", 100, 5000),
        (1, "GPU-a", 300, 5200),
        (3, "GPU-a", 100, 5800),  # 800 J in 3 s; 200 J + 400 J in 3 s
        (0, "GPU-b", 50, 10),
        (2, "GPU-b", 70, 110),  # 100 J in 2 s; 120 J in 2 s
        (1, "engine", None, None),
    )
    assert both.counted_w == pytest.approx(800 / 3 + 50)
    assert both.sampled_w == pytest.approx(200 + 60)
    assert both.mean_w == both.counted_w
    assert both.disagreement == pytest.approx(260 / (800 / 3 + 50) - 1)


def test_without_a_counter_the_sampled_power_stands() -> None:
    sampled = power((0, "GPU-a", 100, None), (2, "GPU-a", 200, None))
    assert (sampled.counted_w, sampled.mean_w, sampled.disagreement) == (None, 150, None)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [(0, "engine", None, None)],
        [(0, "GPU-a", 100, 1)],  # one sample is no time
        [(0, "GPU-a", 100, 1), (1, "GPU-a", 100, 2), (0, "GPU-b", 9, 1)],
        [(0, "GPU-a", None, None), (1, "GPU-a", None, None)],
        [(0, "GPU-a", 100, 1), (1, "GPU-a", 100, 2), (3.5, "engine", None, None)],
        [(0, "engine", None, None), (2.5, "GPU-a", 100, 1), (3, "GPU-a", 100, 2)],
        [(0, "GPU-a", 100, 1), (2.5, "GPU-a", 100, 2)],
        [(0, "GPU-a", 100, 1), (1, "GPU-a", 100, 2), (3.5, "GPU-a", None, None)],
    ],
)
def test_what_is_not_known_of_every_gpu_is_null(rows: list[Any]) -> None:
    assert power(*rows) == Power(None, None)


def test_a_counter_that_ran_backwards_began_anew_and_tells_nothing() -> None:
    rows = [(0, "GPU-a", 100, 500), (1, "GPU-a", 100, 3), (2, "GPU-a", 100, 900)]
    assert power(*rows) == Power(None, 100)


@pytest.mark.parametrize(
    ("counted", "sampled", "doubtful"),
    [
        (100, 111, True),
        (100, 89, True),
        (100, 109, False),
        (100, 91, False),
        (None, 100, None),
        (100, None, None),
        (0, 100, None),
    ],
)
def test_power_is_doubtful_where_counter_and_samples_differ_by_more_than_a_tenth(
    counted: float | None, sampled: float | None, doubtful: bool | None
) -> None:
    assert Power(counted, sampled).is_suspect is doubtful


def test_the_state_of_the_gpus_is_that_of_all_their_samples() -> None:
    samples: list[dict[str, Any]] = [
        {"device": "GPU-a", "utilization": 0.5, "temperature_c": 60, "sm_clock_mhz": 1400},
        {"device": "GPU-a", "utilization": None, "temperature_c": None, "sm_clock_mhz": None},
        {"device": "GPU-b", "utilization": 1.0, "temperature_c": 71, "sm_clock_mhz": 1100},
        {"device": "engine"},
    ]
    assert state_of(parquet.arrow_table(columns.TELEMETRY, samples)) == {
        "gpu_utilization_mean": 0.75,
        "gpu_temperature_c_max": 71,
        "sm_clock_mhz_min": 1100,
        "sm_clock_mhz_max": 1400,
    }
    nothing = state_of(parquet.arrow_table(columns.TELEMETRY, samples[-1:]))
    assert set(nothing.values()) == {None}


def test_samples_need_not_be_in_order() -> None:
    rows = [(2, "GPU-a", 100, 300), (0, "GPU-a", 100, 100), (1, "GPU-a", 100, 200)]
    assert power(*rows) == Power(100, 100)
