"""The page of a study, or of published data, from its tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from servegrid.analysis.caching_comparison import compare_caching
from servegrid.analysis.capacity import Demand, HardwarePrices
from servegrid.analysis.engine_comparison import compare_engines
from servegrid.analysis.findings import compute_frontier, describe_findings
from servegrid.analysis.plan import DeploymentPlan
from servegrid.analysis.published import (
    compare_with_published,
    describe_comparison,
    method_differences,
    published_summary,
)
from servegrid.analysis.review import DeploymentReview
from servegrid.analysis.setting_comparison import Settings, compare_settings
from servegrid.analysis.slo import Slo
from servegrid.analysis.titles import deployment_titles, hardware_title, workload_title
from servegrid.reference.published import PublishedData
from servegrid.report.capacity_basis import describe_basis
from servegrid.report.findings_report import frontier_table
from servegrid.report.page import FormField, PageTexts, Section, render_html, sections
from servegrid.report.page.payload import build_payload, count_results, list_workloads
from servegrid.study.grid import CONCURRENCY_PROTOCOLS
from servegrid.study.text import pluralize

FILES = (
    ("../tables/cells.parquet", "one row per cell and trial, with units and meanings"),
    ("../tables/cells.csv", "the same as CSV"),
    ("../tables/summary.parquet", "one row per cell: medians over trials with 95% intervals"),
    ("../tables/summary.csv", "the same as CSV"),
    ("../tables/capacity.md", "the capacity plan under the study's assumptions"),
    ("../tables/findings.md", "the findings and the frontier"),
    ("../tables/slo.md", "attainment and goodput of each cell, and saturation"),
    ("../tables/drift_checks.csv", "the drift checks of each allocation"),
)
PUBLISHED_FILE = ("../tables/published.md", "the comparison with published data")


@dataclass(frozen=True)
class StudyResults:
    """The content of a study's page.

    `cells`, `summary`, `frontier` and `pairs` are tables of `columns.CELLS`, `SUMMARY`, `FRONTIER`
    and `PUBLISHED_COMPARISON`. `slo` is the SLO of the frontier. `published` is None if the study
    names no published data. `prompts` are the kinds of prompts of the trials, and `allocations` the
    environments of `provenance.describe_allocations`. `attainment` and `saturation` are tables of
    `columns.SLO` and `SATURATION`, for the `slo_classes`; None if they are not known.
    `settings` are those of the deployments that come from a sweep.
    """

    cells: pd.DataFrame
    summary: pd.DataFrame
    frontier: pd.DataFrame
    pairs: pd.DataFrame
    slo: Slo
    published: PublishedData | None
    prompts: Sequence[str]
    allocations: Sequence[Mapping[str, Any]]
    slo_classes: Mapping[str, Slo] = field(default_factory=dict)
    attainment: pd.DataFrame | None = None
    saturation: pd.DataFrame | None = None
    settings: Settings = field(default_factory=dict)
    outcomes: Sequence[tuple[DeploymentPlan, DeploymentReview]] = ()
    """The plans of deployments with finished cells, made from the package's tables alone."""


def render_study_page(
    name: str, results: StudyResults, demand: Demand, hardware: HardwarePrices
) -> str:
    """The page of the study `name` as HTML."""
    cells, summary = results.cells, results.summary
    titles = deployment_titles(cells)
    published = _published_sections(results, titles)
    latency_files = [
        (f"../tables/{deployment}.md", f"seconds per 100 tokens of {title}")
        for deployment, title in titles.items()
    ]
    return render_html(
        build_payload(
            *(name, summary, cells, results.pairs, demand, hardware),
            slo_classes=results.slo_classes,
            attainment=results.attainment,
        ),
        PageTexts(
            summary=sections.summary_sentence(count_results(summary, cells), cells),
            reset="Reset to the study's assumptions",
            footer="The data come from the records of the study.",
            basis=describe_basis(demand, hardware),
        ),
        form_fields(summary, demand, hardware, list(results.slo_classes)),
        [
            sections.findings_section(
                describe_findings(summary, results.frontier, results.slo, titles),
                frontier_table(results.frontier, titles),
                results.slo,
            ),
            *_slo_sections(results, titles),
            *published,
            *([sections.plan_section(results.outcomes, titles)] if results.outcomes else []),
            sections.engines_section(compare_engines(summary, cells)),
            *_settings_sections(results),
            *_caching_sections(results, titles),
            sections.validity_section(cells),
            sections.provenance_section(results.allocations),
        ],
        [*FILES, *([PUBLISHED_FILE] if published else []), *latency_files],
    )


def render_published_page(
    published: PublishedData, slo: Slo, demand: Demand, hardware: HardwarePrices
) -> str:
    """The page of published data as HTML: curves, frontier and capacity plan."""
    summary = published_summary(published)
    cells = summary.assign(engine_version=None)
    titles = deployment_titles(cells)
    reach = compute_frontier(summary, slo)
    served = int((summary["trials_served"] > 0).sum())
    return render_html(
        build_payload(
            published.name, summary, cells, compare_with_published(summary, None), demand, hardware
        ),
        PageTexts(
            summary=f"{pluralize(len(titles), 'deployment')}, {pluralize(len(summary), 'cell')}: "
            f"{served} served. Published data, not measured by servegrid.",
            reset="Reset to the default assumptions",
            footer=f"The data come from: {published.source.citation}.",
            basis=describe_basis(demand, hardware),
        ),
        form_fields(summary, demand, hardware),
        [
            sections.findings_section(
                describe_findings(summary, reach, slo, titles), frontier_table(reach, titles), slo
            ),
            sections.source_section(published.source.citation, published.source.method),
        ],
        [],
    )


def _slo_sections(results: StudyResults, titles: Mapping[str, str]) -> list[Section]:
    if results.attainment is None or results.saturation is None:
        return []
    return [sections.slo_section(results.attainment, results.saturation, titles)]


def _settings_sections(results: StudyResults) -> list[Section]:
    if not results.settings:
        return []
    return [sections.settings_section(compare_settings(results.cells, results.settings))]


def _caching_sections(results: StudyResults, titles: Mapping[str, str]) -> list[Section]:
    compared = compare_caching(results.summary, results.cells, titles)
    return [] if compared.empty else [sections.caching_section(compared)]


def _published_sections(results: StudyResults, titles: Mapping[str, str]) -> list[Section]:
    if results.published is None:
        return []
    return [
        sections.published_section(
            results.published.source.citation,
            describe_comparison(results.pairs, titles),
            method_differences(results.cells, results.prompts, results.published),
        )
    ]


def form_fields(
    summary: pd.DataFrame,
    demand: Demand,
    hardware: HardwarePrices,
    slo_classes: Sequence[str] = (),
) -> list[FormField]:
    """The assumptions that the reader can change. Empty if no workload has a number of users.

    `slo_classes` are the names of the study's SLO classes.
    """
    closed = [
        (index, workload_title(*workload))
        for index, workload in enumerate(list_workloads(summary))
        if workload[0] in CONCURRENCY_PROTOCOLS
    ]
    if not closed:
        return []
    lengths = sorted(int(length) for length in summary["input_len"].unique())
    prompts: list[tuple[Any, str]] = [("", "all measured lengths, in equal shares")]
    prompts += [("prompt_mix", "the study's prompt mix")] if demand.prompt_mix else []
    if demand.recorded is not None:
        prompts += [("recorded", f"the lengths of the {demand.recorded.kind}")]
    prompts += [(length, str(length)) for length in lengths]
    chosen = demand.input_len or ("prompt_mix" if demand.prompt_mix else "")
    chosen = chosen or ("recorded" if demand.recorded is not None else "")
    currency = hardware.currency
    return [
        *_user_fields(demand),
        *(
            [
                FormField(
                    "slo_class",
                    "SLO class: sets the limits below",
                    demand.slo_class,
                    choices=[(name, name) for name in slo_classes],
                )
            ]
            if len(slo_classes) > 1
            else []
        ),
        FormField(
            "tokens_per_s_per_user",
            "SLO: output tokens/s per user",
            _text(demand.tokens_per_s_per_user),
            0.01,
        ),
        FormField(
            "ttft_s", "SLO: median time to first token, s", _text(demand.ttft_s), 0, required=False
        ),
        FormField(
            "e2el_s", "SLO: median end-to-end latency, s", _text(demand.e2el_s), 0, required=False
        ),
        FormField(
            "tpot_s",
            "SLO: median time per output token, s",
            _text(demand.tpot_s),
            0,
            required=False,
        ),
        FormField(
            "itl_s",
            "SLO: longest inter-token latency of a request (median), s",
            _text(demand.itl_s),
            0,
            required=False,
        ),
        FormField(
            "slo_attainment",
            "Requests that must meet the SLO, %",
            _text(100 * demand.slo_attainment),
            1,
            99.999,
        ),
        FormField("input_len", "Prompt tokens", chosen, choices=prompts),
        FormField("plan_workload", "Measured workload", closed[0][0], choices=closed),
        *(
            FormField(
                f"price:{gpu}",
                _price_label(gpu, currency),
                _text(hardware.prices.get(gpu)),
                required=False,
            )
            for gpu in sorted(str(gpu) for gpu in summary["gpu"].unique())
        ),
        FormField(
            "electricity_per_kwh",
            f"Electricity, {currency} per kWh",
            _text(hardware.electricity_per_kwh),
            required=False,
        ),
        FormField(
            "years_in_use", "Years in use", _text(hardware.years_in_use), 0.01, required=False
        ),
    ]


def _user_fields(demand: Demand) -> list[FormField]:
    """How much the users send. The label says what comes from recorded users."""
    recorded = demand.recorded
    users = [
        FormField("users", "Registered users", demand.users, minimum=1, step="1"),
        FormField(
            "logged_in",
            "Logged in at the busiest time, %",
            _text(100 * demand.logged_in),
            0.001,
            100,
        ),
    ]
    if demand.requests_per_s is not None:
        label = "Requests/s at the busiest time (from the trace)"
        users = [FormField("requests_per_s", label, _text(demand.requests_per_s), 1e-6)]
    think = FormField(
        "think_time_s",
        "Think time between response and next request, s"
        + (" (from the trace)" if recorded and recorded.think_time_s is not None else ""),
        _text(demand.think_time_s),
        0.001 if recorded else 0.1,
        7200,
    )
    if demand.cycle_s is not None:
        label = "Time from a request to the user's next one, s (from the trace)"
        think = FormField("cycle_s", label, _text(demand.cycle_s), 0.001, 7200)
    load_factor = FormField(
        "load_factor",
        "Load factor: mean load / load at the busiest time, %"
        + (" (from the trace)" if recorded and recorded.load_factor is not None else ""),
        _text(100 * demand.load_factor),
        min(0.1, 100 * demand.load_factor),
        100,
    )
    return [*users, think, load_factor]


def _price_label(gpu: str, currency: str) -> str:
    if gpu == "cpu":
        return f"Price of a machine without a GPU, {currency}"
    return f"Price of one {hardware_title(gpu, 1).removeprefix('1 × ')}, {currency}"


def _text(value: float | None) -> str:
    """A number as a person types it. Empty if it is not known."""
    return "" if value is None else f"{value:.10g}"
