"""How cores are shared between the engine and the client."""

import os

from servegrid.run.cores import CpuSets, assign_cpu_sets, hardware_threads, pinned_to


def paired(core: int) -> frozenset[int]:
    """Eight physical cores with two threads each, numbered as Linux does: 0 and 8, 1 and 9, …"""
    return frozenset({core % 8, core % 8 + 8})


def test_beside_gpus_each_process_has_a_whole_core_and_the_engine_the_rest() -> None:
    told = assign_cpu_sets(range(16), concurrency=1024, on_gpu=True, siblings=paired)
    assert told.client == (frozenset({6, 14}), frozenset({7, 15}))
    assert told.engine == frozenset({0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13})


def test_cores_that_the_job_has_not_are_nobodys() -> None:
    told = assign_cpu_sets([0, 1, 2, 3, 4, 5, 6, 7], concurrency=8, on_gpu=True, siblings=paired)
    assert told == CpuSets(frozenset(range(7)), (frozenset({7}),))


def test_an_engine_on_the_cpu_and_a_small_node_keep_all_their_cores() -> None:
    everything = frozenset(range(16))
    assert assign_cpu_sets(everything, 2048, on_gpu=False) == CpuSets(everything, (everything,) * 4)
    few = frozenset(range(7))
    assert assign_cpu_sets(few, 2048, on_gpu=True) == CpuSets(few, (few,))


def test_the_threads_of_a_core_are_told_by_the_system() -> None:
    core = min(os.sched_getaffinity(0))
    assert core in hardware_threads(core)
    assert hardware_threads(10**6) == {10**6}


def test_keeping_to_cores_ends_with_the_block() -> None:
    before = os.sched_getaffinity(0)
    with pinned_to({min(before)}):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
