"""A simulated engine that batches continuously, step by step, as vLLM does.

In each step every running request gets one token, and waiting prompts are read in chunks up to a
budget. A step takes a fixed time, more per request and per token of context, and more per prompt
token. Requests of different lengths so slow each other down as on a real engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Engine:
    """Times in s. `chunk` is the number of prompt tokens that a step may read."""

    step_s: float = 0.030
    request_s: float = 0.0008
    context_s: float = 2e-7
    prompt_s: float = 1e-4
    chunk: int = 512
    output_len: int = 100


def closed_loop_seconds(engine: Engine, input_len: int, concurrency: int) -> float:
    """The mean seconds of equal requests of users who send the next one at once."""
    load = Load(engine, np.full(concurrency, input_len))
    load.add(np.arange(concurrency), 0.0)
    seconds: list[float] = []
    while len(seconds) < 6 * concurrency + 20:
        for user in load.step():
            seconds.append(load.now - load.arrived[user])
            load.add(np.array([user]), load.now)
    return float(np.mean(seconds[2 * concurrency :]))


def burst(engine: Engine, input_len: int, concurrency: int) -> tuple[float, float]:
    """The seconds until the last of equal requests has ended that were sent at once, and how many
    of them were in flight in the mean of this time."""
    load = Load(engine, np.full(concurrency, input_len))
    load.add(np.arange(concurrency), 0.0)
    seconds = 0.0
    while load.active.any():
        ended = load.step()
        seconds += load.now * len(ended)
    return load.now, seconds / load.now


def slo_attainment(
    engine: Engine,
    lengths: npt.NDArray[np.int64],
    shares: npt.NDArray[np.float64],
    users: int,
    think_time_s: float,
    limit_s: float,
    requests: int,
    rng: np.random.Generator,
) -> float:
    """The share of requests of thinking users that end within `limit_s`, after a warm-up."""
    load = Load(engine, rng.choice(lengths, users, p=shares))
    wakes = rng.exponential(think_time_s, users)
    met: list[bool] = []
    while len(met) < requests:
        awake = (wakes <= load.now) & ~load.active
        if not awake.any() and not load.active.any():
            load.now = float(wakes.min())
            continue
        load.input_len[awake] = rng.choice(lengths, int(awake.sum()), p=shares)
        load.add(np.flatnonzero(awake), wakes[awake])
        for user in load.step():
            met.append(load.now - load.arrived[user] <= limit_s)
            wakes[user] = load.now + rng.exponential(think_time_s)
    return float(np.mean(met[requests // 5 :]))


class Load:
    """The requests in flight, at most one per user."""

    def __init__(self, engine: Engine, input_len: npt.NDArray[np.int64]) -> None:
        users = len(input_len)
        self.engine, self.input_len, self.now = engine, input_len.copy(), 0.0
        self.active = np.zeros(users, bool)
        self.arrived = np.zeros(users)
        self.unread = np.zeros(users, np.int64)
        self.tokens = np.zeros(users, np.int64)

    def add(self, users: npt.NDArray[np.int64], arrived: npt.NDArray[np.float64] | float) -> None:
        self.active[users] = True
        self.arrived[users] = arrived
        self.unread[users] = self.input_len[users]
        self.tokens[users] = 0

    def step(self) -> npt.NDArray[np.int64]:
        """Do one step; return the users whose request ended with it."""
        engine = self.engine
        decoding = self.active & (self.unread == 0)
        waiting = np.flatnonzero(self.active & (self.unread > 0))
        waiting = waiting[np.argsort(self.arrived[waiting], kind="stable")]
        before = np.cumsum(self.unread[waiting]) - self.unread[waiting]
        read = np.clip(engine.chunk - before, 0, self.unread[waiting])
        self.unread[waiting] -= read
        context = (self.input_len + self.tokens)[decoding].sum()
        self.now += (
            engine.step_s
            + engine.request_s * int(decoding.sum())
            + engine.context_s * int(context)
            + engine.prompt_s * int(read.sum())
        )
        # The step that reads the end of a prompt also gives the first token.
        gets_token = decoding.copy()
        gets_token[waiting[self.unread[waiting] == 0]] = True
        self.tokens[gets_token] += 1
        ended = np.flatnonzero(self.active & (self.tokens >= engine.output_len))
        self.active[ended] = False
        return ended
