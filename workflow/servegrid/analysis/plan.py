"""What a study will take before anything is submitted: memory, cells, times, GPU-hours. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from servegrid.analysis.efficiency import cell_bound, find_hardware
from servegrid.analysis.feasibility import (
    CANNOT,
    QUEUES,
    UNKNOWN,
    Outlook,
    cell_outlook,
    deployment_problem,
)
from servegrid.analysis.frontier import (
    Loads,
    expected_cells,
    meeting_chances,
    response_limit,
)
from servegrid.analysis.prediction import (
    Bursts,
    Floats,
    Points,
    Table,
    deployment_traits,
    find_traits,
)
from servegrid.analysis.predictor import (
    Calibration,
    Expectation,
    Predictor,
    make_predictor,
)
from servegrid.analysis.slo import DEFAULT_SLO, Slo
from servegrid.errors import ConfigError
from servegrid.reference.checkpoint import ModelFacts
from servegrid.reference.memory import Placement, find_device, place
from servegrid.reference.roofline import ModelShape
from servegrid.study.deployment import EMULATED, EXTERNAL, VLLM, Deployment
from servegrid.study.grid import Study, Trial, Workload

if TYPE_CHECKING:  # its scipy takes half a second of a dry run
    from servegrid.analysis.capacity import HardwarePrices

START_S, LOAD_BYTES_PER_S = 60.0, 1e9
"""An engine's start: imports, compilation and warm-up, and the speed at which weights are read."""
START_FACTOR = 2.0
"""The start takes between 1 / START_FACTOR and START_FACTOR times that."""
CELL_OVERHEAD_S = 0.2
"""Between two cells: prompts are made, and records are written."""
POWER_SHARE = (0.4, 0.7, 1.0)
"""The mean power of a GPU as a share of its limit: lower end, expected, upper end."""
TAUGHT_FIRST = 8
"""So many cells are named as those that teach most."""
_HOUR_S, _YEAR_H, _KWH_J = 3600.0, 8766.0, 3.6e6


@dataclass(frozen=True)
class Range:
    """An expected value with the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        """The sum of the ends: the errors of one deployment are correlated."""
        return Range(self.value + other.value, self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(self.value * factor, self.low * factor, self.high * factor)


NOTHING = Range(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Site:
    """Where the study runs: cores of a node without GPUs, and what a profile says.

    `gpus_of_node` has the kinds whose nodes are taken whole. `runtime_s` limits an allocation.
    `nodes` has the number of nodes of each deployment by its name; it is empty without a profile.
    `problems` says, by name, why a deployment cannot run on its nodes.
    """

    cores: int = 1
    gpus_of_node: Mapping[str, int] = field(default_factory=dict)
    runtime_s: float | None = None
    nodes: Mapping[str, int] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CellPlan:
    """One cell. Seconds are per 100 output tokens of a response; None if they are not known.

    `missing` of its `trials` have no record yet. `run_s` is the time of one trial, with warm-up.
    `measured_s` is the median of the trials that were served.
    """

    workload: Workload
    trials: int
    missing: int
    outlook: Outlook
    bound_s: float | None = None
    expected_s: Range | None = None
    run_s: Range | None = None
    measured_s: float | None = None


@dataclass(frozen=True)
class AllocationPlan:
    """The allocation of one bring-up: its missing trials, and its time. None if unknown.

    Of a search, only the trials that it is expected to take.
    """

    bring_up: int
    trials: int
    seconds: Range | None
    gpu_hours: Range | None

    def parts(self, runtime_s: float | None) -> int:
        """The allocations that it takes if each may last `runtime_s`, by the interval's end."""
        if runtime_s is None or self.seconds is None:
            return 1
        return max(1, math.ceil(self.seconds.high / runtime_s))


@dataclass(frozen=True)
class DeploymentPlan:
    """One deployment. `problem` says why it cannot start, `unknown` why nothing is predicted.

    `labels` say what the prediction has never seen, `teach` has the cells to measure first.
    `search` has the cells that a search is expected to take; None if the whole grid runs.
    """

    deployment: Deployment
    source: str
    cells: tuple[CellPlan, ...]
    problem: str | None = None
    unknown: str | None = None
    placement: Placement | None = None
    labels: tuple[str, ...] = ()
    observed: int = 0
    allocations: tuple[AllocationPlan, ...] = ()
    teach: tuple[str, ...] = ()
    search: frozenset[str] | None = None
    power_w: float | None = None

    @property
    def kv_tokens(self) -> float | None:
        """The tokens that the KV cache holds, in sequences of max_model_len; None if unknown."""
        if self.placement is None or math.isinf(self.placement.kv_pool):
            return None
        return self.placement.capacity_tokens(self.deployment.max_model_len)

    @property
    def gpu_hours(self) -> Range | None:
        """The GPU-hours of all allocations; None if those of one are unknown."""
        return _total(allocation.gpu_hours for allocation in self.allocations)

    @property
    def energy_kwh(self) -> Range | None:
        """The energy of the GPUs; None if their power or time is unknown."""
        hours = self.gpu_hours
        if hours is None or self.power_w is None:
            return None
        ends = zip(POWER_SHARE, (hours.low, hours.value, hours.high), strict=True)
        low, value, high = (share * each * self.power_w / 1000 for share, each in ends)
        return Range(value, low, high)

    def cost(self, prices: HardwarePrices) -> Range | None:
        """Electricity, and the GPUs' price spread over their years; None if a price is unknown."""
        hours, energy = self.gpu_hours, self.energy_kwh
        price = prices.prices.get(self.deployment.gpu)
        if hours is None or energy is None or price is None:
            return None
        if prices.years_in_use is None or prices.electricity_per_kwh is None:
            return None
        return energy * prices.electricity_per_kwh + hours * (price / prices.years_in_use / _YEAR_H)


@dataclass(frozen=True)
class StudyPlan:
    """The plan of a study. `measured` trials will not run."""

    name: str
    deployments: tuple[DeploymentPlan, ...]
    trials: int
    measured: int
    site: Site


def plan_study(
    study: Study,
    facts: Mapping[str, ModelFacts],
    calibration: Calibration,
    site: Site = Site(),
    measured: frozenset[str] = frozenset(),
    earlier: Mapping[str, Bursts] | None = None,
    slo: Slo = DEFAULT_SLO,
) -> StudyPlan:
    """The plan of a study.

    `facts` has each deployment's model by the deployment's name. `measured` has the ids of the
    trials that are recorded. `earlier` are measured bursts by deployment. Searches are for `slo`.
    Raises ConfigError if `engine_args` contradict `gpu_count` or have a value that is no number.
    """
    by_deployment: dict[str, list[Trial]] = {}
    for trial in study.all_trials:
        by_deployment.setdefault(trial.deployment.name, []).append(trial)
    plans = tuple(
        _plan_deployment(
            by_deployment[deployment.name],
            facts[deployment.name],
            calibration,
            site,
            measured,
            (earlier or {}).get(deployment.name),
            slo if deployment.name in study.searched else None,
        )
        for deployment in study.deployments
    )
    done = sum(trial.id in measured for trial in study.all_trials)
    return StudyPlan(study.name, plans, len(study.all_trials), done, site)


def own_tables(
    study: Study, facts: Mapping[str, ModelFacts], site: Site, earlier: Mapping[str, Bursts]
) -> list[Table]:
    """The user's measured bursts as tables for `predictor.refit`, of vLLM on GPUs."""
    found = []
    for deployment in study.deployments:
        bursts, shape = earlier.get(deployment.name), facts[deployment.name].shape
        if bursts is None or shape is None or deployment.engine != VLLM or not deployment.gpu_count:
            continue
        try:
            device = find_device(deployment.gpu)
        except ConfigError:
            continue
        placement = place(deployment, shape, device)
        traits = deployment_traits(deployment, placement, device, site.cores)
        found.append(Table(deployment.name, traits, bursts.points, bursts.seconds))
    return found


def _plan_deployment(
    trials: Sequence[Trial],
    facts: ModelFacts,
    calibration: Calibration,
    site: Site,
    measured: frozenset[str],
    bursts: Bursts | None,
    slo: Slo | None,
) -> DeploymentPlan:
    """The plan of one deployment. With `slo`, its frontier is searched."""
    deployment = trials[0].deployment
    missing = [trial for trial in trials if trial.id not in measured]
    if problem := site.problems.get(deployment.name):
        cells = _plain_cells(trials, missing, Outlook(CANNOT, problem))
        return DeploymentPlan(deployment, facts.source, cells, problem=problem)
    try:
        device = find_device(deployment.gpu)
    except ConfigError as error:
        return _unknown_plan(deployment, facts, trials, missing, str(error))
    if facts.shape is None:
        return _unknown_plan(deployment, facts, trials, missing, facts.unknown or "not known")
    placement = place(deployment, facts.shape, device)
    problem = deployment_problem(deployment, placement, device, facts.config)
    if problem:
        outlook = Outlook(CANNOT, problem)
        return DeploymentPlan(
            deployment,
            facts.source,
            _plain_cells(trials, missing, outlook),
            problem=problem,
            placement=placement,
        )
    traits = deployment_traits(deployment, placement, device, site.cores)
    predictor = make_predictor(traits, deployment.engine, calibration, bursts)
    cells = _predict_cells(trials, missing, deployment, placement, predictor)
    workloads = [cell.workload for cell in cells]
    search = None if slo is None else searched_cells(deployment, workloads, predictor, slo)
    allocations = _allocations(deployment, facts.shape, _submitted(missing), cells, site, search)
    return DeploymentPlan(
        deployment=deployment,
        source=facts.source,
        placement=placement,
        labels=tuple(predictor.unseen.values()),
        observed=0 if predictor.observed is None else len(predictor.observed.points),
        cells=cells,
        allocations=allocations,
        teach=_teach(cells, predictor, time_scale(deployment)),
        search=search,
        power_w=device.power_w,
    )


def _teach(cells: Sequence[CellPlan], predictor: Predictor, scale: float) -> tuple[str, ...]:
    """The names of the cells to measure first, among those that are missing and can work."""
    workloads = [
        cell.workload
        for cell in cells
        if cell.missing and cell.outlook.status not in (CANNOT, UNKNOWN)
    ]
    if not workloads:
        return ()
    chosen = predictor.teach(expected_points(workloads, predictor, scale), TAUGHT_FIRST)
    return tuple(workloads[index].cell for index in chosen)


def searched_cells(
    deployment: Deployment, workloads: Sequence[Workload], predictor: Predictor, slo: Slo
) -> frozenset[str]:
    """The names of the cells that a search of these workloads is expected to take.

    Each cell ends as is most probable. An open loop misses the SLO above the highest rate that the
    deployment completes; its search does not use predictions.
    """
    groups: dict[tuple[str, int], list[Workload]] = {}
    for workload in workloads:
        groups.setdefault((workload.protocol, workload.output_len), []).append(workload)
    found: set[str] = set()
    for group in groups.values():
        loads = Loads.of([each.intensity for each in group], [each.input_len for each in group])
        is_open = group[0].is_open_loop
        if is_open:
            highest = [open_loop_load(each, predictor)[1] for each in group]
            chances = (loads.intensity * time_scale(deployment) <= highest).astype(float)
        else:
            points = expected_points(group, predictor, time_scale(deployment))
            chances = meeting_chances(predictor, points, response_limit(points, slo))
        found |= {group[at].cell for at in expected_cells(loads, chances, not is_open)}
    return frozenset(found)


def is_taken(trial: Trial, search: frozenset[str] | None) -> bool:
    """Whether a trial is expected to be measured, if `search` are `searched_cells` (None: all).

    Only cells near a limit of the SLO are repeated, so the first trials count.
    """
    if search is None or trial.drift_check:
        return True
    return trial.number == 1 and trial.workload.cell in search


def _unknown_plan(
    deployment: Deployment,
    facts: ModelFacts,
    trials: Sequence[Trial],
    missing: Sequence[Trial],
    why: str,
) -> DeploymentPlan:
    unknown = [
        AllocationPlan(number, len(group), None, None)
        for number, group in _by_bring_up(_submitted(missing)).items()
    ]
    return DeploymentPlan(
        deployment,
        facts.source,
        _plain_cells(trials, missing, Outlook(UNKNOWN, why)),
        unknown=why,
        allocations=tuple(unknown),
    )


def _cells(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """The trials by cell, without drift checks, which repeat one of them."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if not trial.drift_check:
            groups.setdefault(trial.cell, []).append(trial)
    return groups


def _submitted(missing: Sequence[Trial]) -> list[Trial]:
    """The trials that need an allocation; the others are known to be unsupported."""
    return [trial for trial in missing if not trial.unsupported]


def _plain_cells(
    trials: Sequence[Trial], missing: Sequence[Trial], outlook: Outlook
) -> tuple[CellPlan, ...]:
    open_trials = {id(trial) for trial in missing}
    return tuple(
        CellPlan(
            group[0].workload,
            len(group),
            sum(id(trial) in open_trials for trial in group),
            outlook,
        )
        for group in _cells(trials).values()
    )


def _by_bring_up(trials: Iterable[Trial]) -> dict[int, list[Trial]]:
    groups: dict[int, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.bring_up, []).append(trial)
    return groups


def expected_points(workloads: Sequence[Workload], predictor: Predictor, scale: float) -> Points:
    """The cells as bursts. An open loop has the requests in flight that its rate leads to, users
    who think those that their think time leaves. `scale` is that of an emulated engine's times."""
    return Points.of(
        [_in_flight(workload, predictor, scale) for workload in workloads],
        [workload.mean_input_len for workload in workloads],
        [workload.output_len for workload in workloads],
    )


def _in_flight(workload: Workload, predictor: Predictor, scale: float) -> float:
    if workload.concurrency is None:
        return open_loop_load(workload, predictor, scale)[0]
    if not workload.think_time_s:
        return workload.concurrency
    return _thinking_load(workload.concurrency, workload, predictor, scale)


def open_loop_load(
    workload: Workload, predictor: Predictor, scale: float = 1.0
) -> tuple[float, float]:
    """The expected requests in flight of an open loop, and the highest rate in requests/s.

    With n requests in flight the deployment completes n / T(n) of them per second. Above the
    highest rate, as many are in flight as it may run. The rate of the workload is that of an
    emulated engine whose times have the factor `scale`; the highest one is in real time.
    """
    levels, rates = _completed(workload, predictor)
    wanted = (workload.rate_fraction or 0.0) * float(rates[-1])
    if workload.request_rate is not None:
        wanted = workload.request_rate * scale
    if wanted >= rates[-1]:
        return float(levels[-1]), float(rates[-1])
    if wanted <= rates[0]:
        return 1.0, float(rates[-1])
    return float(np.interp(wanted, rates, levels)), float(rates[-1])


def _thinking_load(users: int, workload: Workload, predictor: Predictor, scale: float) -> float:
    """The expected requests in flight of users who think, at least 1.

    With n in flight, n / T(n) responses per second are complete, and by Little's law as many users
    think as that rate times their think time. The others are in flight.
    """
    levels, rates = _completed(workload, predictor)
    think_time_s = workload.think_time_s / scale
    of_levels = levels + think_time_s * rates
    if users > of_levels[-1]:
        return float(users - think_time_s * rates[-1])
    return float(np.interp(users, of_levels, levels))


def _completed(workload: Workload, predictor: Predictor) -> tuple[Floats, Floats]:
    """Numbers of requests in flight from 1 on, and the requests/s that they complete."""
    top = predictor.traits.max_running * predictor.traits.copies
    levels = np.unique(np.geomspace(1, max(2, top), 24).round())
    points = Points.of(levels, workload.input_len, workload.output_len)
    rates: Floats = np.maximum.accumulate(levels / predictor.predict(points).seconds)
    return levels, rates


def time_scale(deployment: Deployment) -> float:
    """The factor by which an emulated engine changes all times."""
    if deployment.engine != EMULATED:
        return 1.0
    factors = [deployment.engine_args.get(key, 1.0) for key in ("time_scale", "slowdown")]
    return math.prod(float(each) for each in factors if isinstance(each, int | float))


def _predict_cells(
    trials: Sequence[Trial],
    missing: Sequence[Trial],
    deployment: Deployment,
    placement: Placement,
    predictor: Predictor,
) -> tuple[CellPlan, ...]:
    open_trials = {id(trial) for trial in missing}
    groups = list(_cells(trials).values())
    workloads = [group[0].workload for group in groups]
    scale = time_scale(deployment)
    points = expected_points(workloads, predictor, scale)
    expected = predictor.predict(points)
    hardware = find_hardware(deployment)
    cells = []
    for index, (group, workload) in enumerate(zip(groups, workloads, strict=True)):
        in_flight = float(points.concurrency[index])
        response = _at(expected, index) * scale
        bound = cell_bound(
            deployment,
            placement.shape,
            hardware,
            workload,
            # Users who think need not be in flight together, nor an open loop's requests.
            in_flight if workload.concurrency and not workload.think_time_s else 1.0,
        )
        bound = None if bound is None else bound * scale
        per_100 = response * (100 / workload.output_len)
        rated = _with_rate(workload, predictor, scale)
        # All users can send at one time, and a cell with more users than may run is not valid.
        at_once = float(workload.concurrency or in_flight)
        outlook = _outlook(deployment, placement, rated, at_once, bound, predictor)
        cells.append(
            CellPlan(
                workload=workload,
                trials=len(group),
                missing=sum(id(trial) in open_trials for trial in group),
                outlook=outlook,
                bound_s=bound,
                expected_s=per_100,
                run_s=run_time(rated, response),
            )
        )
    return tuple(cells)


def _with_rate(workload: Workload, predictor: Predictor, scale: float) -> Workload:
    """A sweep's workload with the rate that is expected: its fraction of the highest one."""
    if workload.rate_fraction is None:
        return workload
    highest = open_loop_load(workload, predictor)[1] / scale
    return replace(workload, request_rate=workload.rate_fraction * highest)


def _at(expected: Expectation, index: int) -> Range:
    arrays: tuple[Floats, ...] = (expected.seconds, expected.low, expected.high)
    return Range(*(float(each[index]) for each in arrays))


def _outlook(
    deployment: Deployment,
    placement: Placement,
    workload: Workload,
    in_flight: float,
    bound_s: float | None,
    predictor: Predictor,
) -> Outlook:
    if bound_s is not None and workload.protocol == "burst":
        least = bound_s * workload.output_len / 100
        if least > workload.timeout_s:
            return Outlook(
                CANNOT,
                f"no engine takes less than {least:.0f} s, and timeout_s is "
                f"{workload.timeout_s:g}. Raise it.",
            )
    if workload.request_rate is not None:
        highest = open_loop_load(workload, predictor)[1] / time_scale(deployment)
        if workload.request_rate > highest:
            return Outlook(
                QUEUES,
                f"{_rounded(workload.request_rate, 3)} requests/s arrive, and about "
                f"{_rounded(highest, 2)} are completed",
            )
    return cell_outlook(deployment, placement, workload, in_flight)


def _rounded(value: float, digits: int) -> str:
    """
    >>> _rounded(5.33169, 3), _rounded(1234.0, 2)
    ('5.33', '1200')
    """
    return f"{float(f'{value:.{digits}g}'):g}"


def run_time(workload: Workload, response_s: Range) -> Range:
    """The time of one trial with its warm-up, if a burst or a response takes `response_s`.

    A burst takes its waves. A closed loop takes its requests per user, with their think times. An
    open loop takes its requests at their rate, and the last response.
    """
    warmup = response_s * workload.warmup_waves
    overhead = Range(CELL_OVERHEAD_S, CELL_OVERHEAD_S, CELL_OVERHEAD_S)
    if workload.request_rate is not None:
        sending = workload.duration_s or (workload.requests or 0) / workload.request_rate
        return Range(sending, sending, sending) + response_s + warmup + overhead
    users = workload.concurrency or 1
    if workload.duration_s is not None:
        return Range(*[workload.duration_s] * 3) + response_s + warmup + overhead
    each = math.ceil((workload.requests or users) / users)
    think = workload.think_time_s * each
    return response_s * each + Range(think, think, think) + warmup + overhead


def start_time(deployment: Deployment, shape: ModelShape) -> Range:
    """The time until the engine serves. An external one runs already."""
    if deployment.engine == EXTERNAL:
        return NOTHING
    if deployment.engine == EMULATED:
        seconds = float(deployment.engine_args.get("startup_s", 0.0))
        return Range(seconds, seconds, seconds)
    seconds = START_S + shape.weight_bytes / LOAD_BYTES_PER_S
    return Range(seconds, seconds / START_FACTOR, seconds * START_FACTOR)


def _allocations(
    deployment: Deployment,
    shape: ModelShape,
    missing: Sequence[Trial],
    cells: Sequence[CellPlan],
    site: Site,
    search: frozenset[str] | None,
) -> tuple[AllocationPlan, ...]:
    times = {cell.workload.cell: cell.run_s or NOTHING for cell in cells}
    gpus = charged_gpus(deployment, site)
    found = []
    for number, group in sorted(_by_bring_up(missing).items()):
        taken = [trial for trial in group if is_taken(trial, search)]
        seconds = start_time(deployment, shape)
        for trial in taken:
            seconds = seconds + times[trial.workload.cell]
        found.append(AllocationPlan(number, len(taken), seconds, seconds * (gpus / _HOUR_S)))
    return tuple(found)


def charged_gpus(deployment: Deployment, site: Site) -> int:
    """The GPUs that an allocation takes: all of a node if nodes are taken whole."""
    whole = site.gpus_of_node.get(deployment.node_kind, 0)
    if not whole or not deployment.node_gpus:
        return deployment.node_gpus
    return math.ceil(deployment.node_gpus / whole) * whole


def _total(ranges: Iterable[Range | None]) -> Range | None:
    total = NOTHING
    for each in ranges:
        if each is None:
            return None
        total = total + each
    return total


@dataclass(frozen=True)
class ExpectedTimes:
    """The times of one deployment: until its engine serves, and of one trial of each cell.

    `unseen` has what no table has, by keys of `predictor.UNSEEN`. `observed` of its own cells
    calibrate the times. `search` has the cells that a search is expected to take; None if the whole
    grid runs.
    """

    start: Range
    cells: Mapping[str, Range]
    unseen: Mapping[str, str]
    observed: int
    search: frozenset[str] | None = None


def expected_times(
    deployment: Deployment,
    workloads: Sequence[Workload],
    facts: ModelFacts,
    calibration: Calibration,
    site: Site,
    bursts: Bursts | None = None,
    slo: Slo | None = None,
) -> ExpectedTimes | None:
    """The times alone, without a plan: in milliseconds. None if the model or the GPU is unknown.

    With `slo`, the deployment's frontier is searched. Raises ConfigError as `plan_study` does.
    """
    traits = find_traits(deployment, facts.shape, site.cores)
    if traits is None or facts.shape is None:
        return None
    predictor = make_predictor(traits, deployment.engine, calibration, bursts)
    scale = time_scale(deployment)
    expected = predictor.predict(expected_points(workloads, predictor, scale))
    return ExpectedTimes(
        start=start_time(deployment, facts.shape),
        cells={
            workload.cell: run_time(workload, _at(expected, index) * scale)
            for index, workload in enumerate(workloads)
        },
        unseen=predictor.unseen,
        observed=0 if predictor.observed is None else len(predictor.observed.points),
        search=None if slo is None else searched_cells(deployment, workloads, predictor, slo),
    )
