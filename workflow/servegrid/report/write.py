"""Everything that follows from the tables of cells and of their summary, written to files.

The scripts of the rules and the verification of a bundle both call these functions, so that a
bundle is verified with the code that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid.analysis import findings, goodput, tables, titles
from servegrid.analysis.caching_comparison import compare_caching
from servegrid.analysis.capacity import load_prices, parse_demand, parse_demands, plan_capacity
from servegrid.analysis.plan import DeploymentPlan, plan_study
from servegrid.analysis.predictor import load_calibration
from servegrid.analysis.published import (
    compare_with_published,
    describe_comparison,
    method_differences,
)
from servegrid.analysis.review import DeploymentReview, review_study
from servegrid.analysis.slo import parse_slo, parse_slo_classes
from servegrid.analysis.summary import lacks_low_loads
from servegrid.errors import ConfigError
from servegrid.records import columns
from servegrid.reference.checkpoint import known_model
from servegrid.reference.published import load_published, published_from_config
from servegrid.report import (
    capacity_report,
    findings_report,
    goodput_report,
    markup,
    provenance,
)
from servegrid.study.config import parse_study
from servegrid.study.grid import Study
from servegrid.study.settings import swept_settings

Paths = Mapping[str, Path]


def write_findings(
    config: Mapping[str, Any], cells: pd.DataFrame, summary: pd.DataFrame, paths: Paths
) -> None:
    """Write the frontier, the findings, and the comparison with published data.

    `paths` are the outputs of the rule `findings` by name. All of them are written, even if the
    study names no published data. Raises RecordError if a file cannot be written, and ConfigError
    if the published data cannot be read.
    """
    slo, names = parse_slo(config), titles.deployment_titles(cells)
    notes = titles.figure_notes(cells)
    frontier = findings.compute_frontier(summary, slo)
    tables.save_table(frontier, columns.FRONTIER, paths["frontier"], paths["frontier_csv"])
    table = findings_report.frontier_table(frontier, names)
    sentences = findings.describe_findings(summary, frontier, slo, names)
    markup.write_texts(
        {
            paths["findings"]: findings_report.render_findings(
                sentences, table, slo, notes, compare_caching(summary, cells, names)
            ),
            paths["frontier_tex"]: markup.as_latex(
                table, findings_report.frontier_caption(slo), "tab:frontier"
            ),
        }
    )
    _write_published(config, cells, summary, paths)


def _write_published(
    config: Mapping[str, Any], cells: pd.DataFrame, summary: pd.DataFrame, paths: Paths
) -> None:
    published, names = published_from_config(config), titles.deployment_titles(cells)
    mixed = config.get("allow_emulated_mix", False)
    pairs = compare_with_published(summary, published, mixed)
    tables.save_table(
        pairs, columns.PUBLISHED_COMPARISON, paths["published"], paths["published_csv"]
    )
    table = findings_report.published_table(pairs, names)
    citation, caption, differences = None, findings_report.NO_PUBLISHED_DATA, None
    if published is not None:
        citation = published.source.citation
        caption = findings_report.published_caption(citation)
        prompts = [trial.workload.prompts for trial in parse_study(config).trials]
        differences = method_differences(cells, prompts, published)
    markup.write_texts(
        {
            paths["published_md"]: findings_report.render_published_comparison(
                citation,
                describe_comparison(pairs, names),
                table,
                differences,
                titles.figure_notes(cells),
            ),
            paths["published_tex"]: markup.as_latex(table, caption, "tab:published"),
        }
    )


def write_slo(config: Mapping[str, Any], records: Path, cells: pd.DataFrame, paths: Paths) -> None:
    """Write attainment, goodput and saturation. `paths` are the outputs of the rule `goodput`.

    `records` is the folder of the records. Raises RecordError if one cannot be read, or if a file
    cannot be written.
    """
    trials, classes = parse_study(config).trials, parse_slo_classes(config)
    slo = goodput.gather_slo_table(trials, cells, records, classes)
    saturation = goodput.find_saturation(slo)
    tables.save_table(slo, columns.SLO, paths["slo"], paths["slo_csv"])
    tables.save_table(saturation, columns.SATURATION, paths["saturation"], paths["saturation_csv"])
    names, notes = titles.deployment_titles(cells), titles.figure_notes(cells)
    text = goodput_report.render_slo(slo, saturation, names, notes)
    markup.write_texts({paths["slo_md"]: text})


def write_capacity_plan(
    config: Mapping[str, Any], summary: pd.DataFrame, hardware: Path, paths: Paths
) -> None:
    """Write the capacity plan. `paths` are the outputs of the rule `plan_capacity` by name.

    Raises ConfigError if the file `hardware` cannot be used, and RecordError if a file cannot be
    written.
    """
    demands, prices = parse_demands(config), load_prices(hardware)
    plans = [plan_capacity(summary, demand, prices) for demand in demands]
    planned, sparse = pd.concat(plans, ignore_index=True), lacks_low_loads(summary)
    tables.save_table(planned, columns.CAPACITY_PLAN, paths["parquet"], paths["csv"])
    markup.write_texts(
        {
            paths["markdown"]: capacity_report.render_capacity_reports(
                plans, demands, prices, sparse
            ),
            paths["latex"]: markup.as_latex(
                capacity_report.capacity_table(planned),
                capacity_report.caption(demands[0]),
                "tab:capacity",
            ),
        }
    )


def write_study_page(
    config: Mapping[str, Any], records: Path, inputs: Paths, hardware: Path, page: Path
) -> None:
    """Write the page of a study whose records lie in the folder `records`.

    `inputs` are the tables `cells`, `summary`, `frontier`, `published`, `slo` and `saturation`, as
    Parquet. Raises
    RecordError if a record cannot be read, and ConfigError if `hardware` or the published data
    cannot be used.
    """
    from servegrid.report.page import compose

    study = parse_study(config)
    cells, summary, frontier, pairs, slo, saturation = (
        tables.load_table(inputs[name])
        for name in ("cells", "summary", "frontier", "published", "slo", "saturation")
    )
    results = compose.StudyResults(
        cells,
        summary,
        frontier,
        pairs,
        parse_slo(config),
        published_from_config(config),
        [trial.workload.prompts for trial in study.trials],
        provenance.describe_allocations(study.trials, cells, records),
        parse_slo_classes(config),
        slo,
        saturation,
        swept_settings(config),
        outcomes_of(study, cells),
    )
    text = compose.render_study_page(
        study.name, results, parse_demand(config), load_prices(hardware)
    )
    markup.write_texts({page: text})


def outcomes_of(study: Study, cells: pd.DataFrame) -> list[tuple[DeploymentPlan, DeploymentReview]]:
    """The plan of each deployment with finished cells, and its review.

    Only the tables of the package are used, not the checkpoints, so every machine makes the same
    page. A study whose arguments contradict each other has no plan.
    """
    facts = {each.name: known_model(each) for each in study.deployments}
    try:
        plan = plan_study(study, facts, load_calibration())
    except ConfigError:
        return []
    plans = {each.deployment.name: each for each in plan.deployments}
    return [(plans[each.deployment], each) for each in review_study(plan, cells)]


def write_published_page(config: Mapping[str, Any], name: str, hardware: Path, page: Path) -> None:
    """Write the page of the published data `name`: a data set of this package, or a CSV file.

    The SLO and the demand are those of `config`, which may be empty. Raises ConfigError if the
    published data or `hardware` cannot be used, and RecordError if the page cannot be written.
    """
    from servegrid.report.page import compose

    text = compose.render_published_page(
        load_published(name),
        parse_slo(config),
        parse_demand(config),
        load_prices(hardware),
    )
    markup.write_texts({page: text})
