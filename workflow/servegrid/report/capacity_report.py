"""The capacity plan as Markdown, for people without a browser. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from servegrid.analysis import rule_of_thumb
from servegrid.analysis.capacity import Demand, Hardware
from servegrid.analysis.titles import load_title
from servegrid.report.markup import as_markdown

HEAD = (
    *("deployment", "prompt tokens", "in flight", "users carried", "half too slow"),
    *("replicas", "GPUs", "price", "price per token/s"),
    *("price per 10⁶ tokens", "energy per 10⁶ tokens"),
)

NOTHING = (
    "Nothing that users could be planned from was measured: it takes a burst or a steady load."
)

METHOD = """\
In flight: requests at once that one replica gives the wanted speed, whatever their prompt length.
Users carried: those of one replica whose requests get it, by the machine repairman's model with a
server whose speed depends on its load, [all times at the ends of their 95% intervals at once]. A
replica is given nine tenths of them, by the slow end where that is known; users are split evenly
among replicas. Half too slow: the users of a replica at which only half of the requests get the
speed, so near is the fall. Between measured loads times are linear, above the highest nothing is
assumed. Prompt lengths come mixed; how they slow each other down is not measured."""


BIONIC_TAKEN = """\
Taken for this: a system gives its tokens/s whatever the number of requests, as the source does not
say at which it was measured; two systems give twice as many; a system without a price is left
out."""


def page(plan: pd.DataFrame, demand: Demand, hardware: Hardware) -> str:
    """The plan, a table of `columns.PLAN`, with its assumptions and what it does not know."""
    blocks = ["# Capacity plan", _assumptions(demand, hardware)]
    for (protocol, output_len), own in plan.groupby(["protocol", "output_len"], sort=False):
        workload = load_title(str(protocol), int(str(output_len)))
        blocks += [f"## {workload.capitalize()}", as_markdown(table(own)).rstrip()]
    if plan.empty:
        blocks.append(NOTHING)
    if plan["emulated"].any():
        blocks.append("Emulated: no hardware was measured for the deployments marked so.")
    return "\n\n".join([*blocks, _method(demand)]) + "\n"


def rule_of_thumb_page() -> str:
    """Bionic's table and conclusion as Markdown, from its own figures."""
    head = ["10⁹ parameters", "hardware", "tokens/s", "USD", "USD per token/s", "for 50 tokens/s"]
    rows = [
        (
            str(row["params_b"]),
            str(row["hardware"]),
            f"{row['output_tokens_per_s']:g}",
            _number(row["price_usd"]),
            _number(row["usd_per_token_per_s"]),
            f"{row['needed']} × = {_number(row['usd'])} USD"
            if pd.notna(row["usd"])
            else f"{row['needed']} ×",
        )
        for row in rule_of_thumb.systems().to_dict("records")
    ]
    told = [f"- {text}" for _, text in rule_of_thumb.conclusion().values()]
    title = "# Bionic's sizing for 1000 users, 2023"
    listed = as_markdown(pd.DataFrame(rows, columns=head)).rstrip()
    return "\n\n".join([title, listed, "\n".join(told), BIONIC_TAKEN])


def _assumptions(demand: Demand, hardware: Hardware) -> str:
    prompts = "all measured prompt lengths in equal parts"
    if demand.input_len is not None:
        prompts = f"prompts of about {demand.input_len} tokens"
    elif demand.prompt_mix is not None:
        whole = sum(demand.prompt_mix.values())
        parts = (f"{share / whole:.3g} of {length}" for length, share in demand.prompt_mix.items())
        prompts = f"prompts of several lengths, {', '.join(parts)} tokens"
    return (
        f"{demand.users} registered users, of whom {demand.logged_in:.4g} are logged in at the "
        f"busiest time ({demand.at_once}); {demand.think_time_s:g} s on average between an answer and "
        f"the same user's next request; {prompts}. {100 * demand.slo_attainment:g}% of the requests "
        f"are to get {demand.tokens_per_s_per_user:g} output tokens/s, the time for the prompt "
        f"included. Prices are of GPUs alone, in {hardware.currency}."
    )


def table(own: pd.DataFrame) -> pd.DataFrame:
    """Rows of a plan as texts."""
    return pd.DataFrame([_row(row) for row in own.to_dict("records")], columns=list(HEAD))


def _row(row: Mapping[Any, Any]) -> list[str]:
    name = f"{row['deployment']}{' (emulated)' if row['emulated'] else ''}"
    if not pd.isna(row["reason"]):
        return [name, f"– ({row['reason']})", *["–"] * (len(HEAD) - 2)]
    least = "at least " if row["is_lower_bound"] else ""
    around = ""
    if not pd.isna(row["users_carried_low"]):
        around = f" [{row['users_carried_low']}, {row['users_carried_high']}]"
    figures = ("replicas", "gpus", "purchase", "purchase_per_token_per_s")
    costs = ("purchase_per_million_tokens", "energy_cost_per_million_tokens")
    return [
        name,
        str(row["prompt_tokens"]),
        f"{least}{row['max_in_flight']}",
        f"{least}{row['users_carried']}{around}",
        f"{least}{row['users_at_50pct_slo']}",
        *(_number(row[figure]) for figure in (*figures, *costs)),
    ]


def _method(demand: Demand) -> str:
    rule = rule_of_thumb.in_flight(demand.users, demand.logged_in)
    return (
        f"{METHOD}\n\n"
        f"A rule of thumb (Bionic, 2023) counts a tenth of those logged in as active: "
        f"{rule.mean:g} requests in flight on average, by chance up to {rule.p95} in 95% and up to "
        f"{rule.p99} in 99% of the time."
    )


def _number(value: Any) -> str:
    """Three digits, or all before the point.

    >>> [_number(each) for each in (None, 0.4567, 12345.6, 8.0)]
    ['–', '0.457', '12,346', '8']
    """
    if value is None or pd.isna(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
