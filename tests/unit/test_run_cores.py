"""The division of cores between the engine and the client."""

import os

from servegrid.node.environment import hardware_threads
from servegrid.run.cores import CpuSets, assign_cpu_sets, pinned_to


def paired(core: int) -> frozenset[int]:
    """Eight physical cores with two threads each, numbered as Linux does: 0 and 8, 1 and 9, …"""
    return frozenset({core % 8, core % 8 + 8})


def test_with_gpus_each_client_process_gets_a_physical_core_and_the_engine_the_rest() -> None:
    cpu_sets = assign_cpu_sets(range(16), concurrency=1024, on_gpu=True, siblings=paired)
    assert cpu_sets.client == (frozenset({6, 14}), frozenset({7, 15}))
    assert cpu_sets.engine == frozenset({0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13})


def test_cores_outside_the_job_are_not_assigned() -> None:
    cpu_sets = assign_cpu_sets(
        [0, 1, 2, 3, 4, 5, 6, 7], concurrency=8, on_gpu=True, siblings=paired
    )
    assert cpu_sets == CpuSets(frozenset(range(7)), (frozenset({7}),))


def test_engine_and_client_share_all_cores_on_a_cpu_engine_or_a_small_node() -> None:
    all_cores = frozenset(range(16))
    assert assign_cpu_sets(all_cores, 2048, on_gpu=False) == CpuSets(all_cores, (all_cores,) * 4)
    few = frozenset(range(7))
    assert assign_cpu_sets(few, 2048, on_gpu=True) == CpuSets(few, (few,))


def test_the_hardware_threads_of_a_core_come_from_the_system() -> None:
    core = min(os.sched_getaffinity(0))
    assert core in hardware_threads(core)
    assert hardware_threads(10**6) == {10**6}


def test_pinning_ends_with_the_block() -> None:
    before = os.sched_getaffinity(0)
    with pinned_to({min(before)}):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
