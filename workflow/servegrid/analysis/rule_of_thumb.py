"""Bionic's sizing for 1000 users: its rule, its table, and whether its conclusion follows. Pure.

Source: Bionic GPT's page on hardware for 1000 users, 2023. Its figures are tokens per second of
whole systems, found in several places; nothing in it says at which load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from servegrid.reference import data

USERS, LOGGED_IN, ACTIVE, TOKENS_PER_S = 1000, 0.10, 0.10, 5.0
CONCLUSION_USD = 5000.0


@dataclass(frozen=True)
class Quantiles:
    """Requests in flight if each user is active by chance alone: mean, and what is not exceeded in
    95% and 99% of the time."""

    mean: float
    p95: int
    p99: int


def in_flight(users: int = USERS, logged_in: float = LOGGED_IN) -> Quantiles:
    """Bionic's rule: a tenth of the users is logged in, and a tenth of these waits for an answer.

    It is a mean; the number at a moment is binomial.
    """
    share = logged_in * ACTIVE
    return Quantiles(users * share, quantile(users, share, 0.95), quantile(users, share, 0.99))


def quantile(trials: int, share: float, wanted: float) -> int:
    """The least number that a binomial one does not exceed with the chance `wanted`.

    In logarithms: of many users, the chance that none is active is too small for a float.
    """
    logarithm = trials * math.log1p(-share)
    below, successes = math.exp(logarithm), 0
    while below < wanted and successes < trials:
        logarithm += math.log((trials - successes) / (successes + 1) * share / (1 - share))
        successes += 1
        below += math.exp(logarithm)
    return successes


def systems(requests: float | None = None, tokens_per_s: float = TOKENS_PER_S) -> pd.DataFrame:
    """Its table with what follows: a row per system, the cheapest answer for each size first.

    `usd_per_token_per_s`, and what it takes to give so many requests at once their speed:
    `needed` systems and `usd`. Two systems are taken to give twice the tokens of one. Null where no
    price is given.
    """
    table = data.systems().copy()
    wanted = (in_flight().mean if requests is None else requests) * tokens_per_s
    table["usd_per_token_per_s"] = table["price_usd"] / table["output_tokens_per_s"]
    table["needed"] = [math.ceil(wanted / speed) for speed in table["output_tokens_per_s"]]
    table["usd"] = table["needed"] * table["price_usd"]
    return table.sort_values(["params_b", "usd"], ignore_index=True, na_position="last")


def conclusion() -> dict[int, tuple[bool, str]]:
    """Whether about 5000 USD suffice for 1000 users, by its own figures, for each size of model.

    About: up to a tenth more.
    """
    answers = {}
    wanted = in_flight().mean * TOKENS_PER_S
    for params, own in systems().groupby("params_b"):
        best = own.iloc[0]
        holds = bool(best["usd"] <= 1.1 * CONCLUSION_USD)
        count = "" if best["needed"] == 1 else f"{best['needed']} × "
        price = f"{best['usd']:,.0f} USD"
        answers[int(str(params))] = (
            holds,
            f"{params} billion parameters: {wanted:g} tokens/s cost at least {price} "
            f"({count}{best['hardware']}, {best['output_tokens_per_s']:g} tokens/s each), so that "
            f"about {CONCLUSION_USD:,.0f} USD {'suffice' if holds else 'do not suffice'}.",
        )
    return answers
