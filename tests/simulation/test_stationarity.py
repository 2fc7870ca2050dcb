"""Open loops on a server of known capacity: stable loads are accepted, overload is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servegrid.analysis.stationarity import find_window
from servegrid.study.grid import Protocol, Workload
from simulation.server import Server, poisson_load

REQUESTS, RUNS = 2000, 60
SERVERS = {
    "batching": Server(base_s=1.0, slope_s=0.05, max_num_seqs=64),
    "one at a time": Server(base_s=0.0, slope_s=1.0, max_num_seqs=1),
}


def accepted(
    server: Server, utilisation: float, requests: int, runs: int, burstiness: float | None = None
) -> float:
    """The share of simulated runs that have a stationary part."""
    rate = utilisation * server.capacity
    protocol: Protocol = "poisson" if burstiness is None else "gamma"
    keys: dict[str, Any] = {"request_rate": rate, "burstiness": burstiness}
    workload = Workload(protocol, None, 31, 2, requests, **keys)
    found = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        table = poisson_load(server, utilisation, requests, rng, burstiness=burstiness)
        found += not isinstance(find_window(table, workload), str)
    return found / runs


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize(
    ("utilisation", "low", "high"),
    [(0.6, 0.95, 1.0), (0.9, 0.85, 1.0), (1.05, 0.0, 0.7), (1.2, 0.0, 0.01), (2.0, 0.0, 0.01)],
)
def test_stable_loads_are_accepted_and_overload_is_not(
    name: str, utilisation: float, low: float, high: float
) -> None:
    share = accepted(SERVERS[name], utilisation, REQUESTS, RUNS)
    print(f"{name}, utilisation {utilisation}: accepted {share:.0%}")
    assert low <= share <= high


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize(
    ("burstiness", "utilisation", "low", "high"),
    [
        (0.25, 0.6, 0.95, 1.0),
        (0.25, 0.9, 0.8, 1.0),
        (0.25, 1.2, 0.0, 0.06),
        (4.0, 0.9, 0.95, 1.0),
        (4.0, 1.2, 0.0, 0.01),
    ],
)
def test_bursty_loads_are_judged_by_the_same_rule(
    name: str, burstiness: float, utilisation: float, low: float, high: float
) -> None:
    share = accepted(SERVERS[name], utilisation, REQUESTS, RUNS, burstiness)
    print(f"{name}, burstiness {burstiness}, utilisation {utilisation}: accepted {share:.0%}")
    assert low <= share <= high


@pytest.mark.slow
def test_a_short_overload_is_not_accepted() -> None:
    """Of 500 requests at twice the capacity, up to 97% were accepted by the latencies alone."""
    for server in SERVERS.values():
        assert accepted(server, 2.0, 500, RUNS) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("slope_s", "refused"), [(0.05, 0.30), (0.01, 0.62)])
def test_a_server_of_256_requests_at_once_often_needs_more_than_2000(
    slope_s: float, refused: float
) -> None:
    """The values of docs/statistics.md: a stable load can be refused, too."""
    server = Server(base_s=1.0, slope_s=slope_s, max_num_seqs=256)
    share = 1 - accepted(server, 0.9, REQUESTS, RUNS)
    print(f"256 at once, slope {slope_s}: refused {share:.0%}")
    assert share == pytest.approx(refused, abs=0.02)
    assert accepted(server, 0.9, 10 * REQUESTS, 5) == 1.0
