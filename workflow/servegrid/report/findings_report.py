"""The frontier and the comparison with published figures as pages. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from servegrid.analysis.findings import Slo
from servegrid.analysis.titles import load_title
from servegrid.report.markup import as_markdown, bullets

NOT_COMPARABLE = (
    "No cell of this study that was measured on hardware has a published counterpart: same model, "
    "quantization, GPUs, load and prompt length."
)

BESIDE = (
    "Seconds per 100 tokens. Published: Bendi-Ouis, Dutarte, Hinaut, 2024. The range of the ratio "
    "has the published figure anywhere within its rounding and the measured one anywhere in its "
    "95% interval."
)


def frontier_table(reach: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """`columns.FRONTIER` as texts; `titles` are the deployments' names for people."""
    rows = [
        {
            "deployment": titles.get(row["deployment"], row["deployment"]),
            "workload": load_title(row["protocol"], int(row["output_len"])),
            "prompt tokens": str(row["input_len"]),
            "served": _most(row, "served"),
            "within SLO": _most(row, "within_slo"),
            "linear from": "–" if pd.isna(row["knee"]) else str(row["knee"]),
        }
        for row in reach.to_dict("records")
    ]
    head = ["deployment", "workload", "prompt tokens", "served", "within SLO", "linear from"]
    return pd.DataFrame(rows, columns=head)


def findings_page(told: Sequence[str], table: pd.DataFrame, slo: Slo, notes: Sequence[str]) -> str:
    """The statements and the frontier as Markdown; `notes` stand above them."""
    if not told:
        nothing = "Nothing was found: it takes cells of a burst or a steady load."
        return "\n\n".join(["# Findings", *notes, nothing]) + "\n"
    return "\n\n".join(
        [
            "# Findings",
            *notes,
            bullets(told).rstrip(),
            f"Requests at once that were served, and with {slo} for each; linear from: from "
            "there on the time grows at least 1.8-fold per doubling of the requests.",
            as_markdown(table),
        ]
    )


def beside_table(pairs: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """`columns.BESIDE` as texts."""
    rows = [
        {
            "deployment": titles.get(row["deployment"], row["deployment"]),
            "requests": str(row["concurrency"]),
            "prompt tokens": str(row["input_len"]),
            "measured s": f"{row['measured_s']:.3g}",
            "published s": f"{row['published_s']:.1f}",
            "ratio": f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
        }
        for row in pairs.to_dict("records")
    ]
    head = ["deployment", "requests", "prompt tokens", "measured s", "published s", "ratio"]
    return pd.DataFrame(rows, columns=head)


def beside_page(
    told: Sequence[str], table: pd.DataFrame, apart: Sequence[str], notes: Sequence[str]
) -> str:
    """Measured beside published figures as Markdown, with what is known to differ."""
    head = ["# Beside published figures", *notes]
    if table.empty:
        return "\n\n".join([*head, NOT_COMPARABLE]) + "\n"
    return "\n\n".join(
        [
            *head,
            BESIDE,
            bullets(told) + "\nWhat differs beside the figures:\n\n" + bullets(apart).rstrip(),
            as_markdown(table),
        ]
    )


def _most(row: Mapping[Any, Any], which: str) -> str:
    most = row[f"max_{which}"]
    if pd.isna(most):
        return "–"
    return f"≥ {most}" if row[f"max_{which}_is_lower_bound"] else str(most)
