"""The capacity plan as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from servegrid.analysis import rule_of_thumb
from servegrid.analysis.capacity import Demand, HardwarePrices
from servegrid.analysis.titles import EARLY_STOP, stops_early, workload_title
from servegrid.report.capacity_basis import describe_basis
from servegrid.report.markup import as_markdown

HEAD = (
    "deployment",
    "prompt tokens",
    "max. requests in flight within SLO",
    "users per replica",
    "users at which 50% of requests meet the SLO",
    "replicas",
    "GPUs",
    "price",
    "price per token/s",
    "price per million tokens (at peak load)",
    "energy cost per million tokens",
)

RECORDED_HEAD = (
    "deployment",
    "requests/s that one replica carries",
    "requests/s per replica, at most",
    "mean response time, s (modelled)",
    "users at the busiest time",
    "mean prompt tokens of the plan",
    "requests beyond the longest measured prompt",
    "prompt tokens beyond it",
)

NO_USERS = (
    "There is no capacity plan: the study measured no burst and no closed loop, and a request rate "
    "has no number of users."
)

EARLY_STOP_NOTE = (
    "Outputs may stop early: these responses had fewer output tokens than requested. The plan "
    "assumes that every response has the requested number, each token in the measured time. "
    "Limits on end-to-end latency apply to the shorter responses that were measured, so they are "
    "easier to meet than with the requested number."
)

METHOD = """\
- **Max. requests in flight within SLO**: requests that one replica can process so that each \
of them meets the SLO, for every prompt length. Limits on latencies apply to the median.
- **Users per replica**: the most logged-in users at which the required share of requests meets \
the SLO. The model is a finite-population queue (machine repairman model). Its service rate \
depends on the number of requests in flight. For the range in brackets, all times are at the ends \
of their 95% intervals at once, so it is wider than a 95% interval. With a trace there is a \
request rate instead, and numbers of users follow by Little's law.
- **Users at which 50% of requests meet the SLO**: if this is close to the number of users per \
replica, a few more users slow down many requests.
- **Replicas**: each replica gets 90% of the users or requests/s that it can carry (of the low end \
of the range, if there is one), or 85% with prompts of several lengths. The load is split evenly \
among replicas.
- **Price per million tokens**: the price of the GPUs divided by the tokens that they produce in \
their years in use, with the mean load of a week. In brackets, as if the busiest time lasted all \
week.

Between two measured loads, times are interpolated linearly. Below the lowest measured load of a \
prompt length, its time counts. Nothing is assumed about loads above the highest measured one. \
Requests of all prompt lengths arrive mixed and share each step of the \
engine: others slow each request by the same number of seconds as the mean request."""


SPARSE_NOTE = """\
A search left out loads below measured ones: the plan takes the times of the measured ones there. \
A full grid (`grid: full`) can show more users and a lower price."""


BIONIC_ASSUMPTIONS = """\
Assumptions: a system has the same tokens/s at every concurrency, because the source does \
not say at which one it was measured. Two systems have twice the tokens/s. Systems without a \
price are left out."""


def render_capacity_report(
    plan: pd.DataFrame, demand: Demand, hardware: HardwarePrices, sparse: Sequence[str] = ()
) -> str:
    """The capacity plan, a table of `columns.CAPACITY_PLAN`, with its assumptions and method.

    `sparse` are the deployments of `summary.lacks_low_loads`.
    """
    blocks = ["# Capacity plan", _basis(demand, hardware)]
    for (protocol, output_len), rows in plan.groupby(["protocol", "output_len"], sort=False):
        workload = workload_title(str(protocol), int(str(output_len)))
        blocks += [f"## {workload.capitalize()}", as_markdown(capacity_table(rows)).rstrip()]
        if demand.recorded is not None and rows["replicas"].notna().any():
            blocks.append(as_markdown(_recorded_table(rows)).rstrip())
    if plan.empty:
        blocks.append(NO_USERS)
    if sparse:
        blocks.append(f"{SPARSE_NOTE} This concerns {', '.join(sparse)}.")
    if plan["emulated"].any():
        blocks.append("Emulated: these results do not come from hardware.")
    if stops_early(plan).any():
        blocks.append(EARLY_STOP_NOTE)
    note = [] if demand.requests_per_s is not None else [_rule_of_thumb_note(demand)]
    return "\n\n".join([*blocks, METHOD, *note]) + "\n"


def render_capacity_reports(
    plans: Sequence[pd.DataFrame],
    demands: Sequence[Demand],
    hardware: HardwarePrices,
    sparse: Sequence[str] = (),
) -> str:
    """The capacity plans of all SLO classes, each as if all users were of that class."""
    texts = [
        render_capacity_report(plan, demand, hardware, sparse)
        for plan, demand in zip(plans, demands, strict=True)
    ]
    if len(texts) == 1:
        return texts[0]
    headed = [
        text.replace("# Capacity plan\n", f"# Capacity plan, SLO class {demand.slo_class}\n", 1)
        for text, demand in zip(texts, demands, strict=True)
    ]
    return "\n".join(headed)


def caption(demand: Demand) -> str:
    """The caption of a plan as a table."""
    if demand.requests_per_s is None:
        return f"Capacity plan for {demand.users} users."
    return f"Capacity plan for {demand.requests_per_s:.3g} requests/s."


def render_rule_of_thumb() -> str:
    """Bionic's sizing table and conclusion as Markdown, from its own numbers."""
    head = ["10⁹ parameters", "hardware", "tokens/s", "USD", "USD per token/s", "for 50 tokens/s"]
    rows = [
        (
            str(row["params_b"]),
            str(row["hardware"]),
            f"{row['output_tokens_per_s']:g}",
            _format_number(row["price_usd"]),
            _format_number(row["usd_per_token_per_s"]),
            f"{row['needed']} × = {_format_number(row['usd'])} USD"
            if pd.notna(row["usd"])
            else f"{row['needed']} ×",
        )
        for row in rule_of_thumb.size_systems().to_dict("records")
    ]
    conclusions = [f"- {text}" for _, text in rule_of_thumb.check_conclusion().values()]
    title = "# Bionic's sizing for 1000 users, 2023"
    table = as_markdown(pd.DataFrame(rows, columns=head)).rstrip()
    return "\n\n".join([title, table, "\n".join(conclusions), BIONIC_ASSUMPTIONS])


def capacity_table(plan: pd.DataFrame) -> pd.DataFrame:
    """Rows of a table of `columns.CAPACITY_PLAN` as texts, with the columns HEAD."""
    return pd.DataFrame([_row(row) for row in plan.to_dict("records")], columns=list(HEAD))


def _basis(demand: Demand, hardware: HardwarePrices) -> str:
    """What is measured, and what is not, one list for each."""
    return "\n\n".join(
        "\n".join([f"{title}:", "", *(f"- {point}" for point in points)])
        for title, points in describe_basis(demand, hardware).items()
    )


def _recorded_table(plan: pd.DataFrame) -> pd.DataFrame:
    """How the planned rows stand for recorded users, as texts."""
    planned = plan[plan["replicas"].notna()]
    rows = [
        (
            str(row["deployment"]),
            _format_number(row["requests_per_s_carried"]),
            _format_number(row["requests_per_s_per_replica"]),
            _format_number(row["response_s_mean"]),
            _format_number(row["users_logged_in"]),
            _format_number(row["prompt_tokens_mean"]),
            _format_percent(row["requests_not_covered"]),
            _format_percent(row["prompt_tokens_not_covered"]),
        )
        for row in planned.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=list(RECORDED_HEAD))


def _row(row: Mapping[Any, Any]) -> list[str]:
    name = f"{row['deployment']}{' (emulated)' if row['emulated'] else ''}"
    if not row["output_len_exact"]:
        name += f" ({EARLY_STOP})"
    if not pd.isna(row["reason"]):
        return [name, f"– ({row['reason']})", *["–"] * (len(HEAD) - 2)]
    at_least = "at least " if row["max_in_flight_is_lower_bound"] else ""
    interval = ""
    if not pd.isna(row["users_carried_low"]):
        interval = f" [{row['users_carried_low']}, {row['users_carried_high']}]"
    figures = ("replicas", "gpus", "purchase", "purchase_per_token_per_s")
    per_million = _format_number(row["purchase_per_million_tokens"])
    if not pd.isna(row["purchase_per_million_tokens_at_peak"]):
        per_million += f" ({_format_number(row['purchase_per_million_tokens_at_peak'])})"
    return [
        name,
        str(row["prompt_tokens"]),
        f"{at_least}{row['max_in_flight']}",
        f"{at_least}{row['users_carried']}{interval}",
        f"{at_least}{row['users_at_50pct_slo']}",
        *(_format_number(row[figure]) for figure in figures),
        per_million,
        _format_number(row["energy_cost_per_million_tokens"]),
    ]


def _rule_of_thumb_note(demand: Demand) -> str:
    active = rule_of_thumb.active_users(demand.users, demand.logged_in)
    return (
        "For comparison, a rule of thumb (Bionic, 2023) counts a tenth of the logged-in users as "
        f"active: {active.mean:g} requests in flight on average, at most {active.p95} for 95% and "
        f"at most {active.p99} for 99% of the time (binomial)."
    )


def _format_percent(share: Any) -> str:
    return "–" if share is None or pd.isna(share) else f"{100 * share:.3g}%"


def _format_number(value: Any) -> str:
    """Three significant digits; from 100 on, whole numbers with thousands separators.

    >>> [_format_number(each) for each in (None, 0.4567, 12345.6, 8.0)]
    ['–', '0.457', '12,346', '8']
    """
    if value is None or pd.isna(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
