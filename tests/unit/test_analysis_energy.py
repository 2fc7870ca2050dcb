"""Power of GPUs from their counters and samples, calculated by hand."""

from __future__ import annotations

import math
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
        (3, "GPU-a", 100, 5800),  # 600 J in the 2 s between two steps; 200 J + 400 J in 3 s
        (0, "GPU-b", 50, 10),
        (1, "GPU-b", 60, 60),
        (2, "GPU-b", 70, 110),  # 50 J in 1 s; 120 J in 2 s
        (1, "engine", None, None),
    )
    assert both.counter_w == pytest.approx(300 + 50)
    assert both.sampled_w == pytest.approx(200 + 60)
    assert both.disagreement == pytest.approx(260 / 350 - 1)
    # The last step of GPU-a happened at any time within 2 s.
    assert (both.counted_s, both.needs_s) == (1, pytest.approx(100))
    assert both.mean_w is None


def test_a_long_cell_has_the_power_of_its_counters() -> None:
    long = power(*((number / 10, "GPU-a", 90, 10 * number) for number in range(60)))
    assert long.needs_s == pytest.approx(5)
    assert long.counted_s == pytest.approx(5.8)
    assert long.mean_w == pytest.approx(100)


@pytest.mark.parametrize("step_s", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("seconds", [2.0, 6.0, 20.0])
def test_energy_is_exact_to_2_percent_or_unknown(step_s: float, seconds: float) -> None:
    """300 W, read ten times per second. The counter shows what was used until its last step."""
    for phase in range(50):
        start = phase * 0.0137
        times = [start + number / 10 for number in range(int(seconds * 10) + 1)]
        rows = [
            (time - start, "GPU-a", 300.0, 300 * step_s * math.floor(time / step_s))
            for time in times
        ]
        found = power(*rows).mean_w
        assert (found is None) == (seconds < 5)
        if found is not None:
            assert found == pytest.approx(300, rel=0.02)


@pytest.mark.parametrize("joules", [(1, 1, 1, 1), (1, 1, 51, 51)])
def test_with_fewer_than_two_steps_of_a_counter_the_power_is_unknown(
    joules: tuple[float, ...],
) -> None:
    found = power(*((number / 10, "GPU-a", 80, counted) for number, counted in enumerate(joules)))
    assert (found.mean_w, found.sampled_w) == (None, pytest.approx(80))


def test_without_a_counter_the_sampled_power_is_used() -> None:
    sampled = power((0, "GPU-a", 100, None), (2, "GPU-a", 200, None))
    assert (sampled.counter_w, sampled.mean_w, sampled.disagreement) == (None, 150, None)


def test_the_gpus_of_all_nodes_are_added_and_an_engine_is_no_gpu() -> None:
    sampled = power(
        *((time, "GPU-a", 100, None) for time in (0, 2)),
        *((time, "GPU-of-another-node", 50, None) for time in (0, 2)),
        *((time, engine, None, None) for time in (0, 2) for engine in ("engine", "engine.1")),
    )
    assert sampled.mean_w == 100 + 50


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
    found = power(*rows)
    assert (found.mean_w, found.counter_w, found.sampled_w) == (None, None, None)


def test_a_counter_that_ran_backwards_is_not_used() -> None:
    rows = [(0, "GPU-a", 100, 500), (1, "GPU-a", 100, 3), (2, "GPU-a", 100, 900)]
    found = power(*rows)
    assert (found.mean_w, found.counter_w, found.sampled_w) == (None, None, 100)


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
    assert power(*rows) == Power(100, 100, counted_s=1, needs_s=50, has_counters=True)
