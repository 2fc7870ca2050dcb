"""Divides the cores of a node between the engine and the processes of the load client."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from servegrid.client import workers
from servegrid.node.environment import hardware_threads

MIN_CORES_TO_SPLIT = 8
"""On a node with fewer cores, the engine would be slower without those of the client."""


@dataclass(frozen=True)
class CpuSets:
    """The cores of the engine, and those of each process of the load client."""

    engine: frozenset[int]
    client: tuple[frozenset[int], ...]


def assign_cpu_sets(
    cores: Collection[int],
    concurrency: int,
    on_gpu: bool,
    siblings: Callable[[int], frozenset[int]] | None = None,
) -> CpuSets:
    """Divide `cores` for a client with up to `concurrency` requests in flight.

    If the engine runs on GPUs, each process of the client gets one physical core (all its hardware
    threads), from the end of the list. If the engine computes on the CPU, or there are fewer than
    MIN_CORES_TO_SPLIT cores, engine and client share all cores. `siblings` returns the hardware
    threads of a core.
    """
    all_cores = frozenset(cores)
    processes = workers.processes_allowed(concurrency, len(all_cores))
    if not on_gpu or len(all_cores) < MIN_CORES_TO_SPLIT:
        return CpuSets(all_cores, (all_cores,) * processes)
    physical = {(siblings or hardware_threads)(core) & all_cores for core in all_cores}
    client = tuple(sorted(physical, key=min)[-processes:])
    return CpuSets(all_cores.difference(*client), client)


@contextlib.contextmanager
def pinned_to(cores: Collection[int]) -> Iterator[None]:
    """Pin this thread, and all processes and threads started in the block, to `cores`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
