"""Bionic's sizing for 1000 users: its rule, its table, and whether its conclusion follows. Pure.

Source: Bionic GPT's page on hardware for 1000 users, 2023. Its numbers are tokens per second of
complete systems from several sources. The page does not say at which concurrency they were
measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from scipy.stats import binom

from servegrid.reference import data

USERS, LOGGED_IN, ACTIVE, TOKENS_PER_S = 1000, 0.10, 0.10, 5.0
CONCLUSION_USD = 5000.0


@dataclass(frozen=True)
class ActiveUsers:
    """Users who wait for a response at the same time: the mean, and the 95% and 99% quantiles."""

    mean: float
    p95: int
    p99: int


def active_users(users: int = USERS, logged_in: float = LOGGED_IN) -> ActiveUsers:
    """Bionic's rule: a tenth of the users is logged in, and a tenth of these waits for a response.

    The rule gives a mean. If users are active independently, their number is binomial.
    """
    probability = logged_in * ACTIVE
    p95, p99 = (int(binom.ppf(level, users, probability)) for level in (0.95, 0.99))
    return ActiveUsers(users * probability, p95, p99)


def size_systems(active: float | None = None, tokens_per_s: float = TOKENS_PER_S) -> pd.DataFrame:
    """Bionic's table with the number of systems for `active` users who get `tokens_per_s` each.

    The default of `active` is the mean of Bionic's rule. The columns that are added: price per
    token/s (`usd_per_token_per_s`), the number of systems (`needed`) and their price (`usd`); null
    if the source gives no price. Two systems are assumed to have twice the tokens/s. Rows are
    sorted by model size and by price.
    """
    table = data.systems().copy()
    wanted = (active_users().mean if active is None else active) * tokens_per_s
    table["usd_per_token_per_s"] = table["price_usd"] / table["output_tokens_per_s"]
    table["needed"] = [math.ceil(wanted / speed) for speed in table["output_tokens_per_s"]]
    table["usd"] = table["needed"] * table["price_usd"]
    return table.sort_values(["params_b", "usd"], ignore_index=True, na_position="last")


def check_conclusion() -> dict[int, tuple[bool, str]]:
    """Whether Bionic's numbers support its conclusion that about 5000 USD suffice for 1000 users.

    By model size in 10⁹ parameters: the answer, and a sentence. `About` means up to 10% more.
    """
    answers = {}
    wanted = active_users().mean * TOKENS_PER_S
    for params, systems in size_systems().groupby("params_b"):
        cheapest = systems.iloc[0]
        suffices = bool(cheapest["usd"] <= 1.1 * CONCLUSION_USD)
        count = "" if cheapest["needed"] == 1 else f"{cheapest['needed']} systems of "
        price = f"{cheapest['usd']:,.0f} USD"
        answers[int(str(params))] = (
            suffices,
            f"{params} billion parameters: {wanted:g} tokens/s need hardware for at least {price} "
            f"({count}{cheapest['hardware']}, {cheapest['output_tokens_per_s']:g} tokens/s each). "
            f"About {CONCLUSION_USD:,.0f} USD {'suffice' if suffices else 'do not suffice'}.",
        )
    return answers
