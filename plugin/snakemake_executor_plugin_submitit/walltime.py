"""How much time an allocation requests, from what its jobs are expected to take. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snakemake_executor_plugin_submitit.submission import Parameters
from snakemake_executor_plugin_submitit.tracking import AllocationSpec


@dataclass(frozen=True)
class Span:
    """What is submitted: the first `jobs` of the jobs, with these parameters.

    `usable_s` and `is_shortened` are those of `liveness.Submission`.
    """

    jobs: int
    parameters: Parameters
    usable_s: float | None = None
    is_shortened: bool = False


def choose_span(spec: AllocationSpec, expected: Sequence[float | None]) -> Span:
    """The time that an allocation of these jobs requests, and how many of them fit into it.

    `expected` are the seconds of each job, in the order in which they run. If those of one job are
    not known, the allocation gets all jobs and the whole time limit. Otherwise it requests the
    time of all jobs, also of those that come later. If that is more than the time limit allows, it
    gets as many jobs as fit, at least one; another allocation gets the rest.
    """
    total, fitting = spec.start_s, 0
    usable_s = spec.parameters.time_limit_s - spec.parameters.reserve_s
    for seconds in expected:
        if seconds is None:
            return Span(len(expected), spec.parameters)
        total += seconds
        fitting += total <= usable_s
    if fitting < len(expected):
        return Span(max(1, fitting), spec.parameters, usable_s)
    if spec.later_s is None:
        return Span(len(expected), spec.parameters, usable_s)
    parameters = spec.parameters.lasting(total + spec.later_s)
    usable_s -= spec.parameters.time_limit_s - parameters.time_limit_s
    return Span(len(expected), parameters, usable_s, parameters is not spec.parameters)
