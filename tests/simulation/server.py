"""A simulated server of known capacity, which knows nothing of the code under test.

All requests in flight share the server. With n of them, each request proceeds at 1 / T(n) requests
per second, so the server completes n / T(n) requests/s. More than `max_num_seqs` wait, first come,
first served. That is what continuous batching does to the number in flight.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from servegrid.records import columns, parquet

S = 1_000_000_000


@dataclass(frozen=True)
class Server:
    """T(n) = base_s + slope_s * n, up to `max_num_seqs` requests at once."""

    base_s: float = 1.0
    slope_s: float = 0.05
    max_num_seqs: int = 64

    def seconds(self, in_flight: int) -> float:
        """The time of a request while this number of requests is in flight."""
        return self.base_s + self.slope_s * in_flight

    @property
    def capacity(self) -> float:
        """The highest request rate that it can complete."""
        return self.max_num_seqs / self.seconds(self.max_num_seqs)


@dataclass(frozen=True)
class Served:
    """When a request arrived and ended, in s."""

    user: int
    arrived: float
    ended: float


def serve(
    server: Server,
    arrivals: Iterable[tuple[float, int]],
    after: Callable[[float, int], float | None] = lambda _ended, _user: None,
    sizes: Callable[[], float] = lambda: 1.0,
) -> Iterator[Served]:
    """Serve arrivals, pairs of a time and a user; yield the requests in the order of their ends.

    `after` gives the time of the user's next request, or None. `sizes` draws a request's size: 1
    is the time T(n).
    """
    waiting = list(arrivals)
    heapq.heapify(waiting)
    queue: list[tuple[float, int]] = []
    running: list[tuple[float, float, int]] = []  # service at its end, arrival, user
    now, service = 0.0, 0.0
    while waiting or running:
        share = server.seconds(len(running))
        ends = now + (running[0][0] - service) * share if running else np.inf
        arrives = waiting[0][0] if waiting else np.inf
        if arrives < ends:
            service += (arrives - now) / share if running else 0.0
            now, user = heapq.heappop(waiting)
            queue.append((now, user))
        else:
            service, now = running[0][0], ends
            _, arrived, user = heapq.heappop(running)
            yield Served(user, arrived, now)
            again = after(now, user)
            if again is not None:
                heapq.heappush(waiting, (again, user))
        while queue and len(running) < server.max_num_seqs:
            arrived, user = queue.pop(0)
            heapq.heappush(running, (service + sizes(), arrived, user))


def poisson_load(
    server: Server,
    utilisation: float,
    requests: int,
    rng: np.random.Generator,
    spread: bool = True,
    burstiness: float | None = None,
) -> pa.Table:
    """The requests of an open loop at a share of the server's capacity, as records have them.

    With `burstiness`, the intervals have the gamma distribution of this shape.
    """
    mean = 1 / (utilisation * server.capacity)
    if burstiness is None:
        gaps = rng.exponential(mean, requests)
    else:
        gaps = rng.gamma(burstiness, mean / burstiness, requests)
    sizes = (lambda: float(rng.exponential())) if spread else (lambda: 1.0)
    arrivals = [(float(time), user) for user, time in enumerate(np.cumsum(gaps))]
    return request_table(serve(server, arrivals, sizes=sizes))


def closed_loop(
    server: Server, users: int, requests: int, think_time_s: float, rng: np.random.Generator
) -> pa.Table:
    """The requests of users who think (exponential) between a response and the next request."""
    left = requests - users

    def after(ended: float, _user: int) -> float | None:
        nonlocal left
        left -= 1
        if left < 0:
            return None
        return ended + (float(rng.exponential(think_time_s)) if think_time_s else 0.0)

    start = ((float(rng.exponential(think_time_s or 1e-3)), user) for user in range(users))
    return request_table(serve(server, start, after))


def request_table(served: Iterable[Served]) -> pa.Table:
    """Rows of `columns.REQUESTS`: one token at the first half of the time, one at the end."""
    rows = [
        {
            "request_id": f"{number:032x}",
            "user": each.user,
            "wave": 0,
            "scheduled_ns": round(each.arrived * S),
            "sent_ns": round(each.arrived * S),
            "first_token_ns": round((each.arrived + each.ended) / 2 * S),
            "token_ns": [round((each.arrived + each.ended) / 2 * S), round(each.ended * S)],
            "chunk_tokens": [1, 1],
            "chunk_tokens_estimated": False,
            "done_ns": round(each.ended * S),
            "status": 200,
            "prompt_tokens": 31,
            "completion_tokens": 2,
            "requested_tokens": 2,
        }
        for number, each in enumerate(sorted(served, key=lambda each: each.arrived))
    ]
    return parquet.arrow_table(columns.REQUESTS, rows)
