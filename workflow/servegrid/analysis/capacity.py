"""The capacity plan: which deployments serve how many users, on how many GPUs, at which cost. Pure.

The page computes the same in planner.js when an assumption is changed; tests hold the two together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid.analysis import tables
from servegrid.analysis.queueing import (
    Curve,
    isotonic_fit,
    max_in_flight,
    mean_in_flight,
    requests_per_s,
    users_carried,
)
from servegrid.analysis.titles import nearest_length
from servegrid.records import columns
from servegrid.study import config
from servegrid.study.deployment import EMULATED

RULES = config.SCHEMA.with_name("hardware.yaml")

SHARE_USED = 0.9
"""Of the users that a replica carries it is given as many. Near the limit the chance to keep it
falls from 0.99 to under a half within some 15% more users."""
CLOSED = ("burst", "closed_loop")
"""Protocols whose cells have a number of requests in flight."""
Times = Sequence[Sequence[float]]
HOUR_S, YEAR_H, KWH_J = 3600.0, 8766.0, 3.6e6


@dataclass(frozen=True)
class Demand:
    """For whom the plan is made. Of `users` the share `logged_in` is there at the busiest time;
    each thinks for `think_time_s` seconds on average between an answer and the next request. Of the
    requests the share `slo_attainment` must get `tokens_per_s_per_user`. Prompts have `input_len`
    tokens; if it is None, lengths in the shares of `prompt_mix`; otherwise all measured lengths
    in equal parts."""

    users: int = 1000
    logged_in: float = 0.1
    think_time_s: float = 60.0
    slo_attainment: float = 0.95
    tokens_per_s_per_user: float = 5.0
    input_len: int | None = None
    prompt_mix: Mapping[int, float] | None = None

    @property
    def prompts(self) -> Mapping[int, float] | None:
        """The wanted prompt lengths and their shares; None: all that were measured."""
        return self.prompt_mix if self.input_len is None else {self.input_len: 1.0}

    @property
    def at_once(self) -> int:
        """Users who are logged in at the busiest time, at least one."""
        return max(1, math.ceil(round(self.users * self.logged_in, 6)))


@dataclass(frozen=True)
class Hardware:
    """What hardware costs: `prices` of one GPU by its name in studies; None is not known."""

    currency: str
    prices: Mapping[str, float]
    electricity_per_kwh: float | None = None
    years_in_use: float | None = None


@dataclass(frozen=True)
class LatencyCurves:
    """What one deployment does under one load.

    `shares` of all prompts are of each length. Times are a row for each length, in it those at 1,
    2, … requests in flight: `seconds` of a request, `fast_s` and `slow_s` at the ends of the 95%
    intervals, None where one is not known; `joules` of an output token. `more_untried` says that
    nothing above was tried.
    """

    prompt_tokens: str
    output_len: int
    shares: Sequence[float]
    seconds: Times
    fast_s: Times | None
    slow_s: Times | None
    joules: Sequence[float] | None
    more_untried: bool


def parse_demand(study: Mapping[str, Any]) -> Demand:
    """The demand that a study's configuration describes; it fits the schema."""
    limit = study.get("slo", {}).get("tokens_per_s_per_user", Demand.tokens_per_s_per_user)
    capacity = dict(study.get("capacity", {}))
    if "prompt_mix" in capacity:
        capacity["prompt_mix"] = {
            each["input_len"]: each["share"] for each in capacity["prompt_mix"]
        }
    return Demand(tokens_per_s_per_user=limit, **capacity)


def read_hardware(file: Path) -> Hardware:
    """The prices in a YAML file such as config/hardware.yaml.

    Raises ConfigError, naming file, key and remedy, where it cannot be used as it stands.
    """
    data = config.load_mapping(file)
    config.validate(data, config.load_mapping(RULES), str(file))
    return Hardware(
        currency=data["currency"],
        prices={gpu: float(entry["price"]) for gpu, entry in data["gpus"].items()},
        electricity_per_kwh=data.get("electricity_per_kwh"),
        years_in_use=data.get("years_in_use"),
    )


def plan(summary: pd.DataFrame, demand: Demand, hardware: Hardware) -> pd.DataFrame:
    """One row of `columns.CAPACITY_PLAN` per deployment and closed-loop load, the cheapest first.

    `summary` has the columns of `columns.SUMMARY`. Where nothing can be said, `reason` says why.
    """
    closed = summary[summary["protocol"].isin(CLOSED)]
    groups = closed.groupby(["protocol", "output_len", "deployment"], sort=False)
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
        }
        found = served(cells, demand.prompts)
        if isinstance(found, str):
            rows.append(row | {"reason": found})
        else:
            row["prompt_tokens"] = found.prompt_tokens
            rows.append(row | needed(found, demand, hardware, first["gpu"], row["gpu_count"]))
    frame = pd.DataFrame(rows, columns=[column.name for column in columns.CAPACITY_PLAN])
    frame = tables.typed(frame.astype(object).where(frame.notna(), None), columns.CAPACITY_PLAN)
    order = ["purchase", "gpus", "replicas"]
    return frame.sort_values(order, kind="stable", na_position="last", ignore_index=True)


def served(cells: pd.DataFrame, prompts: Mapping[int, float] | None) -> LatencyCurves | str:
    """What the cells of one deployment under one load say, or why they say nothing.

    `prompts` are prompt lengths and their shares, None all that were measured in equal parts; how
    they slow each other down is not measured. A load that was not served ends what is known of its
    length, whatever was served above it.
    """
    known = cells[cells["trials_valid"] > 0].dropna(subset="seconds_per_100_tokens")
    shares = dict.fromkeys(cells["input_len"].unique().tolist(), 1.0 if prompts is None else 0.0)
    for length, share in (prompts or {}).items():
        nearest = nearest_length(list(shares), length)
        if nearest is None:
            return f"prompts of about {length} tokens were not measured"
        shares[nearest] += share
    wanted = [length for length, share in shares.items() if share]
    cells, known = (each[each["input_len"].isin(wanted)] for each in (cells, known))
    failed = cells[cells["trials_served"] == 0].groupby("input_len")["concurrency"].min()
    end = known["input_len"].map(failed).astype(float).fillna(math.inf)
    known = known[known["concurrency"] < end]
    if known.empty:
        return "there is no valid cell"
    lacking = sorted(set(cells["input_len"]) - set(known["input_len"]))
    if lacking:
        return f"there is no valid cell with prompts of {lacking[0]} tokens"
    parts = [own.sort_values("concurrency") for _, own in known.groupby("input_len")]
    most = min(int(own["concurrency"].max()) for own in parts)
    tried = cells.loc[cells["concurrency"] > most, "input_len"]
    short = {int(o["input_len"].iloc[0]) for o in parts if o["concurrency"].max() == most}
    lengths = sorted(int(length) for length in known["input_len"].unique())
    parts_of = [shares[length] / sum(shares.values()) for length in lengths]
    return LatencyCurves(
        prompt_tokens=" to ".join(map(str, dict.fromkeys((lengths[0], lengths[-1])))),
        output_len=int(cells["output_len"].iloc[0]),
        shares=parts_of,
        seconds=_times(parts, "seconds_per_100_tokens", most) or [],
        fast_s=_times(parts, "seconds_per_100_tokens_low", most),
        slow_s=_times(parts, "seconds_per_100_tokens_high", most),
        joules=_joules(parts, parts_of, most),
        more_untried=not short & set(tried),
    )


def needed(
    found: LatencyCurves, demand: Demand, hardware: Hardware, gpu: str, gpu_count: int
) -> dict[str, Any]:
    """What the demand needs of a deployment, by the names of `columns.CAPACITY_PLAN`."""
    limit_s = found.output_len / demand.tokens_per_s_per_user
    seconds = _mean(found.seconds, found.shares)
    most = min(max_in_flight(each, limit_s) for each in found.seconds)

    def carried(times: Times | None, slo_attainment: float = demand.slo_attainment) -> int | None:
        if times is None:
            return None
        allowed = [
            (max_in_flight(each, limit_s), share)
            for each, share in zip(times, found.shares, strict=True)
        ]
        mean = _mean(times, found.shares)
        return users_carried(mean, allowed, demand.think_time_s, slo_attainment)

    users, low, high = map(carried, (found.seconds, found.slow_s, found.fast_s))
    row: dict[str, Any] = {
        "max_in_flight": most,
        "max_in_flight_is_lower_bound": most == len(seconds) and found.more_untried,
        "users_carried": users,
        "users_carried_low": low,
        "users_carried_high": high,
        "users_at_50pct_slo": carried(found.seconds, 0.5),
    }
    sure = users if low is None else low
    each = max(1, math.floor(SHARE_USED * sure)) if sure else 0
    if not each:
        return row | {"reason": "even the lowest measured concurrency may not meet the SLO"}
    replicas = math.ceil(demand.at_once / each)
    there = math.ceil(demand.at_once / replicas)
    busy = mean_in_flight(seconds, there, demand.think_time_s)
    rate = requests_per_s(seconds, there, demand.think_time_s)
    tokens_per_s = rate * found.output_len * demand.at_once / there
    able = replicas * most * found.output_len / seconds[most - 1] if most else None
    price = hardware.prices.get(gpu)
    purchase = None if price is None else price * max(1, gpu_count) * replicas
    joules = None if found.joules is None else _between(found.joules, busy)
    row |= {
        "users_per_replica": each,
        "replicas": replicas,
        "gpus": replicas * gpu_count,
        "in_flight_mean": busy * demand.at_once / there,
        "output_tokens_per_s": tokens_per_s,
        "purchase": purchase,
        "purchase_per_token_per_s": purchase and able and purchase / able,
        "energy_j_per_output_token": joules,
    }
    if purchase is not None and hardware.years_in_use is not None:
        in_use_s = hardware.years_in_use * YEAR_H * HOUR_S
        row["purchase_per_million_tokens"] = purchase / in_use_s / tokens_per_s * 1e6
    if joules is not None and hardware.electricity_per_kwh is not None:
        row["energy_cost_per_million_tokens"] = joules * 1e6 / KWH_J * hardware.electricity_per_kwh
    return row


def _times(parts: Sequence[pd.DataFrame], column: str, most: int) -> Times | None:
    """A column at 1, 2, … `most` in flight in seconds of a request, which never fall; None where
    it is not known of every cell."""
    if any(own[column].isna().any() for own in parts):
        return None
    rows = []
    for own in parts:
        scale = own["time_scale"].iloc[0]  # of an emulation, whose time goes faster
        factor = float(own["output_len"].iloc[0]) / 100 / (1.0 if pd.isna(scale) else float(scale))
        fitted = isotonic_fit([float(each) * factor for each in own[column]])
        rows.append(Curve(tuple(own["concurrency"].astype(int)), tuple(fitted)).each()[:most])
    return rows


def _joules(
    parts: Sequence[pd.DataFrame], shares: Sequence[float], most: int
) -> Sequence[float] | None:
    column = "energy_j_per_output_token"
    if any(own[column].isna().any() for own in parts):
        return None
    curves = [
        Curve(tuple(own["concurrency"].astype(int)), tuple(own[column].astype(float)))
        for own in parts
    ]
    return _mean([curve.each()[:most] for curve in curves], shares)


def _mean(rows: Times, shares: Sequence[float]) -> list[float]:
    return [
        sum(value * share for value, share in zip(each, shares, strict=True))
        for each in zip(*rows, strict=True)
    ]


def _between(values: Sequence[float], place: float) -> float:
    """Values at 1, 2, …, linear in between; at the ends those of the ends."""
    place = min(max(place, 1.0), float(len(values)))
    before = min(math.floor(place), len(values) - 1) if len(values) > 1 else 1
    if len(values) == 1:
        return values[0]
    low, high = values[before - 1], values[before]
    return low + (high - low) * (place - before)
