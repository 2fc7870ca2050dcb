"""The capacity plan: how many users each deployment serves, on how many GPUs, at what cost. Pure.

The page computes the same in planner.js when the reader changes an assumption. A test compares
the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid.analysis import tables
from servegrid.analysis.latency_curves import (
    LatencyCurves,
    Rows,
    allowed_in_flight,
    latency_curves,
    weighted_mean,
)
from servegrid.analysis.queueing import (
    MAX_USERS,
    ROUNDING,
    mean_in_flight,
    open_mean_in_flight,
    rate_carried,
    requests_per_s,
    split_dispersion,
    users_carried,
)
from servegrid.analysis.slo import ONLY_CLASS, Slo, parse_slo_classes
from servegrid.analysis.summary import tried_cells
from servegrid.analysis.titles import SAME_PROMPT_FACTOR, stops_early
from servegrid.records import columns
from servegrid.study import config
from servegrid.study.deployment import EMULATED
from servegrid.study.grid import CONCURRENCY_PROTOCOLS
from servegrid.study.recorded_users import RecordedUsers, resolve_users

HARDWARE_SCHEMA = config.SCHEMA.with_name("hardware.yaml")

SHARE_USED, SHARE_USED_MIXED = 0.9, 0.85
"""A replica gets this share of the users that it can carry: near the limit, some 15% more users
reduce the share of requests that meet the SLO from 99% to less than 50%. With prompts of several
lengths it is less, because how they slow each other down is modelled, not measured."""
MAX_NOT_COVERED = 0.05
"""There is no plan if a larger share of recorded users' requests, or of their prompt tokens, is
beyond the longest measured prompt. Requests beyond it count as if they missed the SLO, so their
share must also leave room for the SLO."""
MAX_INT = 2**31 - 1
MAX_REPLICAS = 1_000_000
"""The search for the number of replicas stops near this number."""
_HOUR_S, _YEAR_H, _KWH_J = 3600.0, 8766.0, 3.6e6


@dataclass(frozen=True)
class Demand:
    """The demand that the plan is for.

    At the busiest time the share `logged_in` of all `users` is logged in. Each of them thinks for
    `think_time_s` seconds on average between a response and the next request. `load_factor` is the
    mean load of a week divided by that of the busiest time: 0.3 are ten busy hours on five days.
    The share `slo_attainment` of the requests must meet the SLO: `tokens_per_s_per_user`, `ttft_s`,
    `e2el_s`, `tpot_s` and `itl_s` (see `Slo`), those of the class `slo_class`. Prompts have
    `input_len` tokens; if it is None, they have lengths in the shares of `prompt_mix`; if that is
    None too, all measured lengths are equally frequent.

    With `recorded` users, prompts have their lengths, unless there is an `input_len` or
    `prompt_mix`, and responses have their mean length. With `requests_per_s`, that many requests
    arrive at the busiest time, and `users` and `logged_in` do not count: how many users these are
    follows from Little's law. With `cycle_s`, the mean time from a request to the next one of the
    same user, the think time is this minus the modelled response time. After the share `followed`
    of the requests, users think and send another one; after the others, they leave. `dispersion` is
    the variance of the number of arrivals in a short time, divided by its mean: 1 for a Poisson
    process, more if they are burstier.
    """

    users: int = 1000
    logged_in: float = 0.1
    think_time_s: float = 60.0
    load_factor: float = 0.3
    slo_attainment: float = 0.95
    tokens_per_s_per_user: float = 5.0
    ttft_s: float | None = None
    e2el_s: float | None = None
    input_len: int | None = None
    prompt_mix: Mapping[int, float] | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    slo_class: str = ONLY_CLASS
    recorded: RecordedUsers | None = None
    requests_per_s: float | None = None
    cycle_s: float | None = None
    followed: float = 1.0
    dispersion: float = 1.0

    @property
    def slo(self) -> Slo:
        """The service level objective."""
        return Slo(self.tokens_per_s_per_user, self.ttft_s, self.e2el_s, self.tpot_s, self.itl_s)

    @property
    def prompt_shares(self) -> Mapping[int, float] | None:
        """The prompt lengths with their shares; None for all measured lengths."""
        return self.prompt_mix if self.input_len is None else {self.input_len: 1.0}

    @property
    def recorded_lengths(self) -> Sequence[tuple[int, int]] | None:
        """The recorded prompt lengths with their requests; None if others count."""
        if self.recorded is None or self.prompt_shares is not None:
            return None
        return self.recorded.input_lens

    @property
    def concurrent_users(self) -> int:
        """The users who are logged in at the busiest time; at least 1."""
        return max(1, math.ceil(round(self.users * self.logged_in, 6)))


@dataclass(frozen=True)
class HardwarePrices:
    """What hardware costs. `prices` has the price of one GPU by its name in a study.

    A value that is not known is None or missing in `prices`.
    """

    currency: str
    prices: Mapping[str, float]
    electricity_per_kwh: float | None = None
    years_in_use: float | None = None


def parse_demand(study: Mapping[str, Any]) -> Demand:
    """The demand in a study's configuration, which matches the schema; with the first SLO class."""
    return parse_demands(study)[0]


def parse_demands(study: Mapping[str, Any]) -> list[Demand]:
    """One demand per SLO class of a study: its users, if all of them were of this class.

    The file of `capacity.users_from` is read, unless its facts are there. Raises ConfigError if
    it cannot be used.
    """
    capacity = dict(resolve_users(study).get("capacity", {}))
    if "prompt_mix" in capacity:
        capacity["prompt_mix"] = {
            each["input_len"]: each["share"] for each in capacity["prompt_mix"]
        }
    users_from = capacity.pop("users_from", None)
    demands = [
        Demand(**asdict(slo), **capacity, slo_class=name)
        for name, slo in parse_slo_classes(study).items()
    ]
    if users_from is None:
        return demands
    recorded = RecordedUsers.from_spec(users_from["facts"])
    return [with_recorded(demand, recorded) for demand in demands]


def with_recorded(demand: Demand, users: RecordedUsers) -> Demand:
    """The demand with what recorded users say about it, and nothing else."""
    return replace(
        demand,
        recorded=users,
        input_len=None,
        prompt_mix=None,
        requests_per_s=users.busiest_requests_per_s,
        load_factor=_if_known(users.load_factor, demand.load_factor),
        think_time_s=_if_known(users.think_time_s, demand.think_time_s),
        cycle_s=users.cycle_s if users.think_time_s is None else None,
        followed=_if_known(users.followed, 1.0),
        dispersion=max(1.0, _if_known(users.dispersion, 1.0)),
    )


def _if_known(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def load_prices(file: Path) -> HardwarePrices:
    """The prices in a YAML file like config/hardware.yaml.

    Raises ConfigError, with file, key and remedy, if the file cannot be used.
    """
    data = config.load_mapping(file)
    config.validate(data, config.load_mapping(HARDWARE_SCHEMA), str(file))
    return HardwarePrices(
        currency=data["currency"],
        prices={gpu: float(entry["price"]) for gpu, entry in data["gpus"].items()},
        electricity_per_kwh=data.get("electricity_per_kwh"),
        years_in_use=data.get("years_in_use"),
    )


def plan_capacity(summary: pd.DataFrame, demand: Demand, hardware: HardwarePrices) -> pd.DataFrame:
    """A table of `columns.CAPACITY_PLAN`, one row per deployment, protocol and output length.

    `summary` is a table of `columns.SUMMARY`. Only protocols with a concurrency are planned. The
    cheapest rows come first. If there is no plan for a row, its `reason` says why.
    """
    known = tried_cells(summary, demand.slo)
    with_concurrency = known[known["protocol"].isin(CONCURRENCY_PROTOCOLS)]
    groups = with_concurrency.groupby(["protocol", "output_len", "deployment"], sort=False)
    rows = []
    for (protocol, output_len, name), cells in groups:
        first = cells.iloc[0]
        row = {
            "deployment": name,
            "gpu": first["gpu"],
            "gpu_count": int(first["gpu_count"]),
            "emulated": first["engine"] == EMULATED,
            "protocol": protocol,
            "output_len": int(str(output_len)),
            "output_len_exact": not stops_early(cells).any(),
            "slo_class": demand.slo_class,
        }
        curves = latency_curves(cells, demand.prompt_shares, demand.slo, demand.recorded_lengths)
        if isinstance(curves, str):
            rows.append(row | {"reason": curves})
            continue
        row["prompt_tokens"] = curves.prompt_tokens
        if curves.coverage is not None:
            row["prompt_tokens_mean"] = curves.coverage.mean
            row["requests_not_covered"] = curves.coverage.requests_missing
            row["prompt_tokens_not_covered"] = curves.coverage.tokens_missing
        if reason := find_gap(curves, demand):
            rows.append(row | {"reason": reason})
            continue
        size = size_deployment(curves, demand, hardware, first["gpu"], row["gpu_count"])
        rows.append(row | size)
    plan = tables.from_rows(rows, columns.CAPACITY_PLAN)
    order = ["purchase", "gpus", "replicas"]
    return plan.sort_values(order, kind="stable", na_position="last", ignore_index=True)


def find_gap(curves: LatencyCurves, demand: Demand) -> str | None:
    """Why the measured lengths do not stand for those of recorded users; None if they do."""
    coverage, recorded = curves.coverage, demand.recorded
    if coverage is not None:
        limit = min(MAX_NOT_COVERED, 1 - demand.slo_attainment)
        for share, most, what in (
            (coverage.requests_missing, limit, "requests have longer prompts than"),
            (coverage.tokens_missing, MAX_NOT_COVERED, "prompt tokens are beyond"),
        ):
            if share > most + ROUNDING:
                return (
                    f"{100 * share:.1f}% of the {what} the {coverage.longest} tokens that were "
                    f"measured, and the limit is {100 * most:g}%: measure longer prompts"
                )
    if recorded is None or recorded.output_len is None:
        return None
    ratio = recorded.output_len / curves.output_len
    if max(ratio, 1 / ratio) > SAME_PROMPT_FACTOR:
        return (
            f"outputs of about {round(recorded.output_len)} tokens, the mean of the "
            f"{recorded.kind}, were not measured"
        )
    return None


@dataclass(frozen=True)
class _Load:
    """The requests/s and the requests in flight of one replica with its part of the demand.

    All `replicas` together have `share` of as many times that: users may not divide evenly.
    """

    replicas: int
    requests_per_s: float
    in_flight: float
    share: float = 1.0


def size_deployment(
    curves: LatencyCurves, demand: Demand, hardware: HardwarePrices, gpu: str, gpu_count: int
) -> dict[str, Any]:
    """How much hardware the demand needs on one deployment, by names of `columns.CAPACITY_PLAN`."""
    highest = min(allowed_in_flight(curves, curves.seconds, _slo_of(curves, demand)))
    size: dict[str, Any] = {
        "max_in_flight": highest,
        "max_in_flight_is_lower_bound": highest == len(curves.seconds[0]) and curves.untested_above,
    }
    by_rate = demand.requests_per_s is not None
    found, load = (_size_by_rate if by_rate else _size_by_users)(curves, demand)
    size |= found
    if load is None:
        return size | {"reason": "too few requests meet the SLO, even with one user"}
    return size | _costs(curves, demand, hardware, load, highest, gpu, gpu_count)


def request_size(curves: LatencyCurves, demand: Demand) -> float:
    """How many measured requests a mean request of recorded users is; at least 1.

    A longer output takes longer in proportion. A shorter one also has its prompt to read, so it
    counts as a whole request.
    """
    recorded = demand.recorded
    if recorded is None or recorded.output_len is None:
        return 1.0
    return max(1.0, recorded.output_len / curves.output_len)


def _slo_of(curves: LatencyCurves, demand: Demand) -> Slo:
    """The SLO for requests of the measured output length."""
    slo = demand.slo
    if slo.e2el_s is None:
        return slo
    return replace(slo, e2el_s=slo.e2el_s / request_size(curves, demand))


def _allowed(curves: LatencyCurves, rows: Rows, demand: Demand) -> list[tuple[int, float]]:
    """The requests in flight that each kind of request allows, with its share.

    Requests with longer prompts than measured may meet the SLO or not. They count as if not.
    """
    limits = allowed_in_flight(curves, rows, _slo_of(curves, demand))
    pairs = list(zip(limits, curves.shares, strict=True))
    if curves.coverage is None or not curves.coverage.requests_missing:
        return pairs
    missing = curves.coverage.requests_missing
    limit, share = pairs[-1]
    return [*pairs[:-1], (limit, share - missing), (0, missing)]


def _mean_seconds(curves: LatencyCurves, rows: Rows, demand: Demand) -> list[float]:
    """The seconds of the mean request at 1, 2, … in flight."""
    size = request_size(curves, demand)
    return [size * each for each in weighted_mean(rows, curves.shares)]


def _share_used(curves: LatencyCurves) -> float:
    return SHARE_USED if len(curves.shares) == 1 else SHARE_USED_MIXED


def _size_by_users(curves: LatencyCurves, demand: Demand) -> tuple[dict[str, Any], _Load | None]:
    """The replicas for a number of users; no load if not even one user can be served."""
    think_time_s = demand.think_time_s

    def carried(rows: Rows | None, slo_attainment: float = demand.slo_attainment) -> int | None:
        if rows is None:
            return None
        mean = _mean_seconds(curves, rows, demand)
        return users_carried(mean, _allowed(curves, rows, demand), think_time_s, slo_attainment)

    users, low, high = map(carried, (curves.seconds, curves.slow, curves.fast))
    size: dict[str, Any] = {
        "users_carried": users,
        "users_carried_low": low,
        "users_carried_high": high,
        "users_at_50pct_slo": carried(curves.seconds, 0.5),
    }
    safe = users if low is None else low
    users_per_replica = max(1, math.floor(_share_used(curves) * safe)) if safe else 0
    if not users_per_replica:
        return size, None
    wanted = demand.concurrent_users
    replicas = math.ceil(wanted / users_per_replica)
    users_each = math.ceil(wanted / replicas)
    seconds = _mean_seconds(curves, curves.seconds, demand)
    busy = mean_in_flight(seconds, users_each, think_time_s)
    rate = requests_per_s(seconds, users_each, think_time_s)
    size |= {"users_per_replica": users_per_replica, "users_logged_in": wanted}
    return size, _Load(replicas, rate, busy, wanted / users_each / replicas)


def _size_by_rate(curves: LatencyCurves, demand: Demand) -> tuple[dict[str, Any], _Load | None]:
    """The replicas for a request rate; no load if too few requests meet the SLO at any rate.

    The numbers of users follow from rates by Little's law (A proof for the queuing formula
    L = λW, 1961): users = rate × (think time + response time), where the last request of a user has
    no think time after it. The rate does not depend on how fast responses are: users come, send
    their requests and leave. The load of such a partly-open system on the server is that of an open
    loop of the same rate (Baskett et al., Open, closed, and mixed networks of queues, 1975;
    Schroeder et al., Open versus closed: a cautionary tale, 2006). If the same users stay, a slow
    server gets fewer requests, and the plan has some replicas more than they need.
    """

    total = demand.requests_per_s
    assert total is not None
    replicas = _replicas_for(total, curves, demand)
    bursts = split_dispersion(demand.dispersion, replicas or 1)

    def carried(rows: Rows | None, slo_attainment: float = demand.slo_attainment) -> float | None:
        return None if rows is None else _rate_of(curves, rows, demand, slo_attainment, bursts)

    def users(rows: Rows | None, rate: float | None) -> int | None:
        if rows is None or rate is None:
            return None
        seconds = _mean_seconds(curves, rows, demand)
        return math.floor(min(_users_of(seconds, rate, demand, bursts), MAX_USERS))

    rate, low, high = map(carried, (curves.seconds, curves.slow, curves.fast))
    size: dict[str, Any] = {
        "users_carried": users(curves.seconds, rate),
        "users_carried_low": users(curves.slow, low),
        "users_carried_high": users(curves.fast, high),
        "users_at_50pct_slo": users(curves.seconds, carried(curves.seconds, 0.5)),
        "requests_per_s_carried": rate,
        "requests_per_s_carried_low": low,
    }
    if replicas is None:
        return size, None
    most = _most_per_replica(curves, demand, bursts)
    seconds = _mean_seconds(curves, curves.seconds, demand)
    each = total / replicas
    at_once = replicas * _users_of(seconds, each, demand, bursts)
    size |= {
        "users_per_replica": users(curves.seconds, most),
        "users_logged_in": math.ceil(min(at_once, MAX_INT)),
        "requests_per_s_per_replica": most,
    }
    return size, _Load(replicas, each, open_mean_in_flight(seconds, each, bursts))


def _rate_of(
    curves: LatencyCurves, rows: Rows, demand: Demand, slo_attainment: float, dispersion: float
) -> float:
    """The rate that one replica carries."""
    mean = _mean_seconds(curves, rows, demand)
    return rate_carried(mean, _allowed(curves, rows, demand), slo_attainment, dispersion)


def _most_per_replica(curves: LatencyCurves, demand: Demand, dispersion: float) -> float:
    """The rate that the plan puts on one replica at most."""
    rows = curves.seconds if curves.slow is None else curves.slow
    rate = _rate_of(curves, rows, demand, demand.slo_attainment, dispersion)
    return _share_used(curves) * rate


def _replicas_for(total: float, curves: LatencyCurves, demand: Demand) -> int | None:
    """The fewest replicas for a request rate; None if there cannot be enough.

    Each of more replicas has a smaller and less bursty part of the requests.
    """

    def is_enough(replicas: int) -> bool:
        bursts = split_dispersion(demand.dispersion, replicas)
        return total / replicas <= _most_per_replica(curves, demand, bursts)

    if not _most_per_replica(curves, demand, 1.0):
        return None
    low, high = 0, 1
    while not is_enough(high):
        low, high = high, 2 * high
        if high > MAX_REPLICAS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _users_of(seconds: Sequence[float], rate: float, demand: Demand, dispersion: float) -> float:
    """The users who send a rate of requests to one replica."""
    in_flight = open_mean_in_flight(seconds, rate, dispersion)
    if demand.cycle_s is None:
        return rate * demand.followed * demand.think_time_s + in_flight
    # The last request of a user takes the response time only.
    stay = rate * demand.followed * demand.cycle_s + (1 - demand.followed) * in_flight
    return max(stay, in_flight)


def _costs(
    curves: LatencyCurves,
    demand: Demand,
    hardware: HardwarePrices,
    load: _Load,
    highest: int,
    gpu: str,
    gpu_count: int,
) -> dict[str, Any]:
    """Replicas, GPUs and costs of a load, by names of `columns.CAPACITY_PLAN`."""
    replicas = load.replicas
    recorded_len = None if demand.recorded is None else demand.recorded.output_len
    output_len = curves.output_len if recorded_len is None else recorded_len
    tokens_per_s = load.requests_per_s * replicas * load.share * output_len
    measured = weighted_mean(curves.seconds, curves.shares)
    capacity = replicas * highest * curves.output_len / measured[highest - 1] if highest else None
    price = hardware.prices.get(gpu)
    purchase = None if price is None else price * max(1, gpu_count) * replicas
    joules = None if curves.joules is None else _interpolate(curves.joules, load.in_flight)
    costs: dict[str, Any] = {
        "replicas": replicas,
        "gpus": replicas * gpu_count,
        "in_flight_mean": load.in_flight * replicas * load.share,
        "response_s_mean": load.in_flight / load.requests_per_s,
        "output_tokens_per_s": tokens_per_s,
        "purchase": purchase,
        "purchase_per_token_per_s": purchase and capacity and purchase / capacity,
        "energy_j_per_output_token": joules,
    }
    if purchase is not None and hardware.years_in_use is not None:
        in_use_s = hardware.years_in_use * _YEAR_H * _HOUR_S
        at_peak = purchase / in_use_s / tokens_per_s * 1e6
        costs["purchase_per_million_tokens_at_peak"] = at_peak
        costs["purchase_per_million_tokens"] = at_peak / demand.load_factor
    if joules is not None and hardware.electricity_per_kwh is not None:
        costs["energy_cost_per_million_tokens"] = (
            joules * 1e6 / _KWH_J * hardware.electricity_per_kwh
        )
    return costs


def _interpolate(values: Sequence[float], position: float) -> float:
    """`values` at 1, 2, …, interpolated linearly at `position`; outside, the first or last one."""
    if len(values) == 1:
        return values[0]
    position = min(max(position, 1.0), float(len(values)))
    before = min(math.floor(position), len(values) - 1)
    low, high = values[before - 1], values[before]
    return low + (high - low) * (position - before)
