"""Latency by the number of requests in flight, from measured cells. Pure.

The page computes the same in planner.js; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from servegrid.analysis.queueing import Curve, isotonic_fit, max_in_flight
from servegrid.analysis.slo import Slo
from servegrid.analysis.titles import nearest_length
from servegrid.analysis.validity import MIN_IN_FLIGHT

Rows = Sequence[Sequence[float]]
"""One row per prompt length, with the values at 1, 2, … requests in flight."""


@dataclass(frozen=True)
class LatencyCurves:
    """The measured latencies of one deployment under one protocol and output length.

    `shares` has the share of each prompt length in all requests. `seconds`, `fast` and `slow` have
    one row per prompt length, with the seconds per request at 1, 2, … requests in flight: the
    medians and both ends of their 95% intervals. `fast` and `slow` are None if an interval is not
    known. `ttft`, `e2el`, `tpot` and `itl_max` are the median latencies in the same form; None if
    one is not known.
    `joules` is the energy per output token at 1, 2, … requests in flight, if it is known.
    `untested_above` says that no higher concurrency was measured. `coverage` says how the lengths
    of recorded users became those of the rows; None without such users.
    """

    prompt_tokens: str
    output_len: int
    shares: Sequence[float]
    seconds: Rows
    fast: Rows | None
    slow: Rows | None
    ttft: Rows | None
    e2el: Rows | None
    joules: Sequence[float] | None
    untested_above: bool
    tpot: Rows | None = None
    itl_max: Rows | None = None
    coverage: Coverage | None = None


def requests_in_flight(cells: pd.DataFrame) -> pd.Series[float]:
    """The load of each cell, rows of `columns.SUMMARY`: the number of requests in flight.

    It is the concurrency, unless the mean that was measured in a closed loop is below MIN_IN_FLIGHT
    of it. Then the load is not what the label says, as with users who think, and it is the measured
    mean. The load of a burst is always its concurrency: its time ends with the last request, and
    n requests in that time are its throughput. The mean in flight is lower, because the others have
    ended before, and it belongs to their mean time.
    """
    labels = cells["concurrency"].astype(float)
    measured = cells["in_flight_mean"].astype(float)
    is_label = (cells["protocol"] == "burst") | ~(measured < MIN_IN_FLIGHT * labels)
    return labels.where(is_label, measured)


def latency_curves(
    cells: pd.DataFrame,
    prompt_shares: Mapping[int, float] | None,
    slo: Slo,
    recorded: Sequence[tuple[int, int]] | None = None,
) -> LatencyCurves | str:
    """The latency curves of one deployment, protocol and output length; or why there are none.

    `cells` are rows of `columns.SUMMARY`. `prompt_shares` are prompt lengths with their shares;
    None means all measured lengths, equally frequent. With `recorded`, pairs of a prompt length and
    its requests, the shares are those of `cover_lengths` instead. A curve ends below the lowest
    concurrency that was not served. There are no curves if `slo` limits a latency that is not
    known.
    """
    valid = _usable(cells)
    coverage = None
    if recorded is None or valid.empty:
        shares = _shares_of(cells["input_len"].unique().tolist(), prompt_shares)
        if isinstance(shares, str):
            return shares
    else:
        coverage = cover_lengths(recorded, valid["input_len"].unique().tolist())
        shares = coverage.shares
    wanted = [length for length, share in shares.items() if share]
    cells, valid = (table[table["input_len"].isin(wanted)] for table in (cells, valid))
    if valid.empty:
        return "there is no valid cell"
    valid = valid.assign(in_flight=requests_in_flight(valid))
    lacking = sorted(set(cells["input_len"]) - set(valid["input_len"]))
    if lacking:
        return f"there is no valid cell with prompts of {lacking[0]} tokens"
    by_length = [rows.sort_values("in_flight") for _, rows in valid.groupby("input_len")]
    limit = min(math.floor(rows["in_flight"].max()) for rows in by_length)
    if limit < 1:
        return "fewer than one request was in flight on average"
    # The concurrency up to which the lengths that end at the limit were measured.
    ends = {
        int(rows["input_len"].iloc[0]): rows["concurrency"].max()
        for rows in by_length
        if math.floor(rows["in_flight"].max()) == limit
    }
    tested_above = cells["concurrency"] > cells["input_len"].map(ends).astype(float)
    lengths = sorted(int(length) for length in valid["input_len"].unique())
    medians = {
        name: _latencies(by_length, f"{name}_s_p50", limit)
        for name in ("ttft", "e2el", "tpot", "itl_max")
    }
    for name, limited, title in (
        ("ttft", slo.ttft_s, "time to first token"),
        ("e2el", slo.e2el_s, "end-to-end latency"),
        ("tpot", slo.tpot_s, "time per output token"),
        ("itl_max", slo.itl_s, "inter-token latency"),
    ):
        if limited is not None and medians[name] is None:
            return f"the SLO limits the {title}, which is not known for every cell"
    normalised = [shares[length] / sum(shares.values()) for length in lengths]
    return LatencyCurves(
        prompt_tokens=" to ".join(map(str, dict.fromkeys((lengths[0], lengths[-1])))),
        output_len=int(cells["output_len"].iloc[0]),
        shares=normalised,
        seconds=_seconds(by_length, "seconds_per_100_tokens", limit) or [],
        fast=_seconds(by_length, "seconds_per_100_tokens_low", limit),
        slow=_seconds(by_length, "seconds_per_100_tokens_high", limit),
        ttft=medians["ttft"],
        e2el=medians["e2el"],
        tpot=medians["tpot"],
        itl_max=medians["itl_max"],
        joules=_joules(by_length, normalised, limit),
        untested_above=not tested_above.any(),
        coverage=coverage,
    )


def _usable(cells: pd.DataFrame) -> pd.DataFrame:
    """The valid cells below the lowest concurrency of their prompt length that was not served."""
    valid = cells[cells["trials_valid"] > 0].dropna(subset="seconds_per_100_tokens")
    failed = cells[cells["trials_served"] == 0].groupby("input_len")["concurrency"].min()
    end = valid["input_len"].map(failed).astype(float).fillna(math.inf)
    return valid[valid["concurrency"] < end]


def _shares_of(
    measured: Sequence[int], prompt_shares: Mapping[int, float] | None
) -> Mapping[int, float] | str:
    """The share of each measured length, or why a length has none."""
    shares = dict.fromkeys(measured, 1.0 if prompt_shares is None else 0.0)
    for length, share in (prompt_shares or {}).items():
        nearest = nearest_length(list(shares), length)
        if nearest is None:
            return f"prompts of about {length} tokens were not measured"
        shares[nearest] += share
    return shares


@dataclass(frozen=True)
class Coverage:
    """How recorded prompt lengths became measured ones.

    `shares` has the share of each measured length; they sum up to 1. The share `requests_missing`
    of the requests is longer than the longest measured prompt, and `tokens_missing` is the share
    of all prompt tokens beyond this length.
    """

    shares: Mapping[int, float]
    requests_missing: float
    tokens_missing: float

    @property
    def longest(self) -> int:
        """The longest measured length."""
        return max(self.shares)

    @property
    def mean(self) -> float:
        """The mean prompt length of the plan, in tokens."""
        return math.fsum(length * share for length, share in self.shares.items())


def cover_lengths(recorded: Sequence[tuple[int, int]], measured: Sequence[int]) -> Coverage:
    """The shares of measured prompt lengths that stand for recorded ones, pairs with counts.

    A length between two measured ones counts partly as each of them, so that the mean length stays
    the same: the plan interpolates times linearly in the prompt length, as it does in the load. A
    length below the shortest measured one counts as that one, which takes longer. A length above
    the longest one counts as that one, which takes less time, so its request counts as missing.
    """
    lengths = sorted(measured)
    counts = dict.fromkeys(lengths, 0.0)
    beyond = 0
    for length, count in recorded:
        within = min(max(length, lengths[0]), lengths[-1])
        above = next(each for each in lengths if each >= within)
        below = max(each for each in lengths if each <= within)
        upper = 0.0 if above == below else (within - below) / (above - below)
        counts[above] += count * upper
        counts[below] += count * (1 - upper)
        beyond += count * max(0, length - lengths[-1])
    total = sum(count for _, count in recorded)
    return Coverage(
        {length: count / total for length, count in counts.items()},
        sum(count for length, count in recorded if length > lengths[-1]) / total,
        beyond / sum(length * count for length, count in recorded),
    )


def allowed_in_flight(curves: LatencyCurves, seconds: Rows, slo: Slo) -> list[int]:
    """For each prompt length, the highest number of requests in flight that meets the SLO.

    `seconds` are the seconds per request, one of the rows of `curves`: they decide on the token
    rate. The limits of `slo` on latencies are held against the median latencies.
    """
    limits = (
        (seconds, curves.output_len / slo.tokens_per_s_per_user),
        (curves.ttft, slo.ttft_s),
        (curves.e2el, slo.e2el_s),
        (curves.tpot, slo.tpot_s),
        (curves.itl_max, slo.itl_s),
    )
    allowed = [
        _allowed(rows, curves.shares, limit_s)
        for rows, limit_s in limits
        if rows is not None and limit_s is not None
    ]
    return [min(each) for each in zip(*allowed, strict=True)]


def _allowed(rows: Rows, shares: Sequence[float], limit_s: float) -> list[int]:
    """For each prompt length, the highest number of requests in flight within a limit.

    Requests of all lengths share each step of the engine. So with n in flight, a request of length
    i takes T_mix(n) + T_i(1) - T_mix(1): the time of the mean request with n in flight, and what
    this length takes more when it is alone. A simulation of the steps shows how far that holds
    (docs/statistics.md).
    """
    mixed = weighted_mean(rows, shares)
    return [max_in_flight([mean + (row[0] - mixed[0]) for mean in mixed], limit_s) for row in rows]


def weighted_mean(rows: Rows, shares: Sequence[float]) -> list[float]:
    """The mean of `rows` at 1, 2, … requests in flight, by the shares of the prompt lengths."""
    return [
        sum(value * share for value, share in zip(values, shares, strict=True))
        for values in zip(*rows, strict=True)
    ]


def _time_scale(cells: pd.DataFrame) -> float:
    """By which factor the times of a deployment's cells differ from real time; 1 if measured."""
    known = cells["time_scale"].iloc[0]
    return 1.0 if pd.isna(known) else float(known)


def _seconds(by_length: Sequence[pd.DataFrame], column: str, limit: int) -> Rows | None:
    """Seconds per request, from a column of seconds per 100 output tokens; see `_latencies`."""
    return _latencies(by_length, column, limit, float(by_length[0]["output_len"].iloc[0]) / 100)


def _latencies(
    by_length: Sequence[pd.DataFrame], column: str, limit: int, factor: float = 1.0
) -> Rows | None:
    """Non-decreasing seconds × `factor` at 1, 2, … `limit` in flight, one row per prompt length.

    None if the column is not known for every cell. Older tables lack columns.
    """
    if any(column not in cells or cells[column].isna().any() for cells in by_length):
        return None
    rows = []
    for cells in by_length:
        real = factor / _time_scale(cells)
        fitted = isotonic_fit([float(value) * real for value in cells[column]])
        rows.append(Curve(tuple(cells["in_flight"]), tuple(fitted)).interpolated()[:limit])
    return rows


def _joules(
    by_length: Sequence[pd.DataFrame], shares: Sequence[float], limit: int
) -> Sequence[float] | None:
    column = "energy_j_per_output_token"
    if any(cells[column].isna().any() for cells in by_length):
        return None
    curves = [
        Curve(tuple(cells["in_flight"]), tuple(cells[column].astype(float))) for cells in by_length
    ]
    return weighted_mean([curve.interpolated()[:limit] for curve in curves], shares)
