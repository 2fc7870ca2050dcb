from pathlib import Path

from servegrid import conclusions, findings, labels, printable, published, records, tables
from servegrid.config import study_of
from servegrid.script import logged

with logged(snakemake.log[0]):
    study, limits = study_of(snakemake.config), findings.limits_of(snakemake.config)
    cells = tables.read_cells(Path(snakemake.input.cells))
    summary = tables.read_cells(Path(snakemake.input.summary))
    titles, notes = labels.deployment_titles(cells), labels.emulation_notes(cells)
    paths = {name: Path(path) for name, path in snakemake.output.items()}

    reach = findings.frontier(summary, limits)
    tables.write(reach, records.FRONTIER, paths["frontier"], paths["frontier_csv"])
    shown = conclusions.frontier_table(reach, titles)
    told = findings.statements(summary, reach, limits, titles)

    mixed = snakemake.config.get("mix_emulated", False)
    pairs = published.beside(summary, published.summary_of("inria-2024"), mixed)
    tables.write(pairs, records.BESIDE, paths["published"], paths["published_csv"])
    pairs_shown = conclusions.beside_table(pairs, titles)
    apart = published.differences(cells, [trial.load.prompts for trial in study.trials])

    printable.write(
        {
            paths["findings"]: conclusions.findings_page(told, shown, limits, notes),
            paths["frontier_tex"]: printable.as_latex(
                shown, f"Requests at once that were served, and with {limits}.", "tab:frontier"
            ),
            paths["published_md"]: conclusions.beside_page(
                published.statements(pairs, titles), pairs_shown, apart, notes
            ),
            paths["published_tex"]: printable.as_latex(
                pairs_shown, "Seconds per 100 tokens beside published ones.", "tab:published"
            ),
        }
    )
