"""Which cores of a node the engine gets, and which the processes of the load client."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from servegrid.client import workers

APART_FROM = 8
"""With fewer cores, taking some away would change what the engine does."""

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@dataclass(frozen=True)
class CpuSets:
    """`engine`: the cores of the engine; `client`: those of each process of the load client."""

    engine: frozenset[int]
    client: tuple[frozenset[int], ...]


def assign_cpu_sets(
    cores: Collection[int],
    concurrency: int,
    on_gpu: bool,
    siblings: Callable[[int], frozenset[int]] | None = None,
) -> CpuSets:
    """How `cores` are shared on a node where up to `concurrency` requests are in flight.

    Beside an engine on GPUs each process of the client gets a whole physical core for itself,
    both its threads, from the end of the list; where the engine computes on the CPU, or there are
    fewer than APART_FROM cores, all have all of them. `siblings` tells the threads of a core.
    """
    everything = frozenset(cores)
    processes = workers.processes_allowed(concurrency, len(everything))
    if not on_gpu or len(everything) < APART_FROM:
        return CpuSets(everything, (everything,) * processes)
    whole = {(siblings or hardware_threads)(core) & everything for core in everything}
    client = tuple(sorted(whole, key=min)[-processes:])
    return CpuSets(everything.difference(*client), client)


def hardware_threads(core: int) -> frozenset[int]:
    """The hardware threads that share a physical core with `core`; itself where unknown."""
    found = {core}
    with contextlib.suppress(OSError, ValueError):
        for part in Path(_TOPOLOGY.format(core)).read_text().strip().split(","):
            first, _, last = part.partition("-")
            found |= {*range(int(first), int(last or first) + 1)}
    return frozenset(found)


@contextlib.contextmanager
def pinned_to(cores: Collection[int]) -> Iterator[None]:
    """Keep this thread, and all that it starts in the block, to `cores`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
