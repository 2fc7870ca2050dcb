"""The findings, the frontier and the comparison with published data as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from servegrid.analysis.caching_comparison import CAPTION
from servegrid.analysis.findings import format_max_within_slo, format_n_half
from servegrid.analysis.slo import Slo
from servegrid.analysis.titles import workload_title
from servegrid.report.latency_table import format_seconds
from servegrid.report.markup import as_markdown, bullets

NO_FINDINGS = "There are no findings: they need served cells of the protocol burst or closed_loop."

NO_PUBLISHED_DATA = (
    "This study is not compared with published data, because it does not name any. To compare it, "
    "set the key `published` of the study to the name of a data set or to the path of a CSV file."
)

NOT_COMPARABLE = (
    "No cell can be compared: the published data have no cell with the same model, quantization, "
    "GPUs, workload and prompt length as a valid cell of this study. Emulated cells are not "
    "compared, unless the study sets `allow_emulated_mix`."
)

PUBLISHED_TITLE = "Comparison with published data"


def frontier_caption(slo: Slo) -> str:
    """The caption of the frontier."""
    return (
        "Highest concurrency that was served, and most requests in flight with which users get "
        f"{slo}, interpolated between measured loads. In the last column, the number of requests "
        "in flight with which the throughput is half of its limit: n½ = a / b, if the time is "
        "a + b·n (– if no line fits). In brackets, the range if all times are at the ends of their "
        "95% intervals, and for n½ its 95% interval."
    )


def published_caption(citation: str) -> str:
    """The caption of the comparison with the published data of `citation`."""
    return (
        f"Seconds per 100 tokens. Published: {citation}. The range of a ratio allows for the "
        "rounding of the published value, and for the measured value anywhere in its "
        "95% interval. A cell of one trial has no interval: its range is that of the rounding."
    )


def frontier_table(frontier: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """`columns.FRONTIER` as texts. `titles` maps names of deployments to their titles."""
    rows = [
        {
            "deployment": titles.get(row["deployment"], row["deployment"]),
            "workload": workload_title(row["protocol"], int(row["output_len"])),
            "prompt tokens": str(row["input_len"]),
            "max. concurrency served": _format_max_served(row),
            "max. in flight within SLO": _format_within_slo(row),
            "n½": format_n_half(row),
        }
        for row in frontier.to_dict("records")
    ]
    head = [
        "deployment",
        "workload",
        "prompt tokens",
        "max. concurrency served",
        "max. in flight within SLO",
        "n½",
    ]
    return pd.DataFrame(rows, columns=head)


def render_findings(
    statements: Sequence[str],
    table: pd.DataFrame,
    slo: Slo,
    notes: Sequence[str],
    caching: pd.DataFrame | None = None,
) -> str:
    """The findings and the frontier as Markdown. `notes` come first.

    `caching` is the table of `caching_comparison.compare_caching`.
    """
    compared = []
    if caching is not None and not caching.empty:
        compared = ["## Prefix caching off and on", CAPTION, as_markdown(caching)]
    if not statements:
        return "\n\n".join(["# Findings", *notes, NO_FINDINGS, *compared]).rstrip() + "\n"
    return "\n\n".join(
        [
            "# Findings",
            *notes,
            bullets(statements).rstrip(),
            frontier_caption(slo),
            as_markdown(table),
            *compared,
        ]
    )


def published_table(pairs: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """`columns.PUBLISHED_COMPARISON` as texts. `titles` maps deployments to their titles."""
    rows = [
        {
            "deployment": titles.get(row["deployment"], row["deployment"]),
            "concurrency": str(row["concurrency"]),
            "prompt tokens": str(row["input_len"]),
            "measured (s)": f"{row['measured_s']:.3g}",
            "published (s)": format_seconds(row["published_s"]),
            "ratio [range]": "{:.2f} [{:.2f}, {:.2f}]".format(
                *(row[name] for name in ("ratio", "ratio_low", "ratio_high"))
            ),
        }
        for row in pairs.to_dict("records")
    ]
    head = [
        "deployment",
        "concurrency",
        "prompt tokens",
        "measured (s)",
        "published (s)",
        "ratio [range]",
    ]
    return pd.DataFrame(rows, columns=head)


def render_published_comparison(
    citation: str | None,
    statements: Sequence[str],
    table: pd.DataFrame,
    differences: pd.DataFrame | None,
    notes: Sequence[str],
) -> str:
    """The comparison with published data as Markdown, with the known differences in method.

    `citation` and `differences` (see `published.method_differences`) are None if the study names
    no published data.
    """
    head = [f"# {PUBLISHED_TITLE}", *notes]
    if citation is None:
        return "\n\n".join([*head, NO_PUBLISHED_DATA]) + "\n"
    if table.empty:
        return "\n\n".join([*head, f"Published: {citation}.", NOT_COMPARABLE]) + "\n"
    return "\n\n".join(
        [
            *head,
            published_caption(citation),
            bullets(statements).rstrip(),
            "## Cells",
            as_markdown(table).rstrip(),
            "## Differences in method",
            "" if differences is None else as_markdown(differences),
        ]
    )


def _format_max_served(row: Mapping[Any, Any]) -> str:
    value = row["max_served"]
    if pd.isna(value):
        return "–"
    return f"≥ {value}" if row["max_served_is_lower_bound"] else str(value)


def _format_within_slo(row: Mapping[Any, Any]) -> str:
    return format_max_within_slo(row).replace("at least", "≥")
