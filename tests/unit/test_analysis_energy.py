"""Power of GPUs from their counters and samples, calculated by hand."""

from __future__ import annotations

from typing import Any

import pytest

from servegrid.analysis.energy import Power, gpu_columns, mean_power
from servegrid.records import columns, parquet

SECOND = 1_000_000_000


def power(*rows: tuple[float, str, float | None, float | None]) -> Power:
    """The power of rows of time in s, device, W and J."""
    samples: list[dict[str, Any]] = [
        {"time_ns": int(time * SECOND), "device": device, "power_w": watts, "energy_j": joules}
        for time, device, watts, joules in rows
    ]
    return mean_power(parquet.arrow_table(columns.TELEMETRY, samples))


def test_the_power_of_all_gpus_is_added() -> None:
    both = power(
        (0, "GPU-a", 100, 5000),
        (1, "GPU-a", 300, 5200),
        (3, "GPU-a", 100, 5800),  # 800 J in 3 s; 200 J + 400 J in 3 s
        (0, "GPU-b", 50, 10),
        (2, "GPU-b", 70, 110),  # 100 J in 2 s; 120 J in 2 s
        (1, "engine", None, None),
    )
    assert both.counter_w == pytest.approx(800 / 3 + 50)
    assert both.sampled_w == pytest.approx(200 + 60)
    assert both.mean_w == both.counter_w
    assert both.disagreement == pytest.approx(260 / (800 / 3 + 50) - 1)


def test_without_a_counter_the_sampled_power_is_used() -> None:
    sampled = power((0, "GPU-a", 100, None), (2, "GPU-a", 200, None))
    assert (sampled.counter_w, sampled.mean_w, sampled.disagreement) == (None, 150, None)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [(0, "engine", None, None)],
        [(0, "GPU-a", 100, 1)],  # one sample has no duration
        [(0, "GPU-a", 100, 1), (1, "GPU-a", 100, 2), (0, "GPU-b", 9, 1)],
        [(0, "GPU-a", None, None), (1, "GPU-a", None, None)],
        [(0, "GPU-a", 100, 1), (1, "GPU-a", 100, 2), (3.5, "engine", None, None)],
        [(0, "engine", None, None), (2.5, "GPU-a", 100, 1), (3, "GPU-a", 100, 2)],
        [(0, "GPU-a", 100, 1), (2.5, "GPU-a", 100, 2)],
        [(0, "GPU-a", 100, 1), (1, "GPU-a", 100, 2), (3.5, "GPU-a", None, None)],
    ],
)
def test_the_power_is_unknown_if_one_gpu_is_unknown(rows: list[Any]) -> None:
    assert power(*rows) == Power(None, None)


def test_a_counter_that_ran_backwards_is_not_used() -> None:
    rows = [(0, "GPU-a", 100, 500), (1, "GPU-a", 100, 3), (2, "GPU-a", 100, 900)]
    assert power(*rows) == Power(None, 100)


@pytest.mark.parametrize(
    ("counter", "sampled", "suspect"),
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
def test_power_is_suspect_if_counter_and_samples_differ_by_more_than_10_percent(
    counter: float | None, sampled: float | None, suspect: bool | None
) -> None:
    assert Power(counter, sampled).is_suspect is suspect


def test_gpu_columns_cover_all_samples_of_all_gpus() -> None:
    samples: list[dict[str, Any]] = [
        {"device": "GPU-a", "utilization": 0.5, "temperature_c": 60, "sm_clock_mhz": 1400},
        {"device": "GPU-a", "utilization": None, "temperature_c": None, "sm_clock_mhz": None},
        {"device": "GPU-b", "utilization": 1.0, "temperature_c": 71, "sm_clock_mhz": 1100},
        {"device": "engine"},
    ]
    assert gpu_columns(parquet.arrow_table(columns.TELEMETRY, samples)) == {
        "gpu_utilization_mean": 0.75,
        "gpu_temperature_c_max": 71,
        "sm_clock_mhz_min": 1100,
        "sm_clock_mhz_max": 1400,
    }
    unknown = gpu_columns(parquet.arrow_table(columns.TELEMETRY, samples[-1:]))
    assert set(unknown.values()) == {None}


def test_samples_need_not_be_in_order() -> None:
    rows = [(2, "GPU-a", 100, 300), (0, "GPU-a", 100, 100), (1, "GPU-a", 100, 200)]
    assert power(*rows) == Power(100, 100)
