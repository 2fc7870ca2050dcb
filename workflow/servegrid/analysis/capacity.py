"""The capacity plan: how many users each deployment serves, on how many GPUs, at what cost. Pure.

The page computes the same in planner.js when the reader changes an assumption. A test compares
the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from servegrid.analysis.queueing import mean_in_flight, requests_per_s, users_carried
from servegrid.analysis.slo import ONLY_CLASS, Slo, parse_slo_classes
from servegrid.analysis.summary import tried_cells
from servegrid.analysis.titles import stops_early
from servegrid.records import columns
from servegrid.study import config
from servegrid.study.deployment import EMULATED
from servegrid.study.grid import CONCURRENCY_PROTOCOLS

HARDWARE_SCHEMA = config.SCHEMA.with_name("hardware.yaml")

SHARE_USED, SHARE_USED_MIXED = 0.9, 0.85
"""A replica gets this share of the users that it can carry: near the limit, some 15% more users
reduce the share of requests that meet the SLO from 99% to less than 50%. With prompts of several
lengths it is less, because how they slow each other down is modelled, not measured."""
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

    @property
    def slo(self) -> Slo:
        """The service level objective."""
        return Slo(self.tokens_per_s_per_user, self.ttft_s, self.e2el_s, self.tpot_s, self.itl_s)

    @property
    def prompt_shares(self) -> Mapping[int, float] | None:
        """The prompt lengths with their shares; None for all measured lengths."""
        return self.prompt_mix if self.input_len is None else {self.input_len: 1.0}

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
    """One demand per SLO class of a study: its users, if all of them were of this class."""
    capacity = dict(study.get("capacity", {}))
    if "prompt_mix" in capacity:
        capacity["prompt_mix"] = {
            each["input_len"]: each["share"] for each in capacity["prompt_mix"]
        }
    return [
        Demand(**asdict(slo), **capacity, slo_class=name)
        for name, slo in parse_slo_classes(study).items()
    ]


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
        curves = latency_curves(cells, demand.prompt_shares, demand.slo)
        if isinstance(curves, str):
            rows.append(row | {"reason": curves})
        else:
            row["prompt_tokens"] = curves.prompt_tokens
            size = size_deployment(curves, demand, hardware, first["gpu"], row["gpu_count"])
            rows.append(row | size)
    plan = tables.from_rows(rows, columns.CAPACITY_PLAN)
    order = ["purchase", "gpus", "replicas"]
    return plan.sort_values(order, kind="stable", na_position="last", ignore_index=True)


def size_deployment(
    curves: LatencyCurves, demand: Demand, hardware: HardwarePrices, gpu: str, gpu_count: int
) -> dict[str, Any]:
    """How much hardware the demand needs on one deployment, by names of `columns.CAPACITY_PLAN`."""
    seconds = weighted_mean(curves.seconds, curves.shares)
    highest = min(allowed_in_flight(curves, curves.seconds, demand.slo))

    def carried(rows: Rows | None, slo_attainment: float = demand.slo_attainment) -> int | None:
        if rows is None:
            return None
        limits = allowed_in_flight(curves, rows, demand.slo)
        allowed = list(zip(limits, curves.shares, strict=True))
        mean = weighted_mean(rows, curves.shares)
        return users_carried(mean, allowed, demand.think_time_s, slo_attainment)

    users, low, high = map(carried, (curves.seconds, curves.slow, curves.fast))
    size: dict[str, Any] = {
        "max_in_flight": highest,
        "max_in_flight_is_lower_bound": highest == len(seconds) and curves.untested_above,
        "users_carried": users,
        "users_carried_low": low,
        "users_carried_high": high,
        "users_at_50pct_slo": carried(curves.seconds, 0.5),
    }
    safe = users if low is None else low
    share_used = SHARE_USED if len(curves.shares) == 1 else SHARE_USED_MIXED
    users_per_replica = max(1, math.floor(share_used * safe)) if safe else 0
    if not users_per_replica:
        return size | {"reason": "too few requests meet the SLO, even with one user"}
    wanted = demand.concurrent_users
    replicas = math.ceil(wanted / users_per_replica)
    users_each = math.ceil(wanted / replicas)
    busy = mean_in_flight(seconds, users_each, demand.think_time_s)
    rate = requests_per_s(seconds, users_each, demand.think_time_s)
    tokens_per_s = rate * curves.output_len * wanted / users_each
    capacity = replicas * highest * curves.output_len / seconds[highest - 1] if highest else None
    price = hardware.prices.get(gpu)
    purchase = None if price is None else price * max(1, gpu_count) * replicas
    joules = None if curves.joules is None else _interpolate(curves.joules, busy)
    size |= {
        "users_per_replica": users_per_replica,
        "replicas": replicas,
        "gpus": replicas * gpu_count,
        "in_flight_mean": busy * wanted / users_each,
        "output_tokens_per_s": tokens_per_s,
        "purchase": purchase,
        "purchase_per_token_per_s": purchase and capacity and purchase / capacity,
        "energy_j_per_output_token": joules,
    }
    if purchase is not None and hardware.years_in_use is not None:
        in_use_s = hardware.years_in_use * _YEAR_H * _HOUR_S
        at_peak = purchase / in_use_s / tokens_per_s * 1e6
        size["purchase_per_million_tokens_at_peak"] = at_peak
        size["purchase_per_million_tokens"] = at_peak / demand.load_factor
    if joules is not None and hardware.electricity_per_kwh is not None:
        size["energy_cost_per_million_tokens"] = (
            joules * 1e6 / _KWH_J * hardware.electricity_per_kwh
        )
    return size


def _interpolate(values: Sequence[float], position: float) -> float:
    """`values` at 1, 2, …, interpolated linearly at `position`; outside, the first or last one."""
    if len(values) == 1:
        return values[0]
    position = min(max(position, 1.0), float(len(values)))
    before = min(math.floor(position), len(values) - 1)
    low, high = values[before - 1], values[before]
    return low + (high - low) * (position - before)
