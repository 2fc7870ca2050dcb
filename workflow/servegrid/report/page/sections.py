"""The sections of the page that consist of sentences and tables. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from servegrid.analysis import caching_comparison
from servegrid.analysis.feasibility import CANNOT, FITS, QUEUES, UNKNOWN
from servegrid.analysis.plan import DeploymentPlan
from servegrid.analysis.review import DeploymentReview
from servegrid.analysis.slo import Slo
from servegrid.analysis.titles import deployment_titles
from servegrid.records.verdict import NOT_RUN, SERVED
from servegrid.report import goodput_report
from servegrid.report.findings_report import (
    NO_FINDINGS,
    NOT_COMPARABLE,
    PUBLISHED_TITLE,
    frontier_caption,
    published_caption,
)
from servegrid.report.page import Section, SectionTable
from servegrid.study.deployment import CPU
from servegrid.study.text import format_count, pluralize

MAX_SURPRISES = 10
"""Maximum outlooks that did not come true on the page. `servegrid plan --review` shows all."""
MAX_ROWS = 200
"""Maximum rows of a table on the page. The files next to the page contain all rows."""

_MAX_EVIDENCE = 180
"""Maximum characters of evidence in a table."""


def summary_sentence(counts: Mapping[str, int], cells: pd.DataFrame) -> str:
    """One sentence with the numbers of `payload.count_results`."""
    if not counts["trials"]:
        return "Nothing has been measured yet."
    kinds = pluralize(cells["gpu"].nunique(), "kind")
    return (
        f"{pluralize(counts['deployments'], 'deployment')} on {kinds} of hardware; "
        f"{pluralize(counts['cells'], 'cell')} in {pluralize(counts['trials'], 'trial')} with "
        f"{pluralize(counts['requests'], 'request')}. {pluralize(counts['served'], 'cell')} "
        f"served, {format_count(counts['valid'])} valid."
    )


def findings_section(statements: Sequence[str], frontier: pd.DataFrame, slo: Slo) -> Section:
    """The sentences of `findings.describe_findings`, and the frontier as texts."""
    if not statements:
        return Section("findings", "Findings", [NO_FINDINGS])
    table = frame_table(frontier_caption(slo), frontier)
    return Section("findings", "Findings", points=statements, tables=[table])


def slo_section(
    attainment: pd.DataFrame, saturation: pd.DataFrame, titles: Mapping[str, str]
) -> Section:
    """Attainment, goodput and saturation: tables of `columns.SLO` and `SATURATION`."""
    table = frame_table(
        f"{goodput_report.CAPTION} {goodput_report.INVALID}",
        goodput_report.slo_texts(attainment, titles),
    )
    points = [
        *goodput_report.describe_classes(attainment),
        *goodput_report.describe_saturation(saturation, titles),
    ]
    return Section("slo", "SLO attainment and goodput", points=points, tables=[table])


def published_section(
    citation: str, statements: Sequence[str], differences: pd.DataFrame
) -> Section:
    """The comparison with published data: ratios in sentences, and differences in method."""
    if not statements:
        return Section("published", PUBLISHED_TITLE, [NOT_COMPARABLE])
    paragraphs = [
        f"{published_caption(citation)} To see the ratio of each cell, select it as the metric of "
        "the heat map above."
    ]
    table = frame_table("Differences in method", differences)
    return Section("published", PUBLISHED_TITLE, paragraphs, statements, [table])


def engines_section(ratios: pd.DataFrame) -> Section:
    """The comparison of engines, a table of `engine_comparison.compared`."""
    title = "Comparison of engines"
    if ratios.empty:
        text = "No model was served by two engines on the same hardware."
        return Section("engines", title, [text])
    caption = (
        "Second deployment divided by first: median, minimum and maximum over the cells that both "
        "served. Better is a ratio of times below 1, or a ratio of tokens/s above 1."
    )
    return Section("engines", title, tables=[frame_table(caption, ratios)])


def settings_section(ratios: pd.DataFrame) -> Section:
    """What each setting is worth, a table of `setting_comparison.compare_settings`."""
    title = "What each setting is worth"
    if ratios.empty:
        return Section(
            "settings", title, ["No two values of a setting have a valid cell in common."]
        )
    caption = (
        "Output tokens/s of two deployments that differ in one setting: second divided by first, "
        "over the cells that both served, with the 95% interval over bring-ups. At a request rate, "
        "and if users think, they are the tokens/s of one request. With one bring-up "
        "of either, there is no interval and no verdict. Cells whose requests waited in the server "
        "count too, because a setting can be the reason. The capacity plan above ranks the "
        "deployments."
    )
    return Section("settings", title, tables=[frame_table(caption, ratios)])


def caching_section(compared: pd.DataFrame) -> Section:
    """Prefix caching off and on, a table of `caching_comparison.compare_caching`."""
    table = frame_table(caching_comparison.CAPTION, compared)
    return Section("caching", "Prefix caching off and on", tables=[table])


def plan_section(
    outcomes: Sequence[tuple[DeploymentPlan, DeploymentReview]], titles: Mapping[str, str]
) -> Section:
    """What was expected of each deployment, and what came of it."""
    title = "Plan and outcome"
    head = [
        *("deployment", "fit", "will queue", "cannot work", "predicted / measured"),
        *("error, median / p90", "in interval", "measured / bound"),
    ]
    rows = [
        [titles[plan.deployment.name], *_outcome_texts(plan, review)] for plan, review in outcomes
    ]
    caption = (
        "How many cells the plan expected to fit, to queue or not to work. Predicted / measured: "
        "seconds per 100 tokens, predicted from published tables alone (medians; the 95% interval "
        "should contain 95% of the trials). An error of 100% is a factor of 2, in either "
        "direction. Measured / bound: seconds over the least that the hardware allows."
    )
    paragraphs = [
        'To see the cells of a deployment, select "measured / lower bound" or "measured / '
        'predicted" as the metric of the heat map above. A dash: the tables do not know the '
        "model or the hardware, or there is no strict bound (CPU)."
    ]
    surprises = [
        f"{titles[each.deployment]}: {text.removesuffix('.')}."
        for _, each in outcomes
        for text in each.surprises
    ]
    return Section(
        "plan", title, paragraphs, surprises[:MAX_SURPRISES], [_table(caption, head, rows)]
    )


def _outcome_texts(plan: DeploymentPlan, review: DeploymentReview) -> list[str]:
    counts = Counter(cell.outlook.status for cell in plan.cells)
    outlooks = [str(counts[status]) for status in (FITS, QUEUES, CANNOT)]
    if counts[UNKNOWN]:
        outlooks = ["–"] * 3
    predicted = ["–"] * 3
    # The number of a CPU's cores is not recorded.
    if review.median_ratio is not None and plan.deployment.gpu != CPU:
        predicted = [
            f"{review.median_ratio:.2f}",
            f"{review.median:.0f}% / {review.p90:.0f}%",
            f"{review.covered} of {review.cells}",
        ]
    return [*outlooks, *predicted, "–" if review.over_bound is None else f"{review.over_bound:.2f}"]


def validity_section(cells: pd.DataFrame) -> Section:
    """Verdicts of the trials, and the rules of validity that they break."""
    titles = deployment_titles(cells)
    is_served = cells["verdict"].isin(SERVED)
    served = int(is_served.sum())
    paragraphs = [
        f"{format_count(served)} of {pluralize(len(cells), 'trial')} served, "
        f"{format_count(int(cells['valid'].eq(True).sum()))} valid."
    ]
    skipped = int((cells["verdict"] == NOT_RUN).sum())
    if skipped:
        paragraphs[0] = f"{paragraphs[0]} {pluralize(skipped, 'trial')} not run."
    failed = cells[~is_served]
    # Each reason for not_run is a row: a cell that ran out of memory can be named there only.
    reasons = failed["verdict_detail"].where(failed["verdict"] == NOT_RUN).fillna("")
    groups = failed.groupby(["deployment", "verdict", reasons], sort=False)
    rows = [
        (titles[str(name)], str(verdict), str(len(trials)), _shorten(trials["verdict_detail"]))
        for (name, verdict, _), trials in groups
    ]
    broken = Counter(
        (str(name), rule)
        for name, rules in cells[["deployment", "invalid_rules"]].dropna().itertuples(index=False)
        for rule in rules
    )
    broken_rows = [(titles[name], rule, str(count)) for (name, rule), count in broken.items()]
    tables = []
    if rows:
        head = ["deployment", "verdict", "trials", "evidence (first trial)"]
        tables.append(_table("Trials that were not served or not run", head, rows))
    if broken_rows:
        head = ["deployment", "broken rule", "trials"]
        tables.append(_table("Trials that are not valid, by rule of validity", head, broken_rows))
    else:
        paragraphs.append("No trial breaks a rule of validity.")
    return Section("validity", "Verdicts and validity", paragraphs, tables=tables)


def provenance_section(allocations: Sequence[Mapping[str, Any]]) -> Section:
    """The environment of each allocation, from `provenance.describe_allocations`."""
    head = [
        *("deployment", "engine", "node", "CPU", "GPUs", "driver", "Python", "servegrid"),
        "started",
    ]
    rows = [[str(each.get(key) or "–") for key in head] for each in allocations]
    paragraphs = [] if rows else ["No record describes an environment."]
    tables = [_table("Environment of each allocation", head, rows)] if rows else []
    return Section("provenance", "Provenance", paragraphs, tables=tables)


def source_section(citation: str, method: Mapping[str, str]) -> Section:
    """Where published data come from, and what is known about their measurement."""
    points = [f"{aspect.capitalize()}: {text}." for aspect, text in method.items()]
    return Section(
        "source",
        "Source",
        [
            f"Published: {citation}. servegrid did not measure these values. The rules of "
            "validity cannot be checked, because there are no records of requests."
        ],
        points,
    )


def frame_table(caption: str, frame: pd.DataFrame) -> SectionTable:
    """A table of the page from a frame whose cells are texts."""
    return _table(caption, list(frame.columns), [list(map(str, row)) for row in frame.to_numpy()])


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> SectionTable:
    left_out = len(rows) - MAX_ROWS
    note = f"{left_out} more rows are in the files below." if left_out > 0 else ""
    return SectionTable(caption, head, rows[:MAX_ROWS], note)


def _shorten(details: pd.Series[Any]) -> str:
    known = details.dropna()
    if known.empty:
        return "–"
    text = " ".join(str(known.iloc[0]).split())
    return text if len(text) <= _MAX_EVIDENCE else text[:_MAX_EVIDENCE].rsplit(" ", 1)[0] + " …"
