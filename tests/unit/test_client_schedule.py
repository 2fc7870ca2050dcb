"""When the requests of an open loop are due, compared with the distributions and by hand."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest

from servegrid.client import schedule
from servegrid.study.grid import Workload


def arrivals(protocol: Any, **keys: Any) -> list[float]:
    keys = {"requests": 20_000, "request_rate": 10.0} | keys
    found = schedule.arrival_times(Workload(protocol, None, 31, 10, **keys), "salt")
    assert found is not None
    return found


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in zip([0.0, *times], times, strict=False)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_gamma_intervals(burstiness: float) -> None:
    """The mean is 1 / rate; the coefficient of variation is 1 / √shape: 2, 1 and 0.5."""
    found = gaps(arrivals("gamma", burstiness=burstiness))
    mean = statistics.fmean(found)
    assert mean == pytest.approx(0.1, rel=0.05)
    assert statistics.stdev(found) / mean == pytest.approx(burstiness**-0.5, rel=0.05)


def test_a_poisson_process_stays_as_it_was() -> None:
    rng = random.Random("0/salt/arrivals")
    expected = [rng.expovariate(10.0) for _ in range(3)]
    assert gaps(arrivals("poisson", requests=3)) == pytest.approx(expected)


def test_a_ramp_is_inverted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 0 to 2 requests/s in 4 s, t² / 4 are expected up to t: one each at 2 √n."""
    monkeypatch.setattr(random.Random, "expovariate", lambda self, rate: 1.0)
    keys = {"requests": None, "request_rate": 2.0, "duration_s": 4.0}
    found = arrivals("profile", rate_profile=(0.0, 1.0), **keys)
    assert found == pytest.approx([2.0, 2 * 2**0.5, 2 * 3**0.5])
    # Down again: 4 - t is expected as much before, so the times are mirrored.
    keys["duration_s"] = 8.0
    found = arrivals("profile", rate_profile=(0.0, 1.0, 0.0), **keys)
    assert found == pytest.approx([2, 2 * 2**0.5, 2 * 3**0.5, 4, 8 - 2 * 3**0.5, 8 - 2 * 2**0.5, 6])


def test_a_day_has_its_share_in_each_hour() -> None:
    day = (1.0, 1.0, 0.0, 0.0, 2.0)
    keys = {"requests": None, "request_rate": 100.0, "duration_s": 400.0}
    found = arrivals("profile", rate_profile=day, **keys)
    # 100 s each at 1, from 1 to 0, at 0, and from 0 to 2: 10,000, 5,000, 0 and 10,000 expected.
    counts = [sum(start <= t < start + 100 for t in found) for start in (0, 100, 200, 300)]
    for count, expected in zip(counts, (10_000, 5_000, 0, 10_000), strict=True):
        assert abs(count - expected) <= 4 * expected**0.5
    assert found == sorted(found)


def test_a_profile_without_an_arrival_sends_one_request() -> None:
    keys = {"requests": None, "request_rate": 1e-9, "duration_s": 1.0}
    assert arrivals("profile", rate_profile=(0.0, 1.0), **keys) == [0.0]
