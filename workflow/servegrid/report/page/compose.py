"""The page of a study from its tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from servegrid.analysis import published
from servegrid.analysis.capacity import CLOSED, Demand, Hardware
from servegrid.analysis.engine_comparison import compared
from servegrid.analysis.findings import Slo, statements
from servegrid.analysis.titles import deployment_titles, hardware_title, load_title
from servegrid.report import findings_report
from servegrid.report.page import Field, parts, render
from servegrid.report.page.payload import counts_of, payload_of

FILES = (
    ("../tables/cells.parquet", "one row per cell and trial, with units and meanings"),
    ("../tables/cells.csv", "the same as text"),
    ("../tables/summary.parquet", "one row per cell: medians over trials with 95% intervals"),
    ("../tables/summary.csv", "the same as text"),
    ("../tables/capacity.md", "the capacity plan under the study's own assumptions"),
    ("../tables/findings.md", "what was found, and the frontier"),
    ("../tables/published.md", "measured cells beside published ones"),
    ("../tables/sentinels.csv", "the load that was repeated to watch each node"),
)


@dataclass(frozen=True)
class Found:
    """What the page shows: tables of `columns.CELLS`, `SUMMARY`, `FRONTIER` and `BESIDE`, with the
    SLO of the frontier, what differs from the published study, and the environments of
    `provenance.allocations`."""

    cells: pd.DataFrame
    summary: pd.DataFrame
    frontier: pd.DataFrame
    beside: pd.DataFrame
    slo: Slo
    differences: Sequence[str]
    allocations: Sequence[Mapping[str, Any]]


def page(name: str, found: Found, demand: Demand, hardware: Hardware) -> str:
    """The page of the study `name` as text."""
    cells, summary = found.cells, found.summary
    counts, titles = counts_of(summary, cells), deployment_titles(cells)
    tables = [
        (f"../tables/{deployment}.md", f"seconds per 100 tokens of {title}")
        for deployment, title in titles.items()
    ]
    return render(
        payload_of(name, summary, cells, found.beside, demand, hardware),
        parts.counts_text(counts, cells),
        fields(summary, demand, hardware),
        [
            parts.findings(
                statements(summary, found.frontier, found.slo, titles),
                findings_report.frontier_table(found.frontier, titles),
                found.slo,
            ),
            parts.beside(
                published.statements(found.beside, titles), found.differences, found.beside.empty
            ),
            parts.engines(compared(summary, cells)),
            parts.verdicts(cells),
            parts.provenance(found.allocations),
        ],
        [*FILES, *tables],
    )


def fields(summary: pd.DataFrame, demand: Demand, hardware: Hardware) -> list[Field]:
    """The assumptions that can be changed; none where no load was one of users."""
    workloads = list(summary[["protocol", "output_len"]].drop_duplicates().itertuples(index=False))
    closed = [
        (place, load_title(*workload))
        for place, workload in enumerate(workloads)
        if workload[0] in CLOSED
    ]
    if not closed:
        return []
    lengths = sorted(int(length) for length in summary["input_len"].unique())
    prompts: list[tuple[Any, str]] = [("", "all that were measured, in equal parts")]
    prompts += [("prompt_mix", "in the study's shares")] if demand.prompt_mix else []
    prompts += [(length, str(length)) for length in lengths]
    chosen = demand.input_len or ("prompt_mix" if demand.prompt_mix else "")
    gpus = sorted(str(gpu) for gpu in summary["gpu"].unique())
    money = hardware.currency
    return [
        Field("users", "Registered users", demand.users, least=1, step="1"),
        Field("logged_in", "Of these logged in, %", number(100 * demand.logged_in), 0.001, 100),
        Field(
            "think_time_s",
            "Seconds between answer and next request",
            number(demand.think_time_s),
            0.1,
            7200,
        ),
        Field(
            "tokens_per_s_per_user",
            "Tokens/s that each gets",
            number(demand.tokens_per_s_per_user),
            0.01,
        ),
        Field(
            "slo_attainment",
            "Share of requests that get it, %",
            number(100 * demand.slo_attainment),
            1,
            99.999,
        ),
        Field("input_len", "Prompt tokens", chosen, choices=prompts),
        Field("plan_load", "Measured load", closed[0][0], choices=closed),
        *(
            Field(
                f"price:{gpu}",
                f"Price of a machine without GPU, {money}"
                if gpu == "cpu"
                else f"Price of one {hardware_title(gpu, 1).removeprefix('1 × ')}, {money}",
                number(hardware.prices.get(gpu)),
                needed=False,
            )
            for gpu in gpus
        ),
        Field(
            "electricity_per_kwh",
            f"Electricity, {money} per kWh",
            number(hardware.electricity_per_kwh),
            needed=False,
        ),
        Field("years_in_use", "Years in use", number(hardware.years_in_use), 0.01, needed=False),
    ]


def number(value: float | None) -> str:
    """As it is typed: no digits that say nothing, and empty where it is not known."""
    return "" if value is None else f"{value:.10g}"
