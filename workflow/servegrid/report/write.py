"""What follows from a study's tables of cells and of its summary, written where a rule wants it.

The rules' scripts and the verification of a bundle both call these: what is verified is made as
it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid.analysis import findings, published, tables, titles
from servegrid.analysis.capacity import demand_of, plan, read_hardware
from servegrid.records import columns
from servegrid.report import capacity_report, findings_report, markup, provenance
from servegrid.study.config import study_of

Paths = Mapping[str, Path]


def write_conclusions(
    config: Mapping[str, Any], cells: pd.DataFrame, summary: pd.DataFrame, paths: Paths
) -> None:
    """Write the frontier, the findings and the comparison with published figures.

    `paths` has the outputs of the rule `conclude` by their names. Raises RecordError where one
    cannot be written.
    """
    study, slo = study_of(config), findings.slo_of(config)
    names, notes = titles.deployment_titles(cells), titles.emulation_notes(cells)

    reach = findings.frontier(summary, slo)
    tables.write(reach, columns.FRONTIER, paths["frontier"], paths["frontier_csv"])
    shown = findings_report.frontier_table(reach, names)
    told = findings.statements(summary, reach, slo, names)

    mixed = config.get("allow_emulated_mix", False)
    pairs = published.beside(summary, published.summary_of("inria-2024"), mixed)
    tables.write(pairs, columns.BESIDE, paths["published"], paths["published_csv"])
    pairs_shown = findings_report.beside_table(pairs, names)
    apart = published.differences(cells, [trial.workload.prompts for trial in study.trials])

    markup.write(
        {
            paths["findings"]: findings_report.findings_page(told, shown, slo, notes),
            paths["frontier_tex"]: markup.as_latex(
                shown, f"Requests at once that were served, and with {slo}.", "tab:frontier"
            ),
            paths["published_md"]: findings_report.beside_page(
                published.statements(pairs, names), pairs_shown, apart, notes
            ),
            paths["published_tex"]: markup.as_latex(
                pairs_shown, "Seconds per 100 tokens beside published ones.", "tab:published"
            ),
        }
    )


def write_plan(
    config: Mapping[str, Any], summary: pd.DataFrame, hardware: Path, paths: Paths
) -> None:
    """Write the capacity plan; `paths` has the outputs of the rule `plan_capacity`.

    Raises ConfigError where the file `hardware` cannot be used.
    """
    demand, prices = demand_of(config), read_hardware(hardware)
    planned = plan(summary, demand, prices)
    tables.write(planned, columns.PLAN, paths["parquet"], paths["csv"])
    markup.write(
        {
            paths["markdown"]: capacity_report.page(planned, demand, prices),
            paths["latex"]: markup.as_latex(
                capacity_report.table(planned),
                f"Capacity plan for {demand.users} users.",
                "tab:capacity",
            ),
        }
    )


def write_page(
    config: Mapping[str, Any], folder: Path, found: Paths, hardware: Path, page: Path
) -> None:
    """Write the page of a study whose records lie in `folder`.

    `found` has the tables `cells`, `summary`, `frontier` and `published`, as Parquet. Raises
    RecordError where a record cannot be read, ConfigError where `hardware` cannot be used.
    """
    from servegrid.report.page import compose

    study = study_of(config)
    cells, summary, frontier, beside = (
        tables.read_cells(found[name]) for name in ("cells", "summary", "frontier", "published")
    )
    shown = compose.Found(
        cells,
        summary,
        frontier,
        beside,
        findings.slo_of(config),
        published.differences(cells, [trial.workload.prompts for trial in study.trials]),
        provenance.allocations(study.trials, cells, folder),
    )
    text = compose.page(study.name, shown, demand_of(config), read_hardware(hardware))
    markup.write({page: text})
